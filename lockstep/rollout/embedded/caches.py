"""What the sampler remembers of each sequence, and how a pass of the model reads and extends it.

T new tokens of a pass, B sequences, Q new tokens per sequence (padded), L context (padded), N query heads, K key/value
heads, H head dim; of the delta rule: V value heads, J value head dim, C channels, P earlier inputs of its convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from lockstep.errors import RolloutError
from lockstep.kernels.address_range import NoPagesLeft, tensors_in_range
from lockstep.kernels.causal_conv import causal_conv, causal_conv_step
from lockstep.kernels.gated_delta_rule import gated_delta_rule, gated_delta_step
from lockstep.kernels.packed import PackedDocuments
from lockstep.kernels.paged_attention import paged_attention
from lockstep.models import LanguageModel, ModelConfig, Qwen3NextConfig
from lockstep.rollout.embedded.block_manager import num_snapshots
from lockstep.rollout.embedded.sequence import Sequence


class Caches:
    """Keys and values in blocks, `kv` [attention layers, 2, K, blocks, block size, H]; of delta layers one slot for
    each running sequence: `conv` [delta layers, slots, C, P] and `delta` [delta layers, slots, V, H, J] in fp32."""

    def __init__(self, model: LanguageModel, *, num_blocks: int, block_size: int, num_state_slots: int) -> None:
        config, weight = model.config, model.lm_head.weight
        self.block_size = block_size
        conv_shape, delta_shape = state_shapes(config)
        slots = (config.num_delta_layers, num_state_slots if config.num_delta_layers else 0)
        kv_shape = (config.num_attention_layers, 2, config.num_key_value_heads, num_blocks, block_size, config.head_dim)
        shapes = [
            (kv_shape, weight.dtype),
            ((*slots, *conv_shape), weight.dtype),
            ((*slots, *delta_shape), torch.float32),
        ]
        with _enough_memory():
            self.memory, (self.kv, self.conv, self.delta) = tensors_in_range(shapes, weight.device)

    def hold(self) -> None:
        """Have memory, if that was given back; what was in it is lost."""
        with _enough_memory():
            self.memory.hold()

    def copy_states(self, sources: list[int], targets: list[int]) -> None:
        """Copy states of sequences between slots; no slot may be in both lists."""
        if sources:
            source_ids, target_ids = (torch.tensor(ids, device=self.kv.device) for ids in (sources, targets))
            for pool in (self.conv, self.delta):
                pool.index_copy_(1, target_ids, pool[:, source_ids])


@contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except NoPagesLeft as error:
        raise RolloutError(
            "--sglang-mem-fraction-static",
            f"{error.wanted / 2**30:.1f} GiB of caches",
            f"the GPU has {error.left / 2**30:.1f} GiB left beside the weights and the optimizer.",
            "Lower it, or --rollout-max-tokens.",
        ) from error


def state_shapes(config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one delta layer's state for one sequence: of the convolution [C, P], of the rule [V, H, J]."""
    if not isinstance(config, Qwen3NextConfig):
        return (0, 0), (0, 0, 0)
    return (config.conv_channels, config.linear_conv_kernel_dim - 1), (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )


def bytes_per_token(config: ModelConfig, element_size: int) -> int:
    """Of the keys and values of all layers."""
    return 2 * config.num_attention_layers * config.num_key_value_heads * config.head_dim * element_size


def bytes_per_sequence(config: ModelConfig, element_size: int) -> int:
    """Of the states of all delta layers."""
    conv, delta = (int(np.prod(shape)) for shape in state_shapes(config))
    return config.num_delta_layers * (conv * element_size + delta * 4)


def bytes_of_states(config: ModelConfig, element_size: int, max_running: int) -> int:
    """Of all slots that so many running sequences need, those for states that are kept for sharing included."""
    num_slots = max_running + num_snapshots(max_running) + 1
    return num_slots * bytes_per_sequence(config, element_size)


class PackedStates(ABC):
    """The delta layers' half of a `TokenMixer` over packed tokens: from the states in the slots to those after them."""

    caches: Caches
    packed: PackedDocuments
    state_slots: Tensor

    def convolve(self, delta_index: int, x_TC: Tensor, weight_CW: Tensor) -> Tensor:
        pool = self.caches.conv[delta_index]
        out_TC, state = causal_conv(x_TC, weight_CW, self.packed.delta_layout, self._earlier(pool))
        pool.index_copy_(0, self.state_slots, state)
        return out_TC

    def delta_rule(
        self, delta_index: int, q_TKH: Tensor, k_TKH: Tensor, v_TVJ: Tensor, log_decay_TV: Tensor, beta_TV: Tensor
    ) -> Tensor:
        pool = self.caches.delta[delta_index]
        inputs = (q_TKH, k_TKH, v_TVJ, log_decay_TV, beta_TV)
        out_TVJ, state = gated_delta_rule(*inputs, self.packed.delta_layout, self._earlier(pool))
        pool.index_copy_(0, self.state_slots, state)
        return out_TVJ

    @abstractmethod
    def _earlier(self, pool: Tensor) -> Tensor | None:
        """States to go on from; None where all sequences are fresh."""


