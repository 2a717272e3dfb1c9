"""The chunked gated delta rule as Triton kernels, forward and backward, for bf16 on a GPU.

The maths is that of `_Chunks` in `gated_delta_rule.py`, with the same names. What passes from kernel to kernel lies in
chunk order, `[N, V, C, ...]` in bf16; sums are in fp32. Nothing is tuned at run time, so results repeat bit for bit.

N chunks, V value heads, C tokens of a chunk, H key head dim, J value head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from lockstep.kernels.gated_delta_rule import DeltaLayout

_COLUMNS = 64
"""Value dims of one program that passes states; the state's columns do not depend on each other."""

_WARPS = {"solve": 4, "pass": 4, "outputs": 4, "back": 8, "gradients": 8}
"""Warps of each kernel: the fastest of 4, 8 and (gradients) 16 on an H200."""


class TritonChunks:
    """One pass over a pack. `inputs` are q, k, v, log-decay and beta, as in `gated_delta_rule`."""

    def __init__(self, layout: DeltaLayout, *inputs: Tensor) -> None:
        self.layout = layout
        self.q, self.k, self.v, log_decay, beta = (x.contiguous() for x in inputs)
        self.log_decay, self.beta = log_decay.float(), beta.float()
        (self.num_keys, key_dim), (self.num_values, value_dim) = self.k.shape[1:], self.v.shape[1:]
        self.sizes = {
            "KEYS": self.num_keys, "VALUES": self.num_values, "H": key_dim, "J": value_dim, "C": layout.rows_NC.shape[1]
        }  # fmt: skip
        self.scale = key_dim**-0.5
        self.grid = (len(layout.rows_NC), self.num_values)
        self.values, self.keys = self._chunked(value_dim), self._chunked(key_dim)
        self.inverse = self._chunked(self.sizes["C"])
        self.starts_N, self.sizes_N = layout.chunk_tables[:2]
        _solve[self.grid](
            self.k, self.v, self.log_decay, self.beta, self.starts_N, self.sizes_N, self.values, self.keys,
            self.inverse, **self.sizes, num_warps=_WARPS["solve"],
        )  # fmt: skip

    def _chunked(self, width: int) -> Tensor:
        return self.v.new_empty(*self.grid, self.sizes["C"], width)

    def _columns(self) -> dict[str, int]:
        return {**self.sizes, "COLUMNS": min(_COLUMNS, self.sizes["J"])}

    def _state_grid(self) -> tuple[int, ...]:
        return (self.sizes["J"] // self._columns()["COLUMNS"], self.num_values, len(self.layout.lengths))

    def pass_states(self, state_BVHJ: Tensor) -> Tensor:
        """Keeps the state before every chunk and what its tokens write; returns the final states."""
        layout = self.layout
        state = state_BVHJ.float().contiguous()
        final = torch.empty_like(state)
        self.states = self.v.new_empty(*self.grid, *state.shape[2:])
        self.fresh = self._chunked(self.sizes["J"])
        _pass_states[self._state_grid()](
            self.k, self.log_decay, self.values, self.keys, state, *layout.document_tables, self.states, self.fresh,
            final, **self._columns(), num_warps=_WARPS["pass"], num_stages=2,
        )  # fmt: skip
        return final

    def outputs(self) -> Tensor:
        out = torch.empty_like(self.v)
        _outputs[self.grid](
            self.q, self.k, self.log_decay, self.states, self.fresh, self.starts_N,
            self.sizes_N, out, self.scale, **self.sizes, num_warps=_WARPS["outputs"],
        )  # fmt: skip
        return out

    def gradients(self, d_out: Tensor, d_final: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the five inputs and of the first states."""
        layout, d_out = self.layout, d_out.contiguous()
        d_final = d_final.float().contiguous()
        d_state = torch.empty_like(d_final)
        d_states, d_fresh = torch.empty_like(self.states), torch.empty_like(self.fresh)
        _pass_states_back[self._state_grid()](
            self.q, self.k, self.log_decay, self.keys, d_out, d_final, *layout.document_tables, d_states, d_fresh,
            d_state, self.scale, **self._columns(), num_warps=_WARPS["back"], num_stages=2,
        )  # fmt: skip
        num_tokens = len(self.v)
        d_q, d_k = (self.v.new_empty(num_tokens, self.num_values, self.sizes["H"]) for _ in range(2))
        d_v, d_log_decay, d_beta = (torch.empty_like(x) for x in (self.v, self.log_decay, self.beta))
        _gradients[self.grid](
            self.q, self.k, self.v, self.log_decay, self.beta, self.values, self.keys, self.inverse, self.states,
            self.fresh, d_out, d_states, d_fresh, self.starts_N, self.sizes_N, d_q, d_k, d_v,
            d_log_decay, d_beta, self.scale, **self.sizes, num_warps=_WARPS["gradients"],
        )  # fmt: skip
        per_key = (num_tokens, self.num_keys, -1, self.sizes["H"])
        return d_q.view(per_key).sum(2), d_k.view(per_key).sum(2), d_v, d_log_decay, d_beta, d_state


@triton.jit  # type: ignore[untyped-decorator]
def _tile(pointer, rows, row_stride, real, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of WIDTH contiguous numbers, zeros where there is no token."""
    cells = pointer + rows[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(cells, mask=real[:, None], other=0.0)


@triton.jit
def _inverse_norm(x):  # type: ignore[no-untyped-def]
    x = x.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit  # type: ignore[untyped-decorator]
def _decays(pointer, rows, value_head, real, VALUES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logarithm of the decay from the chunk's start to each token, and over the whole chunk."""
    log_decay = tl.load(pointer + rows * VALUES + value_head, mask=real, other=0.0)
    return tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _pair(decay, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decay from token j to token i, 0 where j is later."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.exp(tl.where(i >= j, decay[:, None] - decay[None, :], float("-inf")))


@triton.jit  # type: ignore[untyped-decorator]
def _invert(system, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Inverse of 1 + system (strictly lower triangular, 64 = 2^6 rows): of ever larger blocks on the diagonal."""
    tl.static_assert(C == 64)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    below = (i // 2 == j // 2) & (i > j)
    inverse = tl.where(i == j, 1.0, 0.0) - tl.where(below, system, 0.0)
    for level in tl.static_range(1, 6):
        size = 2**level
        below = (i // (2 * size) == j // (2 * size)) & (i // size > j // size)
        left = tl.dot(inverse, tl.where(below, system, 0.0), input_precision="tf32x3")
        inverse -= tl.dot(left, inverse, input_precision="tf32x3")
    return inverse


@triton.jit  # type: ignore[untyped-decorator]
def _solve(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, log_decay_ptr, beta_ptr, chunk_starts_ptr, chunk_sizes_ptr, values_ptr, keys_ptr, inverse_ptr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    chunk, value_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = tl.arange(0, C)
    rows = tl.load(chunk_starts_ptr + chunk) + places
    real = places < tl.load(chunk_sizes_ptr + chunk)
    k = _tile(k_ptr + (value_head // (VALUES // KEYS)) * H, rows, KEYS * H, real, H)
    k = k * _inverse_norm(k)[:, None]
    beta = tl.load(beta_ptr + rows * VALUES + value_head, mask=real, other=0.0)
    decay, _ = _decays(log_decay_ptr, rows, value_head, real, VALUES)
    k16 = k.to(v_ptr.dtype.element_ty)
    system = tl.dot(k16, tl.trans(k16)) * _pair(decay, C) * beta[:, None]
    inverse = _invert(tl.where(places[:, None] > places[None, :], system, 0.0), C).to(k16.dtype)
    v = _tile(v_ptr + value_head * J, rows, VALUES * J, real, J)
    base = (chunk * VALUES + value_head) * C
    everywhere = places < C
    here = places + base
    values = tl.dot(inverse, (v * beta[:, None]).to(k16.dtype))
    keys = tl.dot(inverse, (k * (beta * tl.exp(decay))[:, None]).to(k16.dtype))
    _put(values_ptr, here, J, everywhere, values, J)
    _put(keys_ptr, here, H, everywhere, keys, H)
    _put(inverse_ptr, here, C, everywhere, inverse, C)


@triton.jit  # type: ignore[untyped-decorator]
def _put(pointer, rows, row_stride, real, x, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    cells = pointer + rows[:, None] * row_stride + tl.arange(0, WIDTH)[None, :]
    tl.store(cells, x.to(pointer.dtype.element_ty), mask=real[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _pass_states(  # type: ignore[no-untyped-def]
    k_ptr, log_decay_ptr, values_ptr, keys_ptr, state_ptr, starts_ptr, sizes_ptr, ranks_ptr, step_starts_ptr,
    states_ptr, fresh_ptr, final_ptr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr, J: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, value_head, document = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    places, h = tl.arange(0, C), tl.arange(0, H).to(tl.int64)
    everywhere = places < C
    start, size = tl.load(starts_ptr + document), tl.load(sizes_ptr + document)
    rank = tl.load(ranks_ptr + document)
    k_ptr += (value_head // (VALUES // KEYS)) * H
    whole = (document * VALUES + value_head) * H
    state = _tile(state_ptr + column, whole + h, J, h < H, COLUMNS)
    for step in range(tl.cdiv(size, C)):
        rows = start + step * C + places
        real = rows < start + size
        here = (tl.load(step_starts_ptr + step) + rank) * VALUES + value_head
        state16 = state.to(states_ptr.dtype.element_ty)
        _put(states_ptr + column, here * H + h, J, h < H, state16, COLUMNS)
        values = _tile(values_ptr + column, here * C + places, J, everywhere, COLUMNS)
        keys = _tile(keys_ptr, here * C + places, H, everywhere, H)
        fresh = (values - tl.dot(keys, state16)).to(state16.dtype)
        _put(fresh_ptr + column, here * C + places, J, everywhere, fresh, COLUMNS)
        decay, total = _decays(log_decay_ptr, rows, value_head, real, VALUES)
        k = _tile(k_ptr, rows, KEYS * H, real, H)
        writes = (k * (_inverse_norm(k) * tl.exp(total - decay))[:, None]).to(state16.dtype)
        state = state * tl.exp(total) + tl.dot(tl.trans(writes), fresh)
    _put(final_ptr + column, whole + h, J, h < H, state, COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def _outputs(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, log_decay_ptr, states_ptr, fresh_ptr, chunk_starts_ptr, chunk_sizes_ptr, out_ptr, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    chunk, value_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places, h = tl.arange(0, C), tl.arange(0, H)
    rows = tl.load(chunk_starts_ptr + chunk) + places
    real = places < tl.load(chunk_sizes_ptr + chunk)
    key_head = value_head // (VALUES // KEYS)
    here = chunk * VALUES + value_head
    q = _tile(q_ptr + key_head * H, rows, KEYS * H, real, H)
    q = q * (_inverse_norm(q) * scale)[:, None]
    k = _tile(k_ptr + key_head * H, rows, KEYS * H, real, H)
    k16 = (k * _inverse_norm(k)[:, None]).to(k.dtype)
    decay, _ = _decays(log_decay_ptr, rows, value_head, real, VALUES)
    attention = tl.dot(q.to(k16.dtype), tl.trans(k16)) * _pair(decay, C)
    fresh = _tile(fresh_ptr, here * C + places, J, places < C, J)
    out = tl.dot(attention.to(k16.dtype), fresh)
    reads = (q * tl.exp(decay)[:, None]).to(k16.dtype)
    out += tl.dot(reads, _tile(states_ptr, here * H + h, J, h < H, J))
    _put(out_ptr + value_head * J, rows, VALUES * J, real, out, J)


@triton.jit  # type: ignore[untyped-decorator]
def _pass_states_back(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, log_decay_ptr, keys_ptr, d_out_ptr, d_final_ptr, starts_ptr, sizes_ptr, ranks_ptr, step_starts_ptr,
    d_states_ptr, d_fresh_ptr, d_state_ptr, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr, J: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, value_head, document = tl.program_id(0) * COLUMNS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    places, h = tl.arange(0, C), tl.arange(0, H).to(tl.int64)
    everywhere = places < C
    start, size = tl.load(starts_ptr + document), tl.load(sizes_ptr + document)
    rank = tl.load(ranks_ptr + document)
    key_head = value_head // (VALUES // KEYS)
    q_ptr += key_head * H
    k_ptr += key_head * H
    whole = (document * VALUES + value_head) * H
    d_state = _tile(d_final_ptr + column, whole + h, J, h < H, COLUMNS)
    steps = tl.cdiv(size, C)
    for index in range(steps):
        step = steps - 1 - index
        rows = start + step * C + places
        real = rows < start + size
        here = (tl.load(step_starts_ptr + step) + rank) * VALUES + value_head
        d_state16 = d_state.to(d_states_ptr.dtype.element_ty)
        _put(d_states_ptr + column, here * H + h, J, h < H, d_state16, COLUMNS)
        d_out = _tile(d_out_ptr + value_head * J + column, rows, VALUES * J, real, COLUMNS)
        decay, total = _decays(log_decay_ptr, rows, value_head, real, VALUES)
        q = _tile(q_ptr, rows, KEYS * H, real, H)
        q = q * (_inverse_norm(q) * scale)[:, None]
        k = _tile(k_ptr, rows, KEYS * H, real, H)
        k = k * _inverse_norm(k)[:, None]
        attention = tl.dot(q.to(d_out.dtype), tl.trans(k.to(d_out.dtype))) * _pair(decay, C)
        writes = (k * tl.exp(total - decay)[:, None]).to(d_out.dtype)
        d_fresh = tl.dot(tl.trans(attention.to(d_out.dtype)), d_out) + tl.dot(writes, d_state16)
        d_fresh = d_fresh.to(d_out.dtype)
        _put(d_fresh_ptr + column, here * C + places, J, everywhere, d_fresh, COLUMNS)
        reads = (q * tl.exp(decay)[:, None]).to(d_out.dtype)
        keys = _tile(keys_ptr, here * C + places, H, everywhere, H)
        d_state = d_state * tl.exp(total) + tl.dot(tl.trans(reads), d_out) - tl.dot(tl.trans(keys), d_fresh)
    _put(d_state_ptr + column, whole + h, J, h < H, d_state, COLUMNS)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, log_decay_ptr, beta_ptr, values_ptr, keys_ptr, inverse_ptr, states_ptr, fresh_ptr, d_out_ptr,
    d_states_ptr, d_fresh_ptr, chunk_starts_ptr, chunk_sizes_ptr, d_q_ptr, d_k_ptr, d_v_ptr, d_log_decay_ptr,
    d_beta_ptr, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, H: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    chunk, value_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places, h = tl.arange(0, C), tl.arange(0, H)
    everywhere = places < C
    rows = tl.load(chunk_starts_ptr + chunk) + places
    real = places < tl.load(chunk_sizes_ptr + chunk)
    key_head = value_head // (VALUES // KEYS)
    here = chunk * VALUES + value_head
    beta = tl.load(beta_ptr + rows * VALUES + value_head, mask=real, other=0.0)
    decay, total = _decays(log_decay_ptr, rows, value_head, real, VALUES)
    pair = _pair(decay, C)
    from_start, to_end = tl.exp(decay), tl.exp(total - decay)

    k = _tile(k_ptr + key_head * H, rows, KEYS * H, real, H)
    k_norm = _inverse_norm(k)
    k16 = (k * k_norm[:, None]).to(k.dtype)
    state = tl.trans(_tile(states_ptr, here * H + h, J, h < H, J))

    # What the chunk's system takes: `_solve` backwards.
    inverse = tl.trans(_tile(inverse_ptr, here * C + places, C, everywhere, C))
    d_fresh = _tile(d_fresh_ptr, here * C + places, J, everywhere, J)
    d_keys = tl.dot(inverse, (-tl.dot(d_fresh, state)).to(k16.dtype))
    keys = _tile(keys_ptr, here * C + places, H, everywhere, H)
    d_system = tl.dot(d_keys.to(k16.dtype), tl.trans(keys))
    from_keys = tl.sum(d_keys * k16, 1) * from_start
    d_k = d_keys * (from_start * beta)[:, None]
    d_values = tl.dot(inverse, d_fresh)
    values = _tile(values_ptr, here * C + places, J, everywhere, J)
    d_system += tl.dot(d_values.to(k16.dtype), tl.trans(values))
    v = _tile(v_ptr + value_head * J, rows, VALUES * J, real, J)
    d_beta = tl.sum(d_values * v, 1) + from_keys
    _put(d_v_ptr + value_head * J, rows, VALUES * J, real, d_values * beta[:, None], J)
    d_system = tl.where(places[:, None] > places[None, :], -d_system, 0.0) * pair
    overlap = tl.dot(k16, tl.trans(k16))
    d_beta += tl.sum(d_system * overlap, 1)
    d_system *= beta[:, None]
    d_pair = d_system * overlap
    d_k += tl.dot((d_system + tl.trans(d_system)).to(k16.dtype), k16)

    # What the outputs take.
    d_out = _tile(d_out_ptr + value_head * J, rows, VALUES * J, real, J)
    fresh = _tile(fresh_ptr, here * C + places, J, everywhere, J)
    q = _tile(q_ptr + key_head * H, rows, KEYS * H, real, H)
    q_norm = _inverse_norm(q)
    q16 = (q * (q_norm * scale)[:, None]).to(q.dtype)
    d_attention = tl.dot(d_out, tl.trans(fresh)) * pair
    d_pair += d_attention * tl.dot(q16, tl.trans(k16))
    d_attention16 = d_attention.to(k16.dtype)
    d_q = tl.dot(d_out, state) * from_start[:, None]
    d_decay = tl.sum(d_pair, 1) - tl.sum(d_pair, 0) + tl.sum(d_q * q16, 1) + from_keys * beta
    d_q = (d_q + tl.dot(d_attention16, k16)) * scale
    q_unit = q * q_norm[:, None]
    d_q = (d_q - q_unit * tl.sum(q_unit * d_q, 1)[:, None]) * q_norm[:, None]
    _put(d_q_ptr + value_head * H, rows, VALUES * H, real, d_q, H)
    d_k += tl.dot(tl.trans(d_attention16), q16)

    # What the next state takes.
    d_state = tl.trans(_tile(d_states_ptr, here * H + h, J, h < H, J))
    d_writes = tl.dot(fresh, d_state) * to_end[:, None]
    d_k += d_writes
    d_end = tl.sum(d_writes * k16, 1)
    d_carried = tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1), 0) * tl.exp(total)
    d_decay += tl.where(places == C - 1, tl.sum(d_end, 0) + d_carried, 0.0) - d_end
    d_log_decay = tl.sum(d_decay, 0) - tl.cumsum(d_decay, 0) + d_decay
    tl.store(d_log_decay_ptr + rows * VALUES + value_head, d_log_decay, mask=real)
    tl.store(d_beta_ptr + rows * VALUES + value_head, d_beta, mask=real)
    k_unit = k * k_norm[:, None]
    d_k = (d_k - k_unit * tl.sum(k_unit * d_k, 1)[:, None]) * k_norm[:, None]
    _put(d_k_ptr + value_head * H, rows, VALUES * H, real, d_k, H)
