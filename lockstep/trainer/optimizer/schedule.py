"""Megatron's learning-rate schedules."""

from __future__ import annotations

import math

from lockstep.config import OptimizerOptions


def learning_rate(options: OptimizerOptions, step: int, *, num_steps: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine decay to min_lr.

    Source: Megatron-LM's OptimizerParamScheduler; there step 0 of a warm-up runs at rate 0, here at lr / warm-up.
    """
    decay_steps = options.lr_decay_iters or num_steps
    warmup = options.lr_warmup_iters
    if options.lr_warmup_fraction is not None:
        warmup = int(options.lr_warmup_fraction * decay_steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.lr_decay_style == "constant":
        return options.lr
    progress = min(1.0, (step - warmup) / max(1, decay_steps - warmup))
    remaining = 1.0 - progress if options.lr_decay_style == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.min_lr + (options.lr - options.min_lr) * remaining
