"""How much memory a block takes to pass T tokens: what it keeps for backward, and what it makes on the way.

`block_memory` counts the tensors of the layers' code, by the kernels that compute them. What the CPU's kernels take is
compared with what autograd really keeps in `tests/unit/models/test_activations.py`, what a GPU's take with its
allocator in `tests/gpu/test_memory_on_gpu.py`.

T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lockstep.kernels.gated_delta_rule import CHUNK
from lockstep.models.config import ModelConfig
from lockstep.models.qwen3_next import Qwen3NextConfig

Kernels = Literal["fused", "plain", "cpu"]
"""Triton's on a GPU in bf16; torch's on a GPU in bf16; torch's on a CPU."""

_INDEX, _FP32 = 8, 4
"""Bytes of an index and of a number in fp32."""

_MULTIPROCESSORS = 132
"""Of an H100 and an H200: torch's flash attention keeps that many parts of its queries' gradient, if it has no more
heads."""


@dataclass(frozen=True)
class Pack:
    """What a micro-batch is to a layer. `element` is the bytes of one number, `document` the tokens of a document."""

    tokens: int
    document: int
    element: int
    kernels: Kernels

    def numbers(self, *dims: int) -> int:
        """Bytes of `[T, *dims]` in the weights' type."""
        return self.fp32(*dims) // _FP32 * self.element

    def fp32(self, *dims: int) -> int:
        size = self.tokens * _FP32
        for dim in dims:
            size *= dim
        return size

    def indices(self, *dims: int) -> int:
        return self.fp32(*dims) // _FP32 * _INDEX


@dataclass(frozen=True)
class BlockMemory:
    """Bytes of a block, or of a part of it, beside its input and its output."""

    kept: dict[str, int]
    """By name, from forward until backward has passed."""
    forward: int
    """Most bytes at once of a forward pass that keeps nothing."""
    backward: int
    """Most bytes at once of backward, above all that is kept and the gradient that it gets: other gradients, those of
    weights too while they are fresh."""

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())


def block_memory(config: ModelConfig, layer_index: int, pack: Pack) -> BlockMemory:
    """Of the block with this index."""
    mixing, feeding = _mixing(config, layer_index, pack), _feeding(config, layer_index, pack)
    stream = pack.numbers(config.hidden_size)
    norms = {
        "residual stream": stream,
        "norms": 2 * (stream + _norm(config.hidden_size, 1, pack, is_offset=isinstance(config, Qwen3NextConfig))),
    }
    return BlockMemory(
        kept=norms | mixing.kept | feeding.kept,
        forward=2 * stream + max(mixing.forward, feeding.forward),
        # When the turn comes to mixing, backward of the feed-forward part has freed what that part kept.
        backward=max(feeding.backward, stream + mixing.backward - feeding.kept_bytes),
    )


def attention_results(config: ModelConfig, layer_index: int, pack: Pack) -> int:
    """Bytes of what attention found in this block, with its scores' log sums: a recomputed block may keep them."""
    is_delta = isinstance(config, Qwen3NextConfig) and config.layer_types[layer_index] == "linear_attention"
    if is_delta or pack.kernels != "fused":
        return 0
    return pack.numbers(config.num_attention_heads, config.head_dim) + pack.fp32(config.num_attention_heads)


def _mixing(config: ModelConfig, layer_index: int, pack: Pack) -> BlockMemory:
    if isinstance(config, Qwen3NextConfig) and config.layer_types[layer_index] == "linear_attention":
        return _delta_net(config, pack)
    return _attention(config, pack)


def _feeding(config: ModelConfig, layer_index: int, pack: Pack) -> BlockMemory:
    return _experts(config, pack) if config.is_sparse(layer_index) else _mlp(config, config.intermediate_size, pack)


def _norm(width: int, heads: int, pack: Pack, *, is_offset: bool = False) -> int:
    """What a norm of `heads` rows of this width keeps beside its input and its output."""
    if pack.kernels == "fused":
        return 0
    widened = pack.element < _FP32 and (is_offset or pack.kernels == "cpu")
    copies = widened + (pack.kernels == "cpu")  # the input in fp32, and over its root mean square
    return pack.fp32(heads) + copies * pack.fp32(heads, width)


