"""Layers whose rows do not depend on each other, to the last bit, in place of those of a model.

T packed tokens, D model width, I width of a feed-forward layer, E experts, S slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lockstep.errors import OptionError
from lockstep.kernels.attention import has_own_kernel
from lockstep.kernels.fixed_experts import fixed_experts, sum_in_order
from lockstep.kernels.fixed_product import fixed_product
from lockstep.kernels.fixed_swiglu import fixed_swiglu
from lockstep.models import LanguageModel, ModelConfig, Qwen3NextConfig
from lockstep.models.layers.mlp import GatedMLP
from lockstep.models.layers.moe import ChooseExperts, Experts, MoE, Router


class ExactLinear(nn.Linear):
    """Through tiles of one shape."""

    def forward(self, x_TD: Tensor) -> Tensor:
        product = fixed_product(x_TD, self.weight)
        return product if self.bias is None else product + self.bias


class ExactMLP(GatedMLP):
    """With an activation that does not depend on a number's place in memory."""

    def activate(self, x_TD: Tensor) -> Tensor:
        return fixed_swiglu(self.gate_proj(x_TD), self.up_proj(x_TD))


class ExactRouter(Router):
    """Through tiles of one shape."""

    def logits(self, x_TD: Tensor) -> Tensor:
        return fixed_product(x_TD, self.weight)


class ExactMoE(MoE):
    """Routes in sampling by the operations that training routes by."""

    def _route(self, x_TD: Tensor, moe_index: int, choose_experts: ChooseExperts) -> tuple[Tensor, Tensor]:
        probs_TE = self.gate(x_TD)
        experts_TS = choose_experts(moe_index, probs_TE, self.top_k)
        weights_TS = probs_TE.gather(-1, experts_TS)
        if self.norm_topk_prob:
            weights_TS = weights_TS / sum_in_order(weights_TS.unsqueeze(-1))
        return experts_TS, weights_TS.to(x_TD.dtype)


_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: ExactLinear,
    GatedMLP: ExactMLP,
    Router: ExactRouter,
    MoE: ExactMoE,
}


def compute_exactly(model: LanguageModel) -> None:
    """Let every layer give a row bits that do not depend on the other rows, in place; parameters stay as they are.

    Norms, rotary tables, residuals, softmax and top-k do so anyway.

    Raises:
        OptionError: see `require_exactness`.
    """
    require_exactness(model.config, model.lm_head.weight.device, model.lm_head.weight.dtype)
    for module in model.modules():
        if isinstance(module, Experts):
            module.compute = fixed_experts
        elif type(module) in _EXACT:
            module.__class__ = _EXACT[type(module)]


def require_exactness(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse models and devices that `compute_exactly` has no layers for.

    Raises:
        OptionError: naming what works.
    """
    if isinstance(config, Qwen3NextConfig):
        raise _refusal(
            "Qwen3-Next's delta layers are computed in chunks in training and token by token in sampling, which add "
            "up in different orders.",
            "Leave it out for this model, or train a Qwen3 or Qwen3-MoE.",
        )
    if device.type == "cpu":
        return
    if not has_own_kernel(torch.empty(1, 1, config.head_dim, device=device, dtype=dtype)):
        raise _refusal(
            "on a GPU attention has one order for --params-dtype bfloat16, heads of 64, 128 or 256, and a Hopper GPU "
            f"with Triton; here are {str(dtype).removeprefix('torch.')} and heads of {config.head_dim}.",
            "Use these, or leave it out.",
        )
    if config.num_sparse_layers and (config.hidden_size % 8 or config.moe_intermediate_size % 8):
        raise _refusal(
            f"torch's grouped products, for gradients of experts, want widths that 8 divides, and here are "
            f"{config.hidden_size} and {config.moe_intermediate_size}.",
            "Leave it out for this model.",
        )


def _refusal(reason: str, remedy: str) -> OptionError:
    return OptionError("--true-on-policy", True, reason, remedy)


def is_exact(model: LanguageModel) -> bool:
    """Whether `compute_exactly` was here."""
    return isinstance(model.lm_head, ExactLinear)
