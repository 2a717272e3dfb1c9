"""`lockstep plan` as a user sees it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from plan_cases import EIGHT_H100, GRPO, ONE_GPU, ONE_H200, SHAPES

from lockstep.cli import main
from lockstep.config import Config
from lockstep.models import read_model_config
from lockstep.plan import Hardware, predict
from lockstep.plan.command import has_sampler
from lockstep.plan.hardware import GIB

PAGE = Path(__file__).parents[3] / "docs" / "memory.md"
LAYOUTS = PAGE.with_name("parallelism.md")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with nothing but config.json for every model."""
    for name, shape in SHAPES.items():
        (tmp_path / f"Qwen3-{name}").mkdir()
        (tmp_path / f"Qwen3-{name}" / "config.json").write_text(json.dumps(shape))
    monkeypatch.chdir(tmp_path)


def words(options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return flags


def plan(capsys: pytest.CaptureFixture[str], name: str, hardware: str, *more: str, **options: Any) -> tuple[int, str]:
    code = main(["plan", *words(options | {"hf_checkpoint": f"Qwen3-{name}"}), "--hardware", hardware, *more])
    return code, capsys.readouterr().out


def blocks(page: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("models")
def test_the_example_of_the_docs_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, printed = blocks(PAGE.read_text())[:2]
    Path("one_gpu.toml").write_text(recipe)
    code = main(["plan", "one_gpu.toml", "--hardware", ONE_H200])
    assert capsys.readouterr().out == printed
    assert code == 0


def test_the_table_of_layouts_says_what_the_plan_says() -> None:
    """Model, machine, peaks: each row that predicts something, as its options are planned."""
    rows = [line.split("|")[1:-1] for line in LAYOUTS.read_text().splitlines() if line.startswith("| Qwen3-")]
    found = []
    for model, machine, words, gpu, host in ([cell.strip() for cell in row] for row in rows):
        if "measured" in gpu:
            continue
        sizes = re.findall(r"--([a-z-]+-parallel-size) (\d+)", words)
        options = (
            GRPO
            | {name.replace("-", "_"): int(size) for name, size in sizes}
            | {"actor_num_gpus_per_node": int(machine[0])}
        )
        options |= {"optimizer_cpu_offload": True, "recompute_granularity": "full"}
        if "8-bit moments" in words:
            options |= {"overlap_cpu_optimizer_d2h_h2d": True, "use_precision_aware_optimizer": True}
            options |= {"main_grads_dtype": "bf16", "exp_avg_dtype": "8bit", "exp_avg_sq_dtype": "8bit"}
        hardware = Hardware.parse(f"{machine.replace(' x ', 'x').replace(' ', '-')},2T-host")
        planned = predict(Config.from_dict(options), read_model_config(SHAPES[model.removeprefix("Qwen3-")]), hardware)
        assert planned.fits == ("does not fit" not in gpu), (model, machine)
        assert f"{planned.gpu_peak / GIB:.0f} GiB" in gpu, (model, machine)
        assert f"{planned.host_peak / GIB:.0f} GiB" == host, (model, machine)
        found.append(model)
    assert len(found) == 5


@pytest.mark.usefixtures("models")
def test_the_predicted_numbers_of_the_docs_are_those_of_the_plan() -> None:
    """In the order of the table: tensors after setup and at most, the same of 3 layers, reserved, host."""
    whole, short = (
        predict(
            Config.from_dict(ONE_GPU),
            read_model_config(SHAPES["30B-A3B"] | {"num_hidden_layers": layers}),
            Hardware.parse(ONE_H200),
            samples=False,
        )
        for layers in (48, 3)
    )
    backward = whole.phase("backward")
    found = [
        whole.phase("load").tensor_bytes,
        backward.tensor_bytes,
        short.phase("backward").tensor_bytes,
        backward.gpu_bytes - backward.gpu["CUDA"],
        backward.host_bytes,
    ]
    named = re.findall(r"^\| .* \| ([\d.]+) GiB \| [\d.]+ GiB \|$", PAGE.read_text(), re.MULTILINE)
    assert [f"{size / GIB:.{len(text.partition('.')[2])}f}" for size, text in zip(found, named, strict=True)] == named


@pytest.mark.usefixtures("models")
def test_published_models_on_eight_gpus_say_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = {"actor_num_gpus_per_node": 8, "expert_model_parallel_size": 8}
    code, text = plan(capsys, "Next-80B-A3B", EIGHT_H100, **GRPO | ranks)
    assert code == 1
    assert text.startswith("Model: 79.67 billion parameters in bfloat16.\nMachine: 8 x H100 with 79.2 GiB")
    assert "A rollout is 32 prompts x 8 samples = 256 samples, which make 1 step of 256." in text
    assert "a step of each data-parallel rank has at most 262,144: 16 micro-batches of 16,384." in text
    assert "It does not fit: " in text
    assert "    --recompute-granularity full    (every layer is computed forward twice)" in text
    assert "Then: It fits: " in text
    code, text = plan(capsys, "235B-A22B", EIGHT_H100, **GRPO | ranks)
    assert code == 1
    assert text.startswith("Model: 235.09 billion parameters")
    assert "GPUs of this kind, with as much host memory for each." in text


@pytest.mark.usefixtures("models")
def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = plan(capsys, "30B-A3B", ONE_H200, "--json", **ONE_GPU)
    found = json.loads(text)
    assert (code, found["fits"], found["changes"], found["hint"]) == (0, True, [], "")
    assert found["num_parameters"] == 30_532_122_624
    assert found["batches"]["num_micro_batches"] == 8
    for phase in found["phases"]:
        assert phase["gpu_bytes"] == sum(phase["gpu"].values()) <= found["gpu_limit_bytes"]
    _, text = plan(capsys, "30B-A3B", ONE_H200, "--json", **GRPO)
    assert [change["flags"] for change in json.loads(text)["changes"]]
    assert max(phase["gpu_bytes"] for phase in json.loads(text)["phases_after_changes"]) <= found["gpu_limit_bytes"]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("hardware", "options", "field"),
    [
        ("8xH100", {}, "--hardware"),
        ("1xH100-80G,128G-host", {"actor_num_gpus_per_node": 8}, "--actor-num-gpus-per-node"),
        ("128G-host", {"device": "cuda"}, "--device"),
        (ONE_H200, {"num_layers": 3}, "--num-layers"),
        (ONE_H200, {"max_tokens_per_gpu": 0}, "--max-tokens-per-gpu"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    hardware: str, options: dict[str, Any], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["plan", *words(GRPO | {"hf_checkpoint": "Qwen3-4B"} | options), "--hardware", hardware])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code in (1, 2), "what is wrong with the model is 1"
    assert error.startswith(f"lockstep: error: {field} is ")


@pytest.mark.usefixtures("models")
def test_recipes_options_are_those_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    """Flags win over the recipe, and what training refuses is refused."""
    Path("short.toml").write_text('[model]\nhf_checkpoint = "Qwen3-4B"\n[rollout]\nrollout_max_prompt_len = 24\n')
    start = ["plan", "short.toml", "--hardware", ONE_H200, "--prompt-data", "p.jsonl", "--num-rollout", "1"]
    assert main([*start, "--rm-type", "math", "--n-samples-per-prompt", "2", "--rollout-max-response-len", "1000"]) == 0
    assert "A sample has at most 1,024 tokens" in capsys.readouterr().out
    assert main([*start, "--rm-type", "math"]) == 2
    assert "--n-samples-per-prompt is 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "has_one"),
    [
        ({}, True),
        ({"rollout_engine": "sglang"}, False),
        ({"loss_type": "sft_loss"}, False),
        ({"loss_type": "sft_loss", "eval_prompt_data": ["held", "out.jsonl"]}, True),
    ],
    ids=str,
)
def test_only_a_run_with_our_engine_has_its_caches(options: dict[str, Any], has_one: bool) -> None:
    assert has_sampler(Config.from_dict(GRPO | options)) is has_one


def test_the_help_shows_its_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--help"])
    assert ended.value.code == 0
    assert "--hardware" in capsys.readouterr().out
