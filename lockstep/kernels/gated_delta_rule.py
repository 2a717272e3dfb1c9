"""The gated delta rule over packed documents (training, prefill) and one token at a time (decoding).

Every value head keeps a matrix S that maps keys to values. A token with key k, value v, decay a and strength b does
`S = a S; S = S + k (b (v - k^T S))^T` and reads `q^T S`. Queries and keys are normalised to length 1 inside, and
queries divided by sqrt(H).

T packed tokens, K key heads, V value heads (value head v uses key head v // (V / K)), H key head dim, J value head
dim, B documents, S state slots, N chunks of all documents, C tokens of a chunk.

Source: Gated Delta Networks, arXiv:2412.06464; the chunked form, arXiv:2406.06484.
"""

from __future__ import annotations

import warnings
from functools import cache
from itertools import accumulate
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lockstep.kernels.delta_rule_choice import RIGHT_TO, Kernels, choose_kernels, fla_fault, installed

if TYPE_CHECKING:
    from lockstep.kernels.gated_delta_rule_triton import TritonChunks

CHUNK = 64
"""Tokens that are computed by matrix products at once; the state passes from chunk to chunk."""

_NORM_EPS = 1e-6


class ConvRows(NamedTuple):
    """Rows of a pack in which every document stands after its P earlier inputs."""

    tokens_T: Tensor
    earlier_BP: Tensor
    last_BP: Tensor
    """The last P rows of each document, which may reach into the earlier inputs."""


