"""What a user can get wrong, and what they read then: field, value, reason and remedy, and no traceback."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_runs import Workshop, assert_same_checkpoint, flags, hook, read_metrics, run, write_model
from safetensors.torch import load_file, save_file

from lockstep.checkpoint.training import list_checkpoints
from lockstep.cli import main
from lockstep.run import only_writer

Options = dict[str, Any]
Prepare = Callable[[Workshop, Path], Options]


def changed_model(change: Callable[[Path], None]) -> Prepare:
    """A copy of the model, spoilt by `change`."""

    def prepare(workshop: Workshop, tmp_path: Path) -> Options:
        folder = tmp_path / "model"
        shutil.copytree(workshop.model, folder)
        change(folder)
        return {"hf_checkpoint": folder}

    return prepare


def config_with(**changes: Any) -> Prepare:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {name: value for name, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return changed_model(change)


def tensors_with(change: Callable[[dict[str, torch.Tensor]], None]) -> Prepare:
    def change_file(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed_model(change_file)


def write_note(folder: Path) -> Path:
    folder.mkdir()
    (folder / "note.txt").write_text("not to be lost")
    return folder


def without_template(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))


def with_a_wide_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["beyond"] = 999
    path.write_text(json.dumps(tokenizer))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def data_of(*rows: str, name: str = "data.jsonl", **options: Any) -> Prepare:
    """A data file of these lines."""

    def prepare(workshop: Workshop, tmp_path: Path) -> Options:
        (tmp_path / name).write_text("".join(row + "\n" for row in rows))
        return {"prompt_data": tmp_path / name} | options

    return prepare


def given(**options: Any) -> Prepare:
    return lambda workshop, tmp_path: options


def in_tmp(**options: str) -> Prepare:
    """Options whose values are paths below the test's folder."""
    return lambda workshop, tmp_path: {name: tmp_path / value for name, value in options.items()}


def file_in_tmp(name: str, content: str, **options: str) -> Prepare:
    def prepare(workshop: Workshop, tmp_path: Path) -> Options:
        (tmp_path / name).write_text(content)
        return {option: tmp_path / value for option, value in options.items()}

    return prepare


