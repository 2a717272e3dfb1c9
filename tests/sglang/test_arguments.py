"""The arguments of the seed recipes, against the real server's own list."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from real_servers import PYTHON

from lockstep.errors import OptionError, RolloutError
from lockstep.rollout.sglang import ServerProcess, known_flags, require_known, server_words

SEEDS = {
    "mem_fraction_static": 0.7,
    "ep_size": 8,
    "enable_dp_attention": True,
    "dp_size": 8,
    "cuda_graph_bs": [1, 2, 4, 8, *range(16, 257, 8)],
    "moe_dense_tp_size": 1,
    "enable_dp_lm_head": True,
    "ep_num_redundant_experts": 16,
    "max_running_requests": 256,
    "speculative_algorithm": "EAGLE",
    "speculative_num_steps": 3,
    "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 4,
}


def test_the_installed_server_has_every_argument_of_the_seed_recipes() -> None:
    require_known(server_words(SEEDS | {"enable_ep_moe": True}, tp_size=8), known_flags(str(PYTHON)))


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
        server.wait_until_ready(120)
    server.close()
    assert "it ended with exit code 2" in caught.value.reason
    assert "unrecognized arguments: --no-such-argument" in caught.value.reason
    assert caught.value.remedy == f"All of them are in {tmp_path / 'logs' / 'server-0.log'}."
