from __future__ import annotations

import math
from typing import Any

import pytest

from lockstep.config import OptimizerOptions
from lockstep.trainer.optimizer import learning_rate

SCHEDULES = [
    ({"lr_decay_style": "constant"}, [1.0] * 8),
    ({"lr_decay_style": "constant", "lr_warmup_iters": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ({"lr_decay_style": "linear"}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ({"lr_decay_style": "linear", "min_lr": 0.2, "lr_decay_iters": 4}, [1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2]),
    ({"lr_decay_style": "linear", "lr_warmup_fraction": 0.5}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
    (
        {"lr_decay_style": "cosine", "min_lr": 0.5, "lr_warmup_iters": 2, "lr_decay_iters": 6},
        [0.5, 1, 1, 0.75 + 0.25 * math.cos(math.pi / 4), 0.75, 0.75 - 0.25 * math.cos(math.pi / 4), 0.5, 0.5],
    ),
]


@pytest.mark.parametrize(("options", "wanted"), SCHEDULES, ids=str)
def test_the_rate_warms_up_and_falls_as_worked_out_by_hand(options: dict[str, Any], wanted: list[float]) -> None:
    schedule = OptimizerOptions(lr=1.0, **options)
    assert [learning_rate(schedule, step, num_steps=8) for step in range(8)] == pytest.approx(wanted)