GOOD = '{"prompt": "What is 1+1?", "label": "2"}'
OPTIONS: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    # name: (what is wrong, what the message says)
    "unknown option": (given(rollout_bach_size=4), ("--rollout-bach-size", "--rollout-batch-size")),
    "not a number": (given(rollout_batch_size="three"), ("--rollout-batch-size", "'three'", "whole number")),
    "below the range": (given(n_samples_per_prompt=0), ("--n-samples-per-prompt", "0", "1")),
    "not one of the choices": (
        given(kl_loss_type="k4", use_kl_loss=True),
        ("--kl-loss-type is 'k4'", "it must be k1", "Give k1"),
    ),
    "global batch": (given(global_batch_size=5), ("--global-batch-size is 5", "= 12 per rollout", "such as 6")),
    "steps": (given(num_steps_per_rollout=5), ("--num-steps-per-rollout is 5", "does not divide", "such as 6")),
    "group of one": (given(n_samples_per_prompt=1), ("--n-samples-per-prompt is 1", "advantage 0", "2 or more")),
    "too little over-sampling": (given(over_sampling_batch_size=2), ("--over-sampling-batch-size is 2", "Use 3")),
    "no length": (given(num_rollout=None), ("--num-rollout: ", "open", "--num-epoch")),
    "no data": (given(prompt_data=None), ("--prompt-data: ", "needs prompts", ".jsonl")),
    "no model": (given(hf_checkpoint=None), ("--hf-checkpoint", "required", "Give")),
    "kl in the reward": (given(kl_coef=0.1), ("--kl-coef is 0.1", "does nothing", "--use-kl-loss")),
    "an epoch too short": (given(num_rollout=None, num_epoch=1, rollout_batch_size=65), ("--num-epoch is 1", "65")),
    "interval without a folder": (given(save_interval=1), ("--save-interval is 1", "no folder", "--save")),
    "unknown reward": (given(custom_rm_path=None, rm_type="mth"), ("--rm-type is 'mth'", "closest is math", "Use one")),
    "no reward service": (given(custom_rm_path=None, rm_type="remote_rm"), ("--rm-url: ", "address", "URL")),
    "group reward": (given(custom_rm_path=None, rm_type="math", group_rm=True), ("--group-rm", "one sample at a time")),
    "hook without module": (
        given(custom_rm_path="reward"),
        ("--custom-rm-path is 'reward'", "names no module", "Write"),
    ),
    "hook module missing": (
        given(custom_generate_function_path="no.such.thing"),
        ("--custom-generate-function-path is 'no.such.thing'", "No module named", "Check"),
    ),
    "hook file missing": (in_tmp(buffer_filter_path="none.py:f"), ("--buffer-filter-path", "there is no file", "Give")),
    "hook name missing": (
        given(dynamic_sampling_filter_path=hook("nope")),
        ("--dynamic-sampling-filter-path", "has no nope", "Check the name"),
    ),
    "hook that is no function": (
        given(rollout_sample_filter_path=hook("MOMENT")),
        ("--rollout-sample-filter-path", "MOMENT is a str", "Check the name"),
    ),
    "reward file broken": (
        file_in_tmp("broken.py", "def f(:\n", rollout_function_path="broken.py:f"),
        ("--rollout-function-path", "SyntaxError", "importable"),
    ),
    "eval data in odd number": (given(eval_prompt_data=["a", "b", "c"]), ("--eval-prompt-data is 'a b c'", "pairs")),
    "eval interval without data": (given(eval_interval=1), ("--eval-interval is 1", "no data set", "Give")),
    "eval config missing": (in_tmp(eval_config="no.yaml"), ("--eval-config", "no such file", "YAML")),
    "eval config empty": (
        file_in_tmp("eval.yaml", "eval: 3\n", eval_config="eval.yaml"),
        ("--eval-config", "no list eval.datasets", "Write"),
    ),
    "train only, on nothing": (given(debug_train_only=True), ("--debug-train-only is True", "nothing to train on")),
    "save below a file": (
        file_in_tmp("file", "", save="file/checkpoints"),
        ("--save", "cannot be written to: Not a directory", "Give a folder"),
    ),
    "run folder not writable": (
        given(run_dir="/proc/lockstep"),
        ("--run-dir is '/proc/lockstep'", "cannot be written to", "Give a folder"),
    ),
    "another placeholder": (
        given(save_debug_rollout_data="{step}.pt"),
        ("--save-debug-rollout-data is '{step}.pt'", "only {rollout_id}", "Write {{"),
    ),
    "export over the model": (
        lambda w, tmp: {"save": tmp / "c", "save_hf": w.model},
        ("--save-hf is", "it is --hf-checkpoint", "Give another folder"),
    ),
    "export over something": (
        lambda w, tmp: {"save": tmp / "c", "save_hf": write_note(tmp / "mine")},
        ("--save-hf is", "no config.json", "Give another folder"),
    ),
}
"""Wrong options: exit code 2."""