class CachedDocuments(PackedStates):
    """`TokenMixer` over the uncomputed tokens of some sequences; index tables are built once for all layers.

    New keys and values are stored before attention reads, so sequences of one pass may share prefix blocks that one of
    them is just filling.
    """

    def __init__(self, sequences: list[Sequence], caches: Caches) -> None:
        self.caches = caches
        block_size = caches.block_size
        device, dtype = caches.kv.device, caches.kv.dtype
        starts = np.array([s.num_computed_tokens for s in sequences])
        ends = starts + np.array([s.num_scheduled_tokens for s in sequences])
        self.new_lengths: list[int] = (ends - starts).tolist()
        self.has_context = bool(starts.any())
        self.is_decode = self.has_context and max(self.new_lengths) == 1
        tables = np.zeros((len(sequences), max(len(s.block_table) for s in sequences)), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            tables[row, : len(sequence.block_table)] = sequence.block_table
        if max(self.new_lengths) == 1:
            input_ids = [s.tokens[s.num_computed_tokens] for s in sequences]
            positions, rows = starts, np.arange(len(sequences))
        else:
            spans = zip(sequences, starts, ends, strict=True)
            input_ids = [token for s, start, end in spans for token in s.tokens[start:end]]
            positions = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends, strict=True)])
            rows = np.repeat(np.arange(len(sequences)), self.new_lengths)
        self.input_ids = torch.tensor(input_ids).to(device)
        self.positions = torch.from_numpy(positions).to(device)
        new_slots = tables[rows, positions // block_size] * block_size + positions % block_size
        self.new_slots = torch.from_numpy(new_slots).to(device)
        self.last_rows = torch.from_numpy(np.cumsum(self.new_lengths) - 1).to(device)
        self.state_slots = torch.tensor([s.state_slot for s in sequences]).to(device)
        self.packed = PackedDocuments(self.new_lengths, device)
        if self.has_context:
            width = max(self.new_lengths)
            columns = positions - starts[rows]
            self.padded_rows = torch.from_numpy(rows * width + columns).to(device)
            positions_BQ = np.zeros((len(sequences), width), dtype=np.int64)
            positions_BQ[rows, columns] = positions
            self.block_tables = torch.from_numpy(tables).to(device)
            is_visible = np.arange(tables.shape[1] * block_size) <= positions_BQ[:, :, None]
            self.bias_BQL = torch.from_numpy(np.where(is_visible, 0.0, -np.inf)).to(device, dtype)

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        cache = self.caches.kv[attention_index]
        new_rows = torch.cat((k_TKH, v_TKH), dim=1).transpose(0, 1)
        cache.flatten(2, 3).flatten(0, 1).index_copy_(1, self.new_slots, new_rows)
        if not self.has_context:
            return self.packed.attend(attention_index, q_TNH, k_TKH, v_TKH)
        count, width = self.bias_BQL.shape[:2]
        if width == 1:
            return paged_attention(q_TNH[:, None], cache, self.block_tables, self.bias_BQL)[:, 0]
        q_BQNH = q_TNH.new_zeros(count * width, *q_TNH.shape[1:]).index_copy_(0, self.padded_rows, q_TNH)
        out = paged_attention(q_BQNH.unflatten(0, (count, width)), cache, self.block_tables, self.bias_BQL)
        return out.flatten(0, 1)[self.padded_rows]

    def convolve(self, delta_index: int, x_TC: Tensor, weight_CW: Tensor) -> Tensor:
        if self.is_decode:
            return causal_conv_step(x_TC, weight_CW, self.caches.conv[delta_index], self.state_slots)
        return super().convolve(delta_index, x_TC, weight_CW)

    def delta_rule(
        self, delta_index: int, q_TKH: Tensor, k_TKH: Tensor, v_TVJ: Tensor, log_decay_TV: Tensor, beta_TV: Tensor
    ) -> Tensor:
        inputs = (q_TKH, k_TKH, v_TVJ, log_decay_TV, beta_TV)
        if self.is_decode:
            return gated_delta_step(*inputs, self.caches.delta[delta_index], self.state_slots)
        return super().delta_rule(delta_index, *inputs)

    def _earlier(self, pool: Tensor) -> Tensor | None:
        return pool[self.state_slots] if self.has_context else None
