"""The arguments of the seed recipes, against the real server's own list."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from real_servers import PYTHON, START_S

from lockstep.config.parsing import parse_options
from lockstep.errors import OptionError, RolloutError
from lockstep.rollout.sglang import ServerProcess, known_flags, require_known, server_words
from lockstep.rollout.sglang.open import _plan
from lockstep.rollout.sglang.process import LocalServers

SIZES = "1 2 4 8 " + " ".join(map(str, range(16, 257, 8)))

SETS = {
    "30B on 8 GPUs": (
        "--actor-num-gpus-per-node 8 --rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.5 "
        f"--sglang-enable-ep-moe --sglang-cuda-graph-bs {SIZES}",
        f"--dtype bfloat16 --mem-fraction-static 0.5 --cuda-graph-bs {SIZES} --ep-size 8 --enable-memory-saver "
        "--tp-size 8",
    ),
    "30B with DP attention": (
        "--actor-num-gpus-per-node 8 --rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.5 "
        "--sglang-ep-size 8 --sglang-enable-dp-attention --sglang-dp-size 8",
        "--dtype bfloat16 --mem-fraction-static 0.5 --ep-size 8 --enable-dp-attention --dp-size 8 "
        "--enable-memory-saver --tp-size 8",
    ),
    "30B on 24 GPUs with redundant experts": (
        "--rollout-num-gpus 24 --rollout-num-gpus-per-engine 24 --sglang-mem-fraction-static 0.5 "
        "--sglang-enable-ep-moe --sglang-enable-dp-attention --sglang-dp-size 3 --sglang-moe-dense-tp-size 1 "
        "--sglang-enable-dp-lm-head --sglang-ep-num-redundant-experts 16",
        "--dtype bfloat16 --mem-fraction-static 0.5 --enable-dp-attention --dp-size 3 --moe-dense-tp-size 1 "
        "--enable-dp-lm-head --ep-num-redundant-experts 16 --ep-size 24 --tp-size 24",
    ),
    "Next with multi-token prediction": (
        "--actor-num-gpus-per-node 8 --rollout-num-gpus-per-engine 8 --sglang-mem-fraction-static 0.8 "
        "--sglang-ep-size 8 --sglang-speculative-algorithm EAGLE --sglang-speculative-num-steps 2 "
        "--sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 3 "
        "--sglang-max-running-requests 512",
        "--dtype bfloat16 --mem-fraction-static 0.8 --ep-size 8 --speculative-algorithm EAGLE "
        "--speculative-num-steps 2 --speculative-eagle-topk 1 --speculative-num-draft-tokens 3 "
        "--max-running-requests 512 --enable-memory-saver --enable-draft-weights-cpu-backup --tp-size 8",
    ),
}
"""Options of a run on GPUs, and the command line that each of its servers gets."""

PARSED = {
    "30B on 8 GPUs": {"ep_size": 8, "tp_size": 8, "mem_fraction_static": 0.5, "enable_memory_saver": True},
    "30B with DP attention": {"enable_dp_attention": True, "dp_size": 8, "ep_size": 8},
    "30B on 24 GPUs with redundant experts": {
        "ep_size": 24,
        "dp_size": 3,
        "moe_dense_tp_size": 1,
        "enable_dp_lm_head": True,
        "ep_num_redundant_experts": 16,
    },
    "Next with multi-token prediction": {
        "speculative_algorithm": "EAGLE",
        "speculative_num_steps": 2,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 3,
        "max_running_requests": 512,
        "enable_draft_weights_cpu_backup": True,
    },
}
"""What SGLang's own parser reads in it."""

PARSE = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
for words in json.load(sys.stdin):
    print("PARSED", json.dumps(vars(parser.parse_args(["--model-path", "m", *words])), default=str))
"""


def words_of(name: str) -> list[str]:
    options = ["--hf-checkpoint", "m", "--rollout-engine", "sglang", "--sglang-python", str(PYTHON)]
    config = parse_options("train", [*options, *SETS[name][0].split()]).config
    shares_gpus = config.cluster.rollout_num_gpus is None
    places = LocalServers(config.cluster.rollout_num_gpus_per_engine, 0)
    return _plan(config, places, returns_routes=False, releases_memory=shares_gpus).words


@pytest.mark.parametrize("name", SETS)
def test_options_of_a_seed_recipe_become_this_command_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert words_of(name) == SETS[name][1].split()
    renamed = "--sglang-enable-ep-moe is gone from SGLang; it is read as --sglang-ep-size"
    assert (renamed in caplog.text) == ("enable-ep-moe" in SETS[name][0])


def test_the_installed_server_reads_these_command_lines_as_they_are_meant() -> None:
    done = subprocess.run(
        [str(PYTHON), "-c", PARSE],
        input=json.dumps([words_of(name) for name in SETS]),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    lines = [line.removeprefix("PARSED ") for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    for name, line in zip(SETS, lines, strict=True):
        parsed = json.loads(line)
        assert {key: parsed[key] for key in PARSED[name]} == PARSED[name]
    sizes = [int(size) for size in SIZES.split()]
    assert sizes in json.loads(lines[0]).values()


def test_it_has_no_argument_that_is_misspelt() -> None:
    with pytest.raises(OptionError, match="Did you mean --sglang-mem-fraction-static"):
        require_known(server_words({"mem_fraction_statik": 0.7}, tp_size=1), known_flags(str(PYTHON)))


def test_a_python_without_sglang_is_refused() -> None:
    with pytest.raises(OptionError, match="--sglang-python is '/bin/true'"):
        known_flags("/bin/true")


def test_a_server_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    server = ServerProcess(
        str(PYTHON),
        ["--no-such-argument"],
        model=tmp_path,
        version="0",
        environment=os.environ,
        log=tmp_path / "logs" / "server-0.log",
    )
    with pytest.raises(RolloutError) as caught:
        server.wait_until_ready(START_S)
    server.close()
    assert "it ended with exit code 2" in caught.value.reason
    assert "unrecognized arguments: --no-such-argument" in caught.value.reason
    assert caught.value.remedy == f"All of them are in {tmp_path / 'logs' / 'server-0.log'}."