INPUTS: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    # the model
    "shape flag": (given(num_layers=7), ("--num-layers is 7", "num_hidden_layers 2", "Leave out")),
    "no folder": (in_tmp(hf_checkpoint="none"), ("--hf-checkpoint is", "does not exist", "Give the path")),
    "no config": (changed_model(lambda f: (f / "config.json").unlink()), ("--hf-checkpoint", "no config.json", "Give")),
    "broken config": (changed_model(lambda f: truncated(f / "config.json")), ("config.json is", "Download")),
    "config of a list": (changed_model(lambda f: (f / "config.json").write_text("[]")), ("'list'", "JSON object")),
    "another architecture": (
        config_with(model_type="llama"),
        ("model_type is 'llama'", "qwen3, qwen3_moe, qwen3_next", "Give"),
    ),
    "config without a size": (config_with(hidden_size=...), ("hidden_size", "missing")),
    "sliding window": (config_with(use_sliding_window=True, sliding_window=8), ("use_sliding_window is True", "Use")),
    "missing tensor": (
        tensors_with(lambda t: t.pop("model.norm.weight")),
        ("tensor model.norm.weight is 'missing'", "not in the safetensors files", "Download"),
    ),
    "surplus tensor": (
        tensors_with(lambda t: t.update({"model.extra.weight": torch.zeros(2)})),
        ("tensor model.extra.weight is [2]", "no such tensor", "Use the config.json"),
    ),
    "wrong shape": (
        tensors_with(lambda t: t.update({"model.norm.weight": torch.ones(5)})),
        ("tensor model.norm.weight is [5]", "config.json asks for [32]", "Use the config.json"),
    ),
    "truncated weights": (
        changed_model(lambda f: truncated(f / "model.safetensors")),
        ("model.safetensors is 'damaged'", "incomplete metadata", "Download"),
    ),
    "no weights": (
        changed_model(lambda f: (f / "model.safetensors").unlink()),
        ("model.safetensors is 'missing'", "no such weights file", "Download"),
    ),
    "missing shard": (
        changed_model(
            lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
        ),
        ("model-2.safetensors is 'missing'", "no such weights file", "Download"),
    ),
    "broken index": (
        changed_model(lambda f: (f / "model.safetensors.index.json").write_text("{")),
        ("model.safetensors.index.json is", "Download"),
    ),
    "no tokenizer": (
        changed_model(lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")]),
        ("--hf-checkpoint", "holds no tokenizer", "Copy"),
    ),
    "broken tokenizer": (
        changed_model(lambda f: truncated(f / "tokenizer.json")),
        ("--hf-checkpoint", "tokenizer cannot be loaded", "Copy"),
    ),
    "no chat template": (
        changed_model(without_template),
        ("chat template: ", "has none", "drop --apply-chat-template"),
    ),
    "wide tokenizer": (changed_model(with_a_wide_tokenizer), ("tokenizer is 999", "vocabulary of 128", "Use")),
    # the data
    "no data file": (in_tmp(prompt_data="none.jsonl"), ("none.jsonl", "no such file", "Check the path")),
    "unknown ending": (in_tmp(prompt_data="data.csv"), ("data.csv", "'.csv' are not read", "Use .jsonl")),
    "empty file": (data_of(), ("data.jsonl is 'empty'", "at least one row", "Check")),
    "broken row": (data_of('{"prompt": '), ("data.jsonl:1 is", "not valid JSON", "--skip-malformed-rows")),
    "row of a list": (data_of("[1]"), ("data.jsonl:1 is '[1]'", "must be a JSON object", "--skip-malformed-rows")),
    "missing key": (data_of('{"text": "a"}'), ("data.jsonl:1", "no key 'prompt' (--input-key)", "--skip")),
    "missing label": (data_of('{"prompt": "a"}'), ("data.jsonl:1", "no key 'label' (--label-key)", "--skip")),
    "label of a list": (data_of('{"prompt": "a", "label": [1]}'), ("data.jsonl:1", "string or a number", "--skip")),
    "empty prompt": (data_of('{"prompt": "", "label": "1"}'), ("data.jsonl:1", "'prompt' is empty", "--skip")),
    "no parquet": (data_of("x", name="data.parquet"), ("data.parquet is 'unreadable'", "not a parquet file", "Check")),
    "bad slice": (lambda w, t: {"prompt_data": f"{w.data}@[1-3]"}, ("@[1-3]'", "not a slice", "@[start:stop]")),
    "empty slice": (lambda w, t: {"prompt_data": f"{w.data}@[99:]"}, ("is '64 rows'", "keeps none", "bounds")),
    "long prompts only": (given(rollout_max_prompt_len=3), ("is '64 rows'", "longer than 3 tokens", "Raise the limit")),
    "rows malformed only": (
        data_of("x", "y", skip_malformed_rows=True),
        ("is '2 rows'", "rows are malformed", "without --skip-malformed-rows"),
    ),
    "no eval file": (given(eval_prompt_data=["a", "none.jsonl"]), ("none.jsonl", "no such file", "Check the path")),
    "messages without template": (
        given(apply_chat_template=False),
        ("prompt of sample 0 is '2 messages'", "rendered prompt", "--apply-chat-template"),
    ),
    # hooks and rewards
    # the engine
    "cache too small": (
        given(rollout_max_tokens=16),
        ("--rollout-max-tokens is 16", "more than the whole cache holds", "Raise it"),
    ),
    "parity": (
        given(logprob_diff_limit=1e-12),
        ("train/train_rollout_logprob_abs_diff is", "--logprob-diff-limit 1e-12", "raise the limit"),
    ),
    # checkpoints
    "load something else": (
        file_in_tmp("notes.txt", "", load="."),
        ("--load is", "holds no training checkpoint", "Give the --save folder"),
    ),
    "load a file": (
        file_in_tmp("notes.txt", "", load="notes.txt"),
        ("--load is", "it is a file", "Give the --save folder"),
    ),
    "no saved rollout": (
        in_tmp(load_debug_rollout_data="{rollout_id}.pt"),
        ("--load-debug-rollout-data is", "0.pt", "no such file", "--save-debug-rollout-data"),
    ),
    "not a saved rollout": (
        file_in_tmp("0.pt", "x", load_debug_rollout_data="{rollout_id}.pt"),
        ("--load-debug-rollout-data is", "not a saved rollout", "--save-debug-rollout-data"),
    ),
}
"""Inputs that are not what the run needs: exit code 1."""

