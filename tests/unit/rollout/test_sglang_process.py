"""What a server inherits from the process that starts it."""

from __future__ import annotations

import pytest

from lockstep.rollout.sglang.process import server_environment


@pytest.mark.parametrize(("trainings", "servers"), [({}, "-2"), ({"NCCL_CUMEM_ENABLE": "0"}, "0")])
def test_a_server_shares_memory_over_nccl_as_training_does(trainings: dict[str, str], servers: str) -> None:
    """-2 is what NCCL does by itself; SGLang, finding nothing, would turn it off for its side alone."""
    assert server_environment(trainings, None)["NCCL_CUMEM_ENABLE"] == servers


def test_a_server_gets_its_own_of_the_gpus_that_training_sees_and_none_of_its_memory_settings() -> None:
    given = {"CUDA_VISIBLE_DEVICES": "3,0,2", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HOME": "/root"}
    own = server_environment(given, range(1, 3))
    assert own["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert own["HOME"] == "/root"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in own
