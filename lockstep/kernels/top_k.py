"""Which experts score highest for each token.

T tokens, E experts, S slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.kernels.fused import runs_triton


def top_k(scores_TE: Tensor, slots: int) -> Tensor:
    """Ids `[T, S]` of the highest scores, from the highest down.

    Scores from bf16 logits often tie. On a GPU with Triton the lower id wins, however many tokens there are: trainer
    and sampler choose alike. torch leaves ties open.
    """
    if runs_triton(scores_TE) and scores_TE.dtype == torch.float32:
        from lockstep.kernels.top_k_triton import top_k_fused

        return top_k_fused(scores_TE, slots)
    return scores_TE.topk(slots, dim=-1).indices
