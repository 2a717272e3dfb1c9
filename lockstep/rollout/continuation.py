"""Responses that new weights have interrupted: what is still to be asked for, and how the parts become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lockstep.rollout.engine import Generation, SamplingParams


def remaining(
    input_ids: Sequence[int], params: SamplingParams, written: Generation
) -> tuple[Sequence[int], SamplingParams]:
    """The request for what is still to be written."""
    done = len(written.token_ids)
    return [*input_ids, *written.token_ids], replace(
        params,
        max_new_tokens=params.max_new_tokens - done,
        min_new_tokens=max(0, params.min_new_tokens - done),
        continued_tokens=params.continued_tokens + done,
    )


def joined(first: Generation, then: Generation) -> Generation:
    """A response that went on after `first`. Every token keeps what it was sampled with.

    The experts of `first` cover all but its last token, which was read first when `then` was sampled.
    """
    if not first.token_ids:
        return then
    routes = first.routed_experts
    if then.routed_experts is not None:
        routes = then.routed_experts if routes is None else np.concatenate([routes, then.routed_experts[len(routes) :]])
    kept_ids, kept_offsets = first.kept_token_ids, first.kept_token_offsets
    if kept_ids is not None and kept_offsets is not None and then.token_ids:
        assert then.kept_token_ids is not None, "both parts were sampled alike"
        assert then.kept_token_offsets is not None, "both parts were sampled alike"
        kept_offsets = kept_offsets + [kept_offsets[-1] + offset for offset in then.kept_token_offsets[1:]]
        kept_ids = kept_ids + then.kept_token_ids
    return replace(
        then,
        token_ids=first.token_ids + then.token_ids,
        log_probs=first.log_probs + then.log_probs,
        weight_versions=first.weight_versions + then.weight_versions,
        kept_token_ids=kept_ids,
        kept_token_offsets=kept_offsets,
        routed_experts=routes,
        cached_tokens=first.cached_tokens,
    )