def _attention(config: ModelConfig, pack: Pack) -> BlockMemory:
    is_gated, on_cpu = isinstance(config, Qwen3NextConfig), pack.kernels == "cpu"
    heads, keys, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query, key, sums = pack.numbers(heads, dim), pack.numbers(keys, dim), pack.fp32(heads)
    # A norm that copies its input to fp32 lets go of the input.
    is_copied = pack.element < _FP32 and (on_cpu or (is_gated and pack.kernels == "plain"))
    projected = 0 if is_copied else (2 if is_gated else 1) * query + key
    kept = {
        "projected queries and keys": projected + _norm(dim, heads + keys, pack, is_offset=is_gated),
        "queries, keys and values": query + 2 * key,
        # On a CPU a second time in the order of tokens, since documents of similar length are one padded batch.
        "attention": (2 if on_cpu else 1) * query + sums,
    }
    if is_gated:
        kept["output gate"] = 2 * query
    backward = 3 * query + 2 * key
    if pack.kernels == "plain":  # partial sums, and a gradient of keys and values for every query head
        parts = -(-_MULTIPROCESSORS // (max(1, pack.tokens // pack.document) * heads))
        backward += parts * pack.fp32(heads, dim) + (2 * query if heads > keys else 0)
    elif pack.kernels == "fused":
        backward = 2 * query + 2 * key + sums
    forward = (4 if on_cpu else 3) * query + 4 * key
    if is_copied and on_cpu:  # a norm's copies in fp32
        forward = max(forward, query + 2 * key + 3 * pack.fp32(heads, dim))
    return BlockMemory(kept, forward, backward)


def _mlp(config: ModelConfig, width: int, pack: Pack) -> BlockMemory:
    inner, matrix = pack.numbers(width), config.hidden_size * width * pack.element
    count = 3 if pack.kernels == "fused" else 4  # gate, up, where torch computes them the gate's silu, their product
    # When the second product's backward has passed, its input is free and has a gradient, from which come two more.
    return BlockMemory({"feed-forward": count * inner}, forward=count * inner, backward=max(inner + matrix, 2 * inner))


def _experts(config: ModelConfig, pack: Pack) -> BlockMemory:
    slots, fused = config.num_experts_per_tok, pack.kernels == "fused"
    outer, inner = pack.numbers(slots, config.hidden_size), pack.numbers(slots, config.moe_intermediate_size)
    matrix = config.num_experts * config.moe_intermediate_size * config.hidden_size * pack.element
    router = pack.fp32(config.num_experts + 2 * slots + 1) + pack.numbers(slots) + pack.indices(2 * slots)
    kept = {"router": router, "rows to experts": outer, "gates and ups": 2 * inner}
    # Of backward first the second product, then the first, whose input's gradient is as large as `outer`.
    if fused:
        kept["inner rows"] = inner
        moments = [outer + inner + matrix, outer - inner + 2 * matrix]
        forward = outer + 3 * inner
    else:
        kept |= {"inner rows": 3 * inner + pack.numbers(slots) + pack.indices(slots), "rows from experts": outer}
        moments = [2 * outer, inner + matrix, 2 * matrix - 2 * inner]
        forward = 2 * outer + 3 * inner
    if not isinstance(config, Qwen3NextConfig):
        return BlockMemory(kept, forward, max(moments))
    shared = _mlp(config, config.shared_expert_intermediate_size, pack)
    found = pack.numbers(config.hidden_size)
    kept["shared expert"] = shared.kept_bytes + found + pack.numbers(1)
    return BlockMemory(kept, forward + found, max(moments) + found)


def _delta_net(config: Qwen3NextConfig, pack: Pack) -> BlockMemory:
    values, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
    keys, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
    channels, out = pack.numbers(config.conv_channels), pack.numbers(values, value_dim)
    states = pack.fp32(values, key_dim, value_dim) // CHUNK
    gated = {"gated norm": 3 * out + 2 * pack.fp32(values, value_dim) + _norm(value_dim, values, pack)}
    kept = {"convolution": 2 * channels, "decay and strength": pack.fp32(4 * values)}
    if pack.kernels == "cpu":
        pairs = pack.fp32(values, CHUNK)
        of_keys, of_values = 2 * pack.fp32(keys, key_dim), pack.fp32(values, 3 * value_dim + 3 * key_dim + 4)
        kept["convolution"] += 2 * pack.fp32(config.conv_channels)
        kept["chunks"] = 4 * pairs + of_keys + of_values + states
        without_gradient = 3 * pairs + pack.fp32(values, 3 * value_dim + 4 * key_dim)
        forward = kept["convolution"] + kept["decay and strength"] + without_gradient
        backward = 4 * pairs + of_values + 2 * states
    else:
        in_16_bits = states * pack.element // _FP32
        chunks = pack.numbers(values, 2 * value_dim + key_dim + CHUNK) + in_16_bits
        forward = 2 * channels + chunks + out
        backward = chunks + in_16_bits + pack.numbers(values, 3 * value_dim + 2 * key_dim) - gated["gated norm"]
    return BlockMemory(kept | gated, forward, backward)


def logits_memory(config: ModelConfig, rows: int, chunk_rows: int, pack: Pack) -> tuple[int, int]:
    """Bytes of the projection to the vocabulary, forward alone and backward, beside hidden states and results.

    In backward the matrix's gradient adds up in fp32 and is then rounded to the weights' type.
    """
    matrix = config.vocab_size * config.hidden_size
    chunk = min(rows, chunk_rows) * config.vocab_size
    rounded = matrix * pack.element if pack.element < _FP32 else 0
    if pack.kernels == "fused":
        logits = chunk * pack.element  # a chunk that holds all rows is kept, and its gradient is another tensor
        return logits, matrix * _FP32 + max(rounded, (2 if rows <= chunk_rows else 1) * logits)
    logits = chunk * _FP32
    narrow = chunk * pack.element if pack.element < _FP32 else 0
    if rows <= chunk_rows:
        return 2 * logits, matrix * _FP32 + max(2 * logits + narrow, logits + narrow + rounded)
    # While a chunk is made, what the one before has left is still there.
    return 3 * logits + narrow, matrix * _FP32 + max(3 * logits, logits + narrow + rounded)
