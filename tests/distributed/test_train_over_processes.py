"""`lockstep train` over two processes is `lockstep train` over one."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_runs import (
    Workshop,
    assert_nobody_lives,
    checkpoint_tensors,
    finish,
    flags,
    hook,
    make_workshop,
    read_metrics,
    run,
    start,
    write_model,
)
from safetensors.torch import load_file
from tiny_models import dense_config, hf_model
from transformers.utils import logging

from lockstep.cli import main

NUM_ROLLOUT = 3
TWO = {"actor_num_gpus_per_node": 2}
EP, TP, CP, PP = (
    {**TWO, f"{kind}_parallel_size": 2} for kind in ("expert_model", "tensor_model", "context", "pipeline_model")
)
TOLERANCE = 1e-5
"""Sums over ranks are in another order than one process's: fp32 rounding of numbers up to 10, over 6 updates."""
OWN = ("rollout/avg_cached_tokens", "rollout/prefix_cache_hit_rate")
"""Metrics that depend on the number of engines: each prompt's prefix is computed once in each."""


def options(root: Path, **changes: Any) -> dict[str, Any]:
    """Several steps a rollout off policy, a moving reference, routes replayed, evaluation, a text that stops."""
    return {
        "save": root / "checkpoints",
        "load": root / "checkpoints",
        "save_interval": 1,
        "save_hf": root / "hf",
        "num_rollout": NUM_ROLLOUT,
        "num_steps_per_rollout": 2,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 160,
        "custom_generate_function_path": hook("two_turns"),
        "rollout_stop": "7",
        "use_kl_loss": True,
        "kl_loss_coef": 0.1,
        "ref_update_interval": 2,
        "eps_clip": 0.01,
        "adam_eps": 1e-3,  # with the usual 1e-8, a gradient that is 0 but for rounding becomes a whole step of any sign
        "use_rollout_routing_replay": True,
        "lr_decay_style": "linear",
        "lr_decay_iters": 8,  # of 6 steps
        "logprob_diff_limit": 1e-4,  # parity of sampler and trainer, in every step of every run that samples
    } | changes


def trained(workshop: Workshop, root: Path, **changes: Any) -> Path:
    words = workshop.train(root, **options(root, **changes))
    run(*words, *flags({"eval_prompt_data": ["heldout", workshop.heldout]} if "eval_interval" in changes else {}))
    return root


def stored(root: Path) -> dict[str, Path]:
    """The rollouts of the first run."""
    return {"load_debug_rollout_data": root / "one" / "rollout_{rollout_id}.pt"}