RAISING = {
    "custom_generate_function_path": "raises",
    "dynamic_sampling_filter_path": "raises",
    "rollout_sample_hook_path": "raises",
    "rollout_sample_filter_path": "raises",
    "rollout_all_samples_process_path": "raises",
    "rollout_data_postprocess_path": "raises",
    "rollout_function_path": "raises",
    "custom_reward_post_process_path": "raises",
    "custom_rollout_log_function_path": "raises",
    "buffer_filter_path": "raises",
}
NONSENSE = {
    "custom_generate_function_path": ("nonsense_later", "neither a Sample nor a list"),
    "dynamic_sampling_filter_path": ("nonsense", "neither a bool nor a DynamicFilterOutput"),
    "rollout_sample_hook_path": ("nonsense", "neither a Sample nor None"),
    "custom_reward_post_process_path": ("nonsense", "pair of lists"),
    "rollout_function_path": ("nonsense", "returned 'nonsense', which is no list of groups"),
    "buffer_filter_path": ("nonsense", "list of at most"),
}
REWARDS = {
    "raises": ("e2e_hooks.py:raises is 'exception'", "KeyError: 'missing piece'", "in raises)", "Mend the reward"),
    "nonsense": ("e2e_hooks.py:nonsense is 'invalid'", "not a number", "Mend the reward"),
    "as_dict": ("reward of sample 0 is {'score': 0.0", "not a finite number", "--reward-key"),
}