class DeltaLayout:
    """Index tables of one pack of documents, for all layers. Documents may be empty.

    Chunks are numbered by their place in their document, and within one place by their document's length, longest
    first. So `self.steps[i]` is a slice of chunks, one for each of the longest documents in order.
    """

    def __init__(self, lengths: list[int], device: torch.device | str) -> None:
        self.lengths = lengths
        self._conv_rows: dict[int, ConvRows] = {}
        sizes_B = torch.tensor(lengths, dtype=torch.int64)
        ends_B = sizes_B.cumsum(0)
        self.cu_seqlens = torch.cat([ends_B.new_zeros(1), ends_B]).to(torch.int32).to(device)
        order_B = sizes_B.argsort(descending=True, stable=True)
        active = [sum(length > start for length in lengths) for start in range(0, max(lengths, default=0), CHUNK)]
        ends = list(accumulate(active))
        self.steps = [slice(end - count, end) for count, end in zip(active, ends, strict=True)]
        places_N = torch.arange(len(active)).repeat_interleave(torch.tensor(active, dtype=torch.int64)) * CHUNK
        documents_N = torch.cat([order_B[:count] for count in active]) if active else order_B[:0]
        places_NC = places_N[:, None] + torch.arange(CHUNK)
        is_real_NC = places_NC < sizes_B[documents_N, None]
        rows_NC = torch.where(is_real_NC, places_NC + (ends_B - sizes_B)[documents_N, None], sum(lengths))
        slots = is_real_NC.flatten().nonzero().squeeze(1)
        slots_T = slots[rows_NC.flatten()[slots].argsort()]
        self.order_B = order_B.to(device)
        self.rank_B = order_B.argsort().to(device)
        self.rows_NC = rows_NC.to(device)
        """Row of every chunk's tokens; T where a document's last chunk is not full."""
        starts_B = ends_B - sizes_B
        chunks = (rows_NC[:, 0].contiguous(), is_real_NC.sum(1))
        self.chunk_tables = [x.to(device) for x in (*chunks, starts_B[documents_N], documents_N, ends_B[documents_N])]
        """Of each chunk its first row and its size; of its document the first row, the number and the end."""
        step_starts = torch.tensor([step.start for step in self.steps], dtype=torch.int64)
        self.document_tables = [x.to(device) for x in (starts_B, sizes_B, order_B.argsort(), step_starts)]
        """Of each document its first row, its size and its place in the order; of each step its first chunk."""
        self.chunk_T, self.place_T = (slots_T // CHUNK).to(device), (slots_T % CHUNK).to(device)
        filled_B = sizes_B.nonzero().squeeze(1)
        self.filled_B = filled_B.to(device)
        """Documents that have tokens: fla's kernels see only these."""
        self.filled_cu_seqlens_cpu = torch.cat([ends_B.new_zeros(1), ends_B[filled_B]])
        self.filled_cu_seqlens = self.filled_cu_seqlens_cpu.to(device)

    def conv_rows(self, past: int) -> ConvRows:
        """For a convolution that sees `past` earlier inputs."""
        if past not in self._conv_rows:
            device, count = self.cu_seqlens.device, len(self.lengths)
            sizes_B = self.cu_seqlens.diff()
            documents_T = torch.repeat_interleave(
                torch.arange(count, device=device), sizes_B, output_size=len(self.chunk_T)
            )
            tokens_T = torch.arange(len(self.chunk_T), device=device) + (documents_T + 1) * past
            starts_B1 = (self.cu_seqlens[:-1] + torch.arange(count, device=device) * past)[:, None]
            earlier_BP = starts_B1 + torch.arange(past, device=device)
            self._conv_rows[past] = ConvRows(tokens_T, earlier_BP, earlier_BP + sizes_B[:, None])
        return self._conv_rows[past]

    def to_chunks(self, x_T: Tensor) -> Tensor:
        """`[T, heads, ...]` to `[N, heads, C, ...]`, with zeros in the empty slots."""
        padded = torch.cat([x_T, x_T.new_zeros(1, *x_T.shape[1:])])
        return padded[self.rows_NC[:, None], torch.arange(x_T.shape[1], device=x_T.device)[:, None]]

    def from_chunks(self, x_N: Tensor) -> Tensor:
        """The inverse of `to_chunks`."""
        return x_N[self.chunk_T, :, self.place_T]


def gated_delta_rule_reference(
    q_TKH: Tensor,
    k_TKH: Tensor,
    v_TVJ: Tensor,
    log_decay_TV: Tensor,
    beta_TV: Tensor,
    lengths: list[int],
    state_BVHJ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: token by token, in fp32 (fp64 for fp64 values). Returns outputs and final states."""
    dtype = torch.promote_types(v_TVJ.dtype, torch.float32)
    heads_per_key = v_TVJ.shape[1] // k_TKH.shape[1]
    q_TVH = (_normalize(q_TKH.to(dtype)) * q_TKH.shape[-1] ** -0.5).repeat_interleave(heads_per_key, 1)
    k_TVH = _normalize(k_TKH.to(dtype)).repeat_interleave(heads_per_key, 1)
    rows = zip(q_TVH, k_TVH, v_TVJ.to(dtype), log_decay_TV.to(dtype).exp(), beta_TV.to(dtype), strict=True)
    outputs, states = [], []
    for document, length in enumerate(lengths):
        state_VHJ = v_TVJ.new_zeros(v_TVJ.shape[1], k_TKH.shape[2], v_TVJ.shape[2], dtype=dtype)
        if state_BVHJ is not None:
            state_VHJ = state_BVHJ[document].to(dtype)
        for _ in range(length):
            out_VJ, state_VHJ = _one_token(*next(rows), state_VHJ)
            outputs.append(out_VJ)
        states.append(state_VHJ)
    shape = (0, v_TVJ.shape[1], k_TKH.shape[2], v_TVJ.shape[2])
    return (
        torch.stack(outputs).to(v_TVJ.dtype) if outputs else torch.zeros_like(v_TVJ),
        torch.stack(states) if states else v_TVJ.new_zeros(shape, dtype=dtype),
    )


def _one_token(
    q_VH: Tensor, k_VH: Tensor, v_VJ: Tensor, decay_V: Tensor, beta_V: Tensor, state_VHJ: Tensor
) -> tuple[Tensor, Tensor]:
    """Also for a batch of tokens with a state each: the dimensions may be preceded by others."""
    state_VHJ = state_VHJ * decay_V[..., None, None]
    delta_VJ = (v_VJ - torch.einsum("...h,...hj->...j", k_VH, state_VHJ)) * beta_V[..., None]
    state_VHJ = state_VHJ + k_VH[..., :, None] * delta_VJ[..., None, :]
    return torch.einsum("...h,...hj->...j", q_VH, state_VHJ), state_VHJ


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)


def gated_delta_rule(
    q_TKH: Tensor,
    k_TKH: Tensor,
    v_TVJ: Tensor,
    log_decay_TV: Tensor,
    beta_TV: Tensor,
    layout: DeltaLayout,
    state_BVHJ: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by chunks: matrix products inside a chunk, a loop only over the chunks of the longest document.

    Args:
        log_decay_TV: logarithm of the decay, at most 0, as small as you like: nothing overflows.
        beta_TV: how much of a key's old value is replaced, between 0 and 1.
        state_BVHJ: states to start from; zeros when None.
    Returns:
        outputs [T, V, J] in the values' type and final states [B, V, H, J] in fp32 (fp64 for fp64 values).
    """
    if state_BVHJ is None:
        shape = (len(layout.lengths), v_TVJ.shape[1], k_TKH.shape[2], v_TVJ.shape[2])
        state_BVHJ = v_TVJ.new_zeros(shape, dtype=torch.promote_types(v_TVJ.dtype, torch.float32))
    inputs = (q_TKH, k_TKH, v_TVJ, log_decay_TV, beta_TV, state_BVHJ)
    if not v_TVJ.is_cuda:
        return _by_autograd(layout, *inputs)
    kernels = _kernels_for(k_TKH, v_TVJ) if layout.steps else "torch"
    if kernels == "fla":
        return _by_fla(layout, *inputs)
    chunks: type[_Chunks | TritonChunks] = _Chunks
    if kernels == "triton":
        from lockstep.kernels.gated_delta_rule_triton import TritonChunks

        chunks = TritonChunks
    result: tuple[Tensor, Tensor] = _GatedDeltaRule.apply(chunks, layout, *inputs)  # type: ignore[no-untyped-call]
    return result


def _kernels_for(k_TKH: Tensor, v_TVJ: Tensor) -> Kernels:
    """Triton's and fla's kernels multiply in 16 bits, so fp32 inputs stay with torch."""
    if v_TVJ.dtype not in (torch.bfloat16, torch.float16):
        return "torch"
    return kernels_on(v_TVJ.device.index, *k_TKH.shape[1:], *v_TVJ.shape[1:])


@cache
def kernels_on(device_index: int, num_keys: int, key_dim: int, num_values: int, value_dim: int) -> Kernels:
    """The kernels for 16-bit inputs of these heads on this GPU; ours are tried once, on a small pack."""
    fault = fla_fault(
        installed("fla-core"), installed("triton"), torch.cuda.get_device_capability(device_index), key_dim
    )
    return choose_kernels(error_of_triton(device_index, num_keys, key_dim, num_values, value_dim), fault)


def error_of_triton(device_index: int, num_keys: int, key_dim: int, num_values: int, value_dim: int) -> float | None:
    """The largest relative error in bf16 of our Triton kernels, over outputs, states and gradients.

    Triton has been wrong on new GPUs before, so the plain version on the same GPU is asked. None: they cannot run here.
    """
    sizes_fit = all(dim in (16, 32, 64, 128) for dim in (key_dim, value_dim))
    if not sizes_fit or installed("triton") is None or torch.cuda.get_device_capability(device_index) < (8, 0):
        return None
    from lockstep.kernels.gated_delta_rule_triton import TritonChunks

    device = torch.device("cuda", device_index)
    lengths, draw = [200, 0, 70], torch.Generator().manual_seed(0)
    total = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, torch.bfloat16)

    rows = (normal(total, num_keys, key_dim), normal(total, num_keys, key_dim), normal(total, num_values, value_dim))
    gates = [torch.rand(total, num_values, generator=draw).to(device) for _ in range(2)]
    gates[0].neg_()
    state, layout = normal(len(lengths), num_values, key_dim, value_dim).float(), DeltaLayout(lengths, device)
    upstream = (normal(total, num_values, value_dim), torch.ones_like(state))

    def run(chunks: _Chunks | TritonChunks) -> list[Tensor]:
        final = chunks.pass_states(state)
        return [chunks.outputs(), final, *chunks.gradients(*upstream)]

    with torch.no_grad():
        wanted = run(_Chunks(layout, *(x.float() for x in rows), *gates))
        try:
            got = run(TritonChunks(layout, *rows, *gates))
        except Exception as error:  # Triton's compiler has no error of its own
            warnings.warn(f"our Triton kernels of the delta rule do not run here: {error}", stacklevel=2)
            return None
        errors = [float((x - want).norm() / want.norm()) for x, want in zip(got, wanted, strict=True)]
    largest = max(float("inf") if isnan(error) else error for error in errors)
    if largest >= RIGHT_TO:
        warnings.warn(f"our Triton kernels of the delta rule are off by {largest:.0%} here and not used", stacklevel=2)
    return largest


def _by_fla(
    layout: DeltaLayout, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state_BVHJ: Tensor
) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    out, final = chunk_gated_delta_rule(
        *(x[None] for x in (q, k, v, log_decay.float(), beta)),
        initial_state=state_BVHJ[layout.filled_B],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=layout.filled_cu_seqlens,
        cu_seqlens_cpu=layout.filled_cu_seqlens_cpu,
    )
    return out[0], state_BVHJ.index_copy(0, layout.filled_B, final)


def _by_autograd(
    layout: DeltaLayout, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state_BVHJ: Tensor
) -> tuple[Tensor, Tensor]:
    """On a CPU, in transformers' order of operations: the gradient of a decay is a small difference of large sums, so
    another order, though as exact, is another fp32 number."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    if not layout.steps:
        return torch.zeros_like(v), state_BVHJ.to(dtype)
    out_dtype, heads_per_key, scale = v.dtype, v.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    q = layout.to_chunks((_normalize(q.to(dtype)) * scale).repeat_interleave(heads_per_key, 1))
    k = layout.to_chunks(_normalize(k.to(dtype)).repeat_interleave(heads_per_key, 1))
    v, log_decay, beta = (layout.to_chunks(x.to(dtype)) for x in (v, log_decay, beta))
    k_beta = k * beta[..., None]
    within = log_decay.cumsum(-1)
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    pair = (within[..., :, None] - within[..., None, :]).masked_fill(future, float("-inf")).exp()
    system = (k_beta @ k.transpose(-1, -2)) * pair
    attention = (q @ k.transpose(-1, -2)) * pair
    from_start = within.exp()[..., None]
    values, keys = (
        torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        for wanted in (v * beta[..., None], k_beta * from_start)
    )
    q = q * from_start
    k = k * (within[..., -1:] - within).exp()[..., None]
    state, outputs = state_BVHJ.to(dtype)[layout.order_B], []
    for step in layout.steps:
        count = step.stop - step.start
        before = state[:count]
        fresh = values[step] - keys[step] @ before
        outputs.append(q[step] @ before + attention[step] @ fresh)
        after = before * from_start[step, :, -1:] + k[step].transpose(-1, -2) @ fresh
        state = torch.cat([after, state[count:]])
    return layout.from_chunks(torch.cat(outputs)).to(out_dtype), state[layout.rank_B]


class _GatedDeltaRule(torch.autograd.Function):
    """On a GPU: only the inputs are kept for backward, and the chunks computed again."""

    @staticmethod
    def forward(
        ctx: Any, chunked: type[_Chunks | TritonChunks], layout: DeltaLayout, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        *rows, state = inputs
        chunks = chunked(layout, *rows)
        final = chunks.pass_states(state)
        ctx.save_for_backward(*inputs)
        ctx.layout, ctx.chunked = layout, chunked
        return chunks.outputs(), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors  # read once: under activation checkpointing reading recomputes
        *rows, state = inputs
        chunks = ctx.chunked(ctx.layout, *rows)
        chunks.pass_states(state)
        gradients = chunks.gradients(d_out, d_final)
        return None, None, *(g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True))


class _Chunks:
    """All chunks of all documents at once, `[N, heads, C, ...]`.

    Inside a chunk the effect of its tokens on each other is a triangular system. Its solution says what every token
    writes when the chunk starts from a state of zero (`solved`, values), and what it takes back per unit of state
    (`solved`, keys). With the state known, `fresh` is what the tokens really write.
    """

    def __init__(self, layout: DeltaLayout, *inputs: Tensor) -> None:
        q_TKH, k_TKH, v_TVJ, log_decay_TV, beta_TV = self.inputs = inputs
        dtype = torch.promote_types(v_TVJ.dtype, torch.float32)
        self.layout, self.scale = layout, q_TKH.shape[-1] ** -0.5
        self.heads_per_key = v_TVJ.shape[1] // k_TKH.shape[1]
        self.q = layout.to_chunks(_normalize(q_TKH.to(dtype)) * self.scale)
        self.k = layout.to_chunks(_normalize(k_TKH.to(dtype)))
        self.v = layout.to_chunks(v_TVJ.to(dtype))
        self.beta = layout.to_chunks(beta_TV.to(dtype))[..., None]
        # In fp64, because the differences matter: a sum of -1000 in fp32 is off by 6e-5.
        decay = layout.to_chunks(log_decay_TV.double()).cumsum(-1)
        future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=decay.device).triu(1)
        pair = (decay[..., :, None] - decay[..., None, :]).to(dtype)
        self.pair = pair.masked_fill_(future, float("-inf")).exp_()
        self.from_start = decay.to(dtype).exp()[..., None]
        self.to_end = (decay[..., -1:] - decay).to(dtype).exp()[..., None]
        self.attention = self._per_value(self.q @ self.k.mT) * self.pair
        self.overlap = (self._per_value(self.k @ self.k.mT) * self.pair).tril_(-1)
        self.system = self.overlap * self.beta
        wanted = torch.cat([self.v, self._per_value(self.k) * self.from_start], -1) * self.beta
        self.solved = torch.linalg.solve_triangular(self.system, wanted, upper=False, unitriangular=True)
        self.values, self.keys = self.solved.split([v_TVJ.shape[2], k_TKH.shape[2]], -1)
        self.reads = self._per_value(self.q) * self.from_start
        self.writes = self._per_value(self.k) * self.to_end

    def _per_value(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads_per_key, 1)

    def _per_key(self, x: Tensor) -> Tensor:
        summed: Tensor = x.unflatten(1, (-1, self.heads_per_key)).sum(2)
        return summed

    def pass_states(self, state_BVHJ: Tensor) -> Tensor:
        """Take each document's state through its chunks; returns the final states and keeps those between."""
        num_chunks, num_values, _, value_dim = self.v.shape
        state = state_BVHJ.to(self.v.dtype)[self.layout.order_B]
        self.fresh = torch.empty_like(self.v)
        self.states = self.v.new_empty(num_chunks, num_values, self.k.shape[-1], value_dim)
        for here in self.layout.steps:
            active = here.stop - here.start
            self.states[here] = state[:active]
            self.fresh[here] = self.values[here] - self.keys[here] @ state[:active]
            state[:active] *= self.from_start[here, :, -1:]
            state[:active] += self.writes[here].mT @ self.fresh[here]
        return state[self.layout.rank_B]

    def outputs(self) -> Tensor:
        out = self.reads @ self.states + self.attention @ self.fresh
        return self.layout.from_chunks(out).to(self.inputs[2].dtype)

    def gradients(self, d_out: Tensor, d_final: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the five inputs and of the first states, given those of outputs and final states."""
        layout, dtype = self.layout, self.v.dtype
        d_out = layout.to_chunks(d_out.to(dtype))
        d_fresh = self.attention.mT @ d_out
        read_back = self.reads.mT @ d_out
        d_state = d_final.to(dtype)[layout.order_B]
        d_states = torch.empty_like(self.states)
        for here in reversed(layout.steps):
            active = here.stop - here.start
            d_states[here] = d_state[:active]
            d_fresh[here] += self.writes[here] @ d_state[:active]
            d_state[:active] *= self.from_start[here, :, -1:]
            d_state[:active] += read_back[here] - self.keys[here].mT @ d_fresh[here]
        d_keys = d_fresh @ -self.states.mT
        d_wanted = torch.linalg.solve_triangular(
            self.system.mT, torch.cat([d_fresh, d_keys], -1), upper=True, unitriangular=True
        )
        d_system = (d_wanted @ -self.solved.mT).tril_(-1)
        d_attention = d_out @ self.fresh.mT
        d_reads = d_out @ self.states.mT
        d_writes = self.fresh @ d_states.mT
        d_values, d_keys = d_wanted.split([self.v.shape[-1], self.k.shape[-1]], -1)

        d_qk = self._per_key(d_attention * self.pair)
        d_kk = self._per_key(d_system * self.pair * self.beta)
        d_q = self._per_key(d_reads * self.from_start) + d_qk @ self.k
        d_k = self._per_key(d_writes * self.to_end + d_keys * (self.from_start * self.beta))
        d_k += d_qk.mT @ self.q + (d_kk + d_kk.mT) @ self.k
        from_keys = (d_keys * self._per_value(self.k)).sum(-1) * self.from_start[..., 0]
        d_beta = (d_system * self.overlap).sum(-1) + (d_values * self.v).sum(-1) + from_keys

        d_pair = d_system * self.system + d_attention * self.attention
        d_end = (d_writes * self.writes).sum(-1)
        d_decay = d_pair.sum(-1) - d_pair.sum(-2) - d_end
        d_decay += (d_reads * self.reads).sum(-1) + from_keys * self.beta[..., 0]
        d_decay[..., -1] += d_end.sum(-1)
        d_decay[..., -1] += (d_states * self.states).sum((-1, -2)) * self.from_start[..., -1, 0]
        d_log_decay = d_decay.flip(-1).cumsum(-1).flip(-1)

        return (
            _normalize_backward(self.inputs[0].to(dtype), layout.from_chunks(d_q) * self.scale),
            _normalize_backward(self.inputs[1].to(dtype), layout.from_chunks(d_k)),
            layout.from_chunks(d_values * self.beta),
            layout.from_chunks(d_log_decay),
            layout.from_chunks(d_beta),
            d_state[layout.rank_B],
        )


def _normalize_backward(x: Tensor, d_unit: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)
    unit = x * scale
    return scale * (d_unit - unit * (unit * d_unit).sum(-1, keepdim=True))


def gated_delta_step(
    q_BKH: Tensor,
    k_BKH: Tensor,
    v_BVJ: Tensor,
    log_decay_BV: Tensor,
    beta_BV: Tensor,
    state_SVHJ: Tensor,
    slots_B: Tensor,
) -> Tensor:
    """One decode token per sequence. Reads and replaces the rows `slots_B` of the pool of states (fp32), in place."""
    if _fits_the_step_kernel(k_BKH, v_BVJ, state_SVHJ):
        from lockstep.kernels.gated_delta_step_triton import gated_delta_step_triton

        return gated_delta_step_triton(q_BKH, k_BKH, v_BVJ, log_decay_BV, beta_BV, state_SVHJ, slots_B)
    return gated_delta_step_reference(q_BKH, k_BKH, v_BVJ, log_decay_BV, beta_BV, state_SVHJ, slots_B)


def _fits_the_step_kernel(k_BKH: Tensor, v_BVJ: Tensor, state_SVHJ: Tensor) -> bool:
    dims_fit = all(dim >= 16 and dim.bit_count() == 1 for dim in (k_BKH.shape[2], v_BVJ.shape[2]))
    is_fp32_pool = state_SVHJ.dtype == torch.float32 and state_SVHJ.is_contiguous()
    return state_SVHJ.is_cuda and dims_fit and is_fp32_pool and installed("triton") is not None


def gated_delta_step_reference(
    q_BKH: Tensor,
    k_BKH: Tensor,
    v_BVJ: Tensor,
    log_decay_BV: Tensor,
    beta_BV: Tensor,
    state_SVHJ: Tensor,
    slots_B: Tensor,
) -> Tensor:
    """The specification of `gated_delta_step`."""
    dtype = state_SVHJ.dtype
    heads_per_key = v_BVJ.shape[1] // k_BKH.shape[1]
    q_BVH = (_normalize(q_BKH.to(dtype)) * q_BKH.shape[-1] ** -0.5).repeat_interleave(heads_per_key, 1)
    k_BVH = _normalize(k_BKH.to(dtype)).repeat_interleave(heads_per_key, 1)
    out_BVJ, state_BVHJ = _one_token(
        q_BVH, k_BVH, v_BVJ.to(dtype), log_decay_BV.to(dtype).exp(), beta_BV.to(dtype), state_SVHJ[slots_B]
    )
    state_SVHJ.index_copy_(0, slots_B, state_BVHJ)
    return out_BVJ.to(v_BVJ.dtype)
