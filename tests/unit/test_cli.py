from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from types import ModuleType

import pytest

from lockstep import cli
from lockstep.config import Config
from lockstep.errors import DataError

TRAIN = [
    "train", "--hf-checkpoint", "m", "--prompt-data", "p.jsonl", "--num-rollout", "2", "--n-samples-per-prompt", "4",
    "--rm-type", "math",
]  # fmt: skip


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **functions: object) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["eval", "--help"], [*TRAIN, "--dry-run"]])
def test_reading_the_command_line_imports_nothing_heavy(words):
    code = f"""
import json, sys
from lockstep.cli import main
try:
    main({words!r})
except SystemExit:
    pass
print(json.dumps([n for n in ("torch", "transformers", "numpy", "pyarrow", "plotly", "rich") if n in sys.modules]))
"""
    assert json.loads(python(code).stdout.splitlines()[-1]) == []


GROWING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,large_segment_size_mb:128"}
SGLANG = ["--rollout-engine", "sglang", "--rollout-external-engine-addrs", "127.0.0.1:1"]


@pytest.mark.parametrize(
    ("words", "set_by_user", "found"),
    [
        ([], {}, GROWING),
        ([], {"PYTORCH_ALLOC_CONF": "a"}, {"PYTORCH_ALLOC_CONF": "a"}),
        ([], {"PYTORCH_CUDA_ALLOC_CONF": "b"}, {"PYTORCH_CUDA_ALLOC_CONF": "b"}),
        (SGLANG, {}, {}),
        ([*SGLANG, "--update-weight-transport", "nccl"], {}, GROWING),
    ],
)
def test_training_has_segments_that_grow_unless_the_user_or_a_server_that_opens_them_has_a_say(
    monkeypatch, words, set_by_user, found
):
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | set_by_user
    monkeypatch.setattr(os, "environ", environment)
    install(monkeypatch, "lockstep.loop", train=lambda config: 0)
    assert cli.main([*TRAIN, *words]) == 0
    assert {name: value for name, value in environment.items() if "ALLOC_CONF" in name} == found


def test_help_takes_less_than_a_second():
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lockstep", "--help"], capture_output=True, check=True, timeout=60)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 1.0


def test_help_lists_the_commands(capsys):
    assert cli.main([]) == 0
    listed = [
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and line[2] != "-"
    ]
    assert listed == ["train", "eval", "serve", "plan", "convert", "launch", "report", "bench", "doctor"]


def test_the_help_of_train_is_grouped(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    sections = [line for line in out.splitlines() if line.startswith("[")]
    assert sections[:4] == ["[model]:", "[checkpoint]:", "[data]:", "[rollout]:"]
    assert "--rollout-batch-size" in out
    assert "--moe-permute-fusion" not in out


def test_a_bad_option_exits_2_without_a_traceback():
    ended = subprocess.run(
        [sys.executable, "-m", "lockstep", "train", "--rollout-batch-sise", "3"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        "lockstep: error: --rollout-batch-sise is '3': there is no such option. Did you mean --rollout-batch-size?\n"
    )


@pytest.mark.parametrize(
    ("words", "named"), [(["trian"], "trian"), (["serve"], "serve"), (["--nonsense"], "--nonsense")]
)
def test_an_unknown_command_exits_2(capsys, words, named):
    assert cli.main(words) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench"], "what: it is required. See `lockstep bench --help`."),
        (["report", "a", "b"], "command line is 'b': no option takes these words. See `lockstep report --help`."),
        (["train", "--lr"], "--lr: expected one argument. Give the value after the flag."),
        (["train"], "--hf-checkpoint: it is required. Give --hf-checkpoint, or set it in the recipe."),
    ],
)
def test_words_that_do_not_fit_a_command_exit_2(capsys, words, message):
    assert cli.main(words) == 2
    assert capsys.readouterr().err == f"lockstep: error: {message}\n"


def test_dry_run_prints_a_recipe_that_loads_as_the_same_options(tmp_path, capsys):
    words = [*TRAIN, "--moe-enable-deepep", "--rollout-stop", "a", "--sglang-dp-size", "8"]
    assert cli.main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# --moe-enable-deepep: ")
    recipe = tmp_path / "again.toml"
    recipe.write_text(printed)
    assert cli.main(["train", str(recipe), "--dry-run"]) == 0
    assert tomllib.loads(capsys.readouterr().out) == tomllib.loads(printed)


def test_dry_run_refuses_what_the_run_would_refuse(capsys):
    assert cli.main(["train", "--hf-checkpoint", "m", "--dry-run"]) == 2
    assert "--prompt-data" in capsys.readouterr().err


def test_train_and_eval_hand_over_the_config_and_return_the_exit_code(monkeypatch):
    seen: list[Config] = []

    def train(config: Config) -> int:
        seen.append(config)
        return 5

    def evaluate(config: Config) -> int:
        seen.append(config)
        return 7

    install(monkeypatch, "lockstep.loop", train=train, evaluate=evaluate)
    assert cli.main([*TRAIN, "--lr", "0.5"]) == 5
    assert cli.main(["eval", "--hf-checkpoint", "m", "--eval-prompt-data", "a", "b"]) == 7
    assert (seen[0].optimizer.lr, seen[1].eval.eval_prompt_data) == (0.5, ("a", "b"))


def test_notes_go_to_stderr_before_a_run(monkeypatch, capsys):
    install(monkeypatch, "lockstep.loop", train=lambda config: 0, evaluate=lambda config: 0)
    assert cli.main([*TRAIN, "--moe-enable-deepep"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lockstep: note: --moe-enable-deepep: ")


def test_report_writes_where_it_is_told(monkeypatch, tmp_path, capsys):
    calls = []
    install(monkeypatch, "lockstep.report", write_report=lambda run, output: calls.append((run, output)) or "page.html")
    assert cli.main(["report", str(tmp_path), "--output", "x.html"]) == 0
    assert [(str(run), str(output)) for run, output in calls] == [(str(tmp_path), "x.html")]
    assert capsys.readouterr().out == "page.html\n"


def test_an_error_of_ours_is_one_line_with_its_exit_code(monkeypatch, capsys):
    def fail(config: Config) -> int:
        raise DataError("data.jsonl:17", "{", "it is not JSON.", "Correct the row.")

    install(monkeypatch, "lockstep.loop", train=fail, evaluate=fail)
    assert cli.main(TRAIN) == 1
    _, message = capsys.readouterr().err.splitlines()
    assert message == "lockstep: error: data.jsonl:17 is '{': it is not JSON. Correct the row."


def test_ctrl_c_exits_130(monkeypatch):
    def interrupt(config: Config) -> int:
        raise KeyboardInterrupt

    install(monkeypatch, "lockstep.loop", train=interrupt, evaluate=interrupt)
    assert cli.main(TRAIN) == 130


def test_an_error_that_is_not_ours_keeps_its_traceback(monkeypatch):
    install(monkeypatch, "lockstep.loop", train=lambda config: 1 // 0, evaluate=None)
    with pytest.raises(ZeroDivisionError):
        cli.main(TRAIN)
