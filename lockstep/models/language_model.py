"""What every family is: an embedding, blocks, a norm, a projection to the vocabulary.

T packed tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from lockstep.models.config import ModelConfig
from lockstep.models.layers.embedding import Embedding
from lockstep.models.layers.mixer import TokenMixer
from lockstep.models.layers.moe import ChooseExperts, top_k_experts
from lockstep.models.layers.norm import RMSNorm
from lockstep.models.layers.rotary import rotary_tables

RunLayer = Callable[..., Tensor]
"""Calls a block with its arguments; the trainer passes one that recomputes activations."""


def run_layer(block: nn.Module, *arguments: Any) -> Tensor:
    output: Tensor = block(*arguments)
    return output


class Decoder(nn.Module):
    """Embedding, blocks and final norm: HF's `model.` prefix."""

    def __init__(self, config: ModelConfig, block_class: type[Any], norm_class: type[RMSNorm]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): block_class(config, i) for i in range(config.num_hidden_layers)})
        self.norm = norm_class(config.hidden_size, config.rms_norm_eps)


class LanguageModel(nn.Module):
    """A family's model. `forward` stops at the last hidden states: the vocabulary is projected by a fused kernel."""

    config_class: ClassVar[type[ModelConfig]]
    block_class: ClassVar[type[Any]]
    """A `Block` made from the family's config and the layer's index."""
    norm_class: ClassVar[type[RMSNorm]]
    carried_prefixes: ClassVar[tuple[str, ...]] = ()
    """Names of HF tensors that nothing here computes with; loading passes over them, export copies them unchanged."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.block_class, self.norm_class)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the projection the embedding again where the config says so (after materialising from meta)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def rotary(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """The tables that every block takes: see `rotary_tables`."""
        return rotary_tables(positions_T, self.config.rope, next(self.parameters()).dtype)

    def forward(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        mixer: TokenMixer,
        choose_experts: ChooseExperts = top_k_experts,
        run_layer: RunLayer = run_layer,
    ) -> Tensor:
        """Hidden states `[T, D]` after the final norm; row t predicts token t + 1 of its document."""
        x_TD = self.model.embed_tokens(input_ids_T)
        rotary = self.rotary(positions_T)
        for block in self.model.layers.values():
            x_TD = run_layer(block, x_TD, rotary, mixer, choose_experts)
        hidden_TD: Tensor = self.model.norm(x_TD)
        return hidden_TD
