"""What every trained token weighs in the loss, settled once over the global batch.

A micro-batch's loss is the plain sum of its tokens' weighted losses, and the global loss is the plain sum over
micro-batches: how the batch is split, ordered, packed or spread over ranks cannot change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from torch import Tensor


def sample_loss_weights(
    num_loss_tokens: Sequence[int],
    rollout_ids: Sequence[Hashable],
    *,
    removed: Sequence[bool] | None = None,
    calculate_per_token_loss: bool = False,
) -> list[float]:
    """Weight of one trained token of each sample of the global batch.

    By default the loss is the mean over a rollout's trained tokens, then the mean over rollouts. Samples that share a
    `rollout_id` (the turns or branches of one episode) share one mean. With `calculate_per_token_loss` it is the mean
    over all trained tokens.

    Args:
        num_loss_tokens: trained tokens of each sample (the sum of its loss mask), over the whole global batch.
        removed: samples with `remove_sample`: they weigh 0 and their tokens are in no denominator, but their rollout
            is still counted, so that removing one leaves the weight of the others unchanged.
    Source: slime's `rollout_mask_sums`; a rollout without a trained token divides by 1 there too.
    """
    if not len(num_loss_tokens) == len(rollout_ids) == len(removed if removed is not None else rollout_ids):
        raise ValueError(
            f"{len(num_loss_tokens)} token counts, {len(rollout_ids)} rollout ids and "
            f"{len(removed) if removed is not None else 'no'} removal marks: give one of each per sample."
        )
    removed = removed if removed is not None else [False] * len(rollout_ids)
    counts = [0 if is_removed else count for count, is_removed in zip(num_loss_tokens, removed, strict=True)]
    tokens_of_rollout: Counter[Hashable] = Counter()
    for rollout_id, count in zip(rollout_ids, counts, strict=True):
        tokens_of_rollout[rollout_id] += count
    if calculate_per_token_loss:
        per_rollout = dict.fromkeys(tokens_of_rollout, 1.0 / max(1, sum(counts)))
    else:
        per_rollout = {key: 1.0 / (max(1, n) * len(tokens_of_rollout)) for key, n in tokens_of_rollout.items()}
    return [
        0.0 if is_removed else per_rollout[rollout_id]
        for rollout_id, is_removed in zip(rollout_ids, removed, strict=True)
    ]


def token_loss_weights(sample_weights: Tensor, sample_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Weight of every prediction of a micro-batch: its sample's weight where the mask is on, else 0.

    Shapes: sample_weights is [S], the samples of this micro-batch; sample_ids, loss_mask and the result are [R].
    """
    return sample_weights[sample_ids] * loss_mask