def complaint(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> str:
    """The error of a run that must fail, checked for its form."""
    assert main(words) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    *_, message = captured.err.strip().splitlines()
    assert message.startswith("lockstep: error: ")
    subject, colon, explanation = message.removeprefix("lockstep: error: ").partition(": ")
    field, is_, value = subject.partition(" is ")
    assert field
    assert bool(is_) == bool(value)
    assert colon
    assert explanation.count(". ") >= 1, f"a reason and a remedy are two sentences: {explanation}"
    assert explanation.endswith((".", "?"))
    return message


def assert_says(message: str, parts: tuple[str, ...]) -> None:
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options_are_explained(workshop, tmp_path, capsys, name):
    prepare, parts = OPTIONS[name]
    words = workshop.train(tmp_path / "run", **prepare(workshop, tmp_path))
    assert_says(complaint(capsys, words, 2), parts)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", INPUTS)
def test_unusable_inputs_are_explained(workshop, tmp_path, capsys, name):
    prepare, parts = INPUTS[name]
    words = workshop.train(tmp_path / "run", **prepare(workshop, tmp_path))
    assert_says(complaint(capsys, words, 1), parts)


@pytest.mark.parametrize("option", RAISING)
def test_a_hook_that_raises_is_named_with_the_line(workshop, tmp_path, capsys, option):
    words = workshop.train(tmp_path, over_sampling_batch_size=5, **{option: hook("raises")})
    message = complaint(capsys, words, 1)
    flag = flags({option: True})[0]
    assert_says(message, (flag, "e2e_hooks.py:raises", "KeyError: 'missing piece'", "in raises)", "Fix the function"))


@pytest.mark.parametrize("option", NONSENSE)
def test_a_hook_that_returns_nonsense_is_named(workshop, tmp_path, capsys, option):
    function, reason = NONSENSE[option]
    words = workshop.train(tmp_path, over_sampling_batch_size=5, **{option: hook(function)})
    assert_says(complaint(capsys, words, 1), (flags({option: True})[0], reason, "eturn"))


@pytest.mark.parametrize("function", REWARDS)
def test_a_reward_that_is_none_ends_the_run_if_the_user_wants_that(workshop, tmp_path, capsys, function):
    words = workshop.train(tmp_path, custom_rm_path=hook(function), reward_failure_policy="stop")
    assert_says(complaint(capsys, words, 1), REWARDS[function])


def test_rewards_that_all_fail_do_not_go_on_for_ever(workshop, tmp_path, capsys):
    words = workshop.train(tmp_path, custom_rm_path=hook("raises"))
    assert_says(
        complaint(capsys, words, 1), ("reward is ", "no reward has worked so far", "missing piece", "Fix the reward")
    )


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["trian"], 2, ("command is 'trian'", "train")),
        (["train", "none.toml"], 2, ("recipe is 'none.toml'", "cannot be read", "Give")),
        (["report", "none"], 1, ("'none'", "no such folder", "--run-dir")),
        (["report", "."], 1, ("'.'", "metrics.jsonl", ".")),
        (["eval", "--hf-checkpoint", "m"], 2, ("--eval-prompt-data: ", "no data set", "pairs")),
    ],
)
def test_other_commands_explain_too(tmp_path, monkeypatch, capsys, words, code, parts):
    monkeypatch.chdir(tmp_path)
    assert_says(complaint(capsys, words, code), parts)


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("[rollout\n", ("recipe is", "not TOML", "Correct")),
        ("[rollout]\nrollout_bach_size = 3\n", ("rollout_bach_size", "rollout_batch_size")),
        ("[data]\nrollout_batch_size = 3\n", ("rollout_batch_size", "[rollout]")),
    ],
)
def test_a_broken_recipe_is_explained(tmp_path, capsys, recipe, parts):
    (tmp_path / "recipe.toml").write_text(recipe)
    assert_says(complaint(capsys, ["train", str(tmp_path / "recipe.toml")], 2), parts)


