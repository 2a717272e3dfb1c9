from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from lockstep.data.sample_json import sample_from_json, sample_to_json
from lockstep.errors import DataError
from lockstep.types import Sample


def through_json(sample: Sample) -> Sample:
    return sample_from_json(json.loads(json.dumps(sample_to_json(sample))))


def test_a_partial_sample_survives_json_exactly():
    experts = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    sample = Sample(
        index=3,
        prompt=[{"role": "user", "content": "é"}],
        tokens=[1, 2, 3, 4, 5],
        response="ab",
        response_length=2,
        rollout_log_probs=[-0.1, -1e-17],
        reward={"score": 1.0, "parts": (1, (2.5, None))},
        rollout_routed_experts=experts,
        status=Sample.Status.ABORTED,
        metadata={"raw": b"\x00\xff", "by_step": {1: "a", (2, 3): [np.float32(0.1)]}, "$tuple": [1]},
        train_metadata={"list": [(1, 2), [3]], "flag": True},
    )
    again = through_json(sample)
    assert again.rollout_routed_experts.dtype == np.uint8
    np.testing.assert_array_equal(again.rollout_routed_experts, experts)
    again.rollout_routed_experts[0, 0, 0] = 9  # writable, as it was
    without = {"rollout_routed_experts": None}
    assert dataclasses.replace(again, **without) == dataclasses.replace(sample, **without)
    assert type(again.metadata["by_step"][2, 3][0]) is np.float32
    assert again.reward["parts"] == (1, (2.5, None))


def test_not_a_number_and_infinity_survive():
    again = through_json(Sample(rollout_log_probs=[float("nan"), float("-inf")]))
    assert math.isnan(again.rollout_log_probs[0])
    assert again.rollout_log_probs[1] == float("-inf")


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()])], ids=["object", "set", "object-array"])
def test_a_value_that_json_cannot_hold_is_named(value):
    with pytest.raises(DataError, match=r"sample\.metadata\.tool\.state is"):
        sample_to_json(Sample(metadata={"tool": {"state": value}}))
