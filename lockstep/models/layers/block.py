"""One layer of a decoder: mix over tokens, then feed forward, each pre-normed and added to the residual stream.

T packed tokens, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lockstep.models.config import ModelConfig
from lockstep.models.layers.mixer import TokenMixer
from lockstep.models.layers.mlp import GatedMLP
from lockstep.models.layers.moe import ChooseExperts, MoE
from lockstep.models.layers.norm import RMSNorm


class Block(nn.Module, ABC):
    """A family adds its way of mixing, under HF's name for it, and says in `mix` how it is called."""

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        *,
        norm: type[RMSNorm],
        shared_expert_size: int = 0,
    ) -> None:
        super().__init__()
        self.moe_index = sum(config.is_sparse(layer) for layer in range(layer_index))
        self.mlp: MoE | GatedMLP
        if config.is_sparse(layer_index):
            self.mlp = MoE(
                config.hidden_size,
                config.moe_intermediate_size,
                config.num_experts,
                config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
                shared_expert_size=shared_expert_size,
            )
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)

    @abstractmethod
    def mix(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mixer: TokenMixer) -> Tensor:
        """What the normed rows learn from each other, `[T, D]`."""

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], mixer: TokenMixer, choose_experts: ChooseExperts
    ) -> Tensor:
        stream_TD, update_TD = self.update(x_TD, None, rotary, mixer, choose_experts)
        return stream_TD + update_TD

    def update(
        self,
        x_TD: Tensor,
        pending_TD: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mixer: TokenMixer,
        choose_experts: ChooseExperts,
    ) -> tuple[Tensor, Tensor]:
        """The stream, and what this block adds to it last, which the next norm may do in passing.

        Args:
            pending_TD: what the block before wants added; None when nothing.
        """
        x_TD, normed_TD = self.input_layernorm.with_residual(x_TD, pending_TD)
        x_TD, normed_TD = self.post_attention_layernorm.with_residual(x_TD, self.mix(normed_TD, rotary, mixer))
        if isinstance(self.mlp, MoE):
            mixed_TD: Tensor = self.mlp(normed_TD, self.moe_index, choose_experts)
        else:
            mixed_TD = self.mlp(normed_TD)
        return x_TD, mixed_TD