def test_a_gpu_that_is_not_there_is_explained(workshop, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = complaint(capsys, workshop.train(tmp_path, device="cuda"), 2)
    assert_says(message, ("--device is 'cuda'", "sees no GPU", "--device cpu"))


# Checkpoints


@pytest.fixture(scope="module")
def finished(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint after each."""
    root = tmp_path_factory.mktemp("finished")
    assert main(workshop.train(root, save=root / "checkpoints", save_interval=1)) == 0
    return root


def longer(workshop: Workshop, root: Path, **changes: Any) -> list[str]:
    checkpoints = {"save": root / "checkpoints", "load": root / "checkpoints", "save_interval": 1, "num_rollout": 3}
    return workshop.train(root, **checkpoints | changes)


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k not in names}))

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda f: truncated(f / "state.json"), ("state.json is 'unreadable'", "earlier checkpoint")),
        (lambda f: (f / "state.json").unlink(), ("state.json is 'unreadable'", "No such file", "earlier checkpoint")),
        (without("trainer"), ("state.json is 'damaged'", "'trainer'", "earlier checkpoint")),
        (without("random"), ("state.json is 'damaged'", "'random'", "earlier checkpoint")),
        (lambda f: truncated(f / "__0_0.distcp"), ("is 'unreadable'", "damaged", "earlier checkpoint")),
        (lambda f: (f / "__0_0.distcp").unlink(), ("is 'unreadable'", "damaged", "earlier checkpoint")),
        (lambda f: truncated(f / ".metadata"), ("is 'unreadable'", "damaged", "earlier checkpoint")),
        (lambda f: (f / ".metadata").unlink(), ("is 'unreadable'", "damaged", "earlier checkpoint")),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_goes_on(
    finished, workshop, tmp_path, capsys, change, parts
):
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = read_metrics(root)
    change(root / "checkpoints" / "rollout_0000001")
    earlier = root / "checkpoints" / "rollout_0000000"
    assert_says(complaint(capsys, longer(workshop, root), 1), (*parts, f"--load {earlier}."))
    assert read_metrics(root) == before
    assert len(list_checkpoints(root / "checkpoints")) == 2
    assert main(longer(workshop, root, load=root / "checkpoints" / "rollout_0000000")) == 0
    assert read_metrics(root)[:2] == before
    assert_same_checkpoint(root / "checkpoints" / "rollout_0000001", finished / "checkpoints" / "rollout_0000001")


def test_a_checkpoint_of_another_model_is_refused(finished, workshop, tmp_path, capsys):
    other = write_model(tmp_path / "other", num_hidden_layers=1)
    words = workshop.train(tmp_path / "run", load=finished / "checkpoints", hf_checkpoint=other)
    parts = ("(num_hidden_layers) is 2", "is 1", "Give the --hf-checkpoint that the run began with")
    assert_says(complaint(capsys, words, 1), parts)


def test_a_checkpoint_of_another_type_is_refused(finished, workshop, tmp_path, capsys):
    words = workshop.train(tmp_path / "run", load=finished / "checkpoints", params_dtype="bfloat16")
    parts = ("(params_dtype) is 'float32'", "this run has bfloat16", "Give --params-dtype float32")
    assert_says(complaint(capsys, words, 1), parts)


def test_a_checkpoint_of_other_data_is_refused(finished, workshop, tmp_path, capsys):
    words = workshop.train(tmp_path / "run", load=finished / "checkpoints", prompt_data=workshop.heldout)
    assert_says(complaint(capsys, words, 1), ("number of rows is 8", "64", "Resume with the data"))


def test_an_empty_folder_to_load_starts_afresh(workshop, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert main(workshop.train(tmp_path, load=tmp_path / "checkpoints", num_rollout=1)) == 0
    assert main(workshop.train(tmp_path, load=tmp_path / "missing", num_rollout=1)) == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    assert [row["step"] for row in read_metrics(tmp_path / "earlier-1")] == [0]


# What goes wrong in the middle of a run


def test_an_evaluation_of_no_checkpoint_is_refused(workshop, tmp_path, capsys):
    changes = {"load": tmp_path / "missing", "eval_prompt_data": ["heldout", workshop.heldout]}
    _, *words = workshop.train(tmp_path, **changes)
    assert_says(complaint(capsys, ["eval", *words], 1), ("--load is ", "missing'", "no checkpoint", "Give the --save"))


@pytest.mark.parametrize("shared", ["run_dir", "save"])
def test_two_runs_do_not_write_to_one_folder(workshop, tmp_path, capsys, shared):
    folders = {"run_dir": tmp_path / "run", "save": tmp_path / "checkpoints"}
    flag = flags({shared: True})[0]
    folders[shared].mkdir()
    with only_writer({flag: folders[shared]}):
        message = complaint(capsys, workshop.train(tmp_path, num_rollout=1, **folders), 2)
    assert_says(message, (f"{flag} is ", "another run is writing to it", "a folder of its own"))
    assert main(workshop.train(tmp_path, num_rollout=1, **folders)) == 0


def test_a_row_that_spoils_a_later_rollout_loses_nothing(finished, workshop, tmp_path, capsys):
    """The steps before it are saved, although no checkpoint was due."""
    lines = workshop.data.read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:6], "spoilt", *lines[7:]]))
    words = longer(workshop, tmp_path, prompt_data=tmp_path / "data.jsonl", rollout_shuffle=False, save_interval=None)
    assert_says(complaint(capsys, words, 1), ("data.jsonl:7 is 'spoilt'", "not valid JSON", "Fix the row"))
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == ["rollout_0000001"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    assert main(words) == 0
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


def test_an_evaluation_that_fails_loses_nothing(workshop, tmp_path, capsys):
    """The step before it is saved, and evaluated when the run goes on."""
    (tmp_path / "reward.py").write_text("def reward(args, sample):\n    return float(sample.index) / 0\n")
    evaluation = {"eval_prompt_data": ["heldout", workshop.heldout], "skip_eval_before_train": True, "num_rollout": 1}
    words = longer(workshop, tmp_path, rollout_sample_hook_path=hook("raises_in_evaluation"), **evaluation)
    assert_says(complaint(capsys, words, 1), ("--rollout-sample-hook-path", "ZeroDivisionError", "Fix"))
    assert read_metrics(tmp_path) == []
    assert main(longer(workshop, tmp_path, **evaluation)) == 0
    (row,) = read_metrics(tmp_path)
    assert row["step"] == 0
    assert row["train/step"] == 1
    assert "eval/heldout" in row


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for a checkpoint or two."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("2026-11-22, checkpoints: only root may mount a small disk; the file size limit below needs none")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_full_disk_at_save_keeps_what_was_saved(workshop, small_disk, tmp_path, capsys):
    words = longer(workshop, tmp_path / "run", save=small_disk / "c", load=small_disk / "c", num_rollout=9)
    message = complaint(capsys, words, 1)
    saved = [folder.name for folder in list_checkpoints(small_disk / "c")]
    assert saved == [f"rollout_{number:07d}" for number in range(len(saved))]
    assert 1 <= len(saved) < 9
    assert_says(message, (f"rollout_{len(saved):07d} is 'not written'", "full", "earlier checkpoints are untouched"))
    assert not list(small_disk.rglob("*.incomplete"))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(len(saved) + 1))
    elsewhere = longer(workshop, tmp_path / "run", load=small_disk / "c", num_rollout=len(saved) + 1)
    assert main(elsewhere) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(len(saved) + 1))


def test_a_full_disk_under_the_records_is_explained(workshop, small_disk, capsys):
    (small_disk / "ballast").write_bytes(bytes(590_000))
    message = complaint(capsys, workshop.train(small_disk / "run", num_rollout=50), 1)
    assert_says(message, (str(small_disk / "run"), "No space left on device", "Free space"))


def test_a_file_that_may_not_grow_is_explained_by_the_process_itself(workshop, tmp_path):
    words = longer(workshop, tmp_path, load=None, custom_rm_path=None, rm_type="random")
    done = run(*words, code=1, preexec_fn=limit_file_size)
    *_, message = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert_says(message, ("lockstep: error: ", "rollout_0000000 is 'not written'", "earlier checkpoints are untouched"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    assert not list(tmp_path.rglob("*.incomplete"))


def test_the_process_itself_explains_an_unknown_option(workshop, tmp_path):
    done = run(*workshop.train(tmp_path, rollout_bach_size=4), code=2)
    assert_says(done.stderr, ("lockstep: error: --rollout-bach-size", "--rollout-batch-size"))
    assert "Traceback" not in done.stderr