def resumed(workshop: Workshop, root: Path, one: Path) -> Path:
    """A run whose first step one process takes, the second two that share all matrices, and the third one again."""
    shutil.copytree(one / "checkpoints" / "rollout_0000000", root / "checkpoints" / "rollout_0000000")
    trained(workshop, root, num_rollout=2, eval_interval=1, **TP, expert_tensor_parallel_size=2)
    return trained(workshop, root, num_rollout=3, eval_interval=1)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def dense(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The workshop with a dense model of tied embeddings: its ranks decode each on their own."""
    folder = write_model(tmp_path_factory.mktemp("dense") / "model")
    ours = json.loads((folder / "config.json").read_text())
    same = {name: ours[name] for name in ("vocab_size", "max_position_embeddings", "eos_token_id")}
    config = dense_config(0, **same, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    logging.disable_progress_bar()
    hf_model(config).save_pretrained(folder)
    return Workshop(workshop.root, folder, workshop.data, workshop.heldout)


@pytest.fixture(scope="module")
def runs(workshop: Workshop, dense: Workshop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Path]]:
    """All runs of this file, two at a time; the first goes before the others, which need what it writes."""
    root = tmp_path_factory.mktemp("runs")
    one = root / "one"
    trained(workshop, one, save_debug_rollout_data=one / "rollout_{rollout_id}.pt", eval_interval=1)
    supervised = {"loss_type": "sft_loss", "num_rollout": 2, "custom_generate_function_path": None}
    supervised |= dict.fromkeys(("use_kl_loss", "kl_loss_coef", "ref_update_interval", "use_rollout_routing_replay"))
    sampled = {"num_rollout": 2, "use_rollout_routing_replay": None}
    on_two = {"backward_order": "layer", "custom_generate_function_path": hook("two_turns_where_ranks_can_meet")} | EP
    with ThreadPoolExecutor(2) as pool:
        futures = {
            "sampled": pool.submit(trained, workshop, root / "sampled", eval_interval=1, **on_two),
            "resumed": pool.submit(resumed, workshop, root / "resumed", one),
            "cp": pool.submit(trained, workshop, root / "cp", **CP, **stored(root)),
            "pp": pool.submit(trained, workshop, root / "pp", **PP, **stored(root)),
            "dense": pool.submit(trained, dense, root / "dense", **sampled),
            "dense tp": pool.submit(trained, dense, root / "dense-tp", **sampled, **TP),
            "sft": pool.submit(trained, dense, root / "sft", **supervised),
            "sft pp": pool.submit(trained, dense, root / "sft-pp", **supervised, **PP),
        }
    futures["one"] = Future()
    futures["one"].set_result(one)
    return futures


def assert_same_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]], *, of: tuple[str, ...]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        names = [name for name in wanted if name.startswith(of) and not name.startswith(OWN)]
        assert [name for name in row if name.startswith(of) and not name.startswith(OWN)] == names
        differing = {name: (row[name], wanted[name]) for name in names if not close(row[name], wanted[name])}
        assert not differing, f"step {row['step']}"


def close(found: float, wanted: float) -> bool:
    return abs(found - wanted) <= TOLERANCE * max(1.0, abs(wanted))


def assert_close_checkpoint(folder: Path, expected: Path, *, replays: bool = False) -> None:
    ours, theirs = (json.loads((path / "state.json").read_text()) for path in (folder, expected))
    its_own = {"kv_tokens", "num_ranks"} | ({"data_source"} if replays else set())
    assert {name for name in theirs if ours[name] != theirs[name]} <= its_own
    tensors, others = checkpoint_tensors(folder), checkpoint_tensors(expected)
    assert tensors.keys() == others.keys()
    worst = {name: float((tensor.double() - others[name].double()).abs().max()) for name, tensor in tensors.items()}
    assert max(worst.values()) <= TOLERANCE, max(worst.items(), key=lambda item: item[1])


LAST = f"checkpoints/rollout_{NUM_ROLLOUT - 1:07d}"


def test_the_runs_are_ones_that_processes_could_get_wrong(runs: dict[str, Future[Path]]) -> None:
    rows = read_metrics(runs["one"].result())
    assert all(row["train/pg_clipfrac"] > 0 and row["train/kl_loss"] != 0 for row in rows[1:])
    assert [row["step"] for row in rows if "eval/heldout" in row] == [-1, 0, 1, 2]
    assert all(row["rollout/prefix_cache_hit_rate"] > 0.3 for row in rows[1:])


@pytest.mark.parametrize("name", ["sampled", "resumed"])
def test_two_processes_sample_and_train_as_one_does(runs: dict[str, Future[Path]], name: str) -> None:
    """The same tokens from equal weights and equal random streams, whichever rank draws them."""
    one, two = runs["one"].result(), runs[name].result()
    expected = read_metrics(one)
    found = read_metrics(two)
    kinds = ("train/", "rollout/", "eval/")
    assert_same_metrics(found, expected[-len(found) :], of=kinds)
    assert_close_checkpoint(two / LAST, one / LAST)


@pytest.mark.parametrize(("name", "of_one"), [("cp", "one"), ("pp", "one"), ("dense tp", "dense"), ("sft pp", "sft")])
def test_two_processes_train_as_one_does(runs: dict[str, Future[Path]], name: str, of_one: str) -> None:
    """On stored rollouts, on their own samples, and on texts."""
    one, two = runs[of_one].result(), runs[name].result()
    expected = [row for row in read_metrics(one) if row["step"] >= 0]
    assert_same_metrics(read_metrics(two), expected, of=("train/",))
    last = f"checkpoints/rollout_{expected[-1]['step']:07d}"
    assert_close_checkpoint(two / last, one / last, replays=of_one == "one")


@pytest.mark.parametrize(
    ("name", "of_one"), [("sampled", "one"), ("resumed", "one"), ("cp", "one"), ("pp", "one"), ("sft pp", "sft")]
)
def test_every_layout_exports_the_whole_model(runs: dict[str, Future[Path]], name: str, of_one: str) -> None:
    ours, expected = (load_file(runs[run].result() / "hf" / "model.safetensors") for run in (name, of_one))
    assert ours.keys() == expected.keys()
    assert max(float((ours[name] - expected[name]).abs().max()) for name in expected) <= TOLERANCE


def test_a_killed_rank_is_named_and_takes_the_run_down(workshop: Workshop, tmp_path: Path) -> None:
    process = start(*workshop.train(tmp_path, num_rollout=1000, **TWO), env={"E2E_TOKEN": str(tmp_path)})
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(process.pid).children() if "lockstep.cluster.worker" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    done = finish(process, timeout=40)  # seconds, on a busy machine
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("lockstep: error:")]
    assert "rank 1 is 'killed by SIGKILL': it was told to `" in error
    assert "look at dmesg" in error
    assert_nobody_lives(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "flag", "says"),
    [
        ({"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size", "does not divide the 2 ranks"),
        ({"expert_model_parallel_size": 3}, "--expert-model-parallel-size", "The nearest possible layout is"),
        ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size", "--rollout-engine sglang"),
        (
            {"backward_order": "layer", "pipeline_model_parallel_size": 2, "load_debug_rollout_data": "none.pt"},
            "--backward-order",
            "Use --pipeline-model-parallel-size 1",
        ),
        ({"backward_order": "layer", "grad_reduce_in_bf16": True}, "--grad-reduce-in-bf16", "only once a step"),
    ],
)
def test_an_impossible_layout_is_refused_before_anything_starts(
    workshop: Workshop,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    flag: str,
    says: str,
) -> None:
    children = set(psutil.Process().children(recursive=True))
    assert main(workshop.train(tmp_path, device="cpu", **TWO, **changes)) == 2
    error = capsys.readouterr().err
    assert f"lockstep: error: {flag} is " in error
    assert says in error
    assert set(psutil.Process().children(recursive=True)) == children
