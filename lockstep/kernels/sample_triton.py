"""The Triton kernels of `lockstep.kernels.sample`. Import it only where there is a GPU.

The first reads all logits once and leaves the largest of every chunk and the chunk's sum of exponentials. The second
finds the chunk in which the uniform number falls, reads that chunk again, and finds the token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lockstep.kernels.overlap_triton import begin, overlapping

_CHUNK = 4096
"""Logits that a program holds at once."""


def sample_tokens_triton(logits_BV: Tensor, temperatures_B: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """`sample_tokens` for logits that lie in order within a row."""
    if logits_BV.stride(1) != 1:
        logits_BV = logits_BV.contiguous()
    return sample_chunks(logits_BV, temperatures_B, uniforms_B, _CHUNK)


def sample_chunks(logits_BV: Tensor, temperatures_B: Tensor, uniforms_B: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    batch, vocabulary = logits_BV.shape
    device = logits_BV.device
    tokens_B = torch.empty(batch, dtype=torch.int64, device=device)
    log_probs_B = torch.empty(batch, dtype=torch.float32, device=device)
    if batch == 0:
        return tokens_B, log_probs_B
    chunks = triton.cdiv(vocabulary, chunk)
    largest_BC, totals_BC = torch.empty((2, batch, chunks), dtype=torch.float32, device=device)
    best_BC = torch.empty((batch, chunks), dtype=torch.int32, device=device)
    common = logits_BV, temperatures_B, largest_BC, totals_BC, best_BC
    overlap = overlapping(device)
    _summarize[(chunks, batch)](*common, vocabulary, logits_BV.stride(0), chunks, CHUNK=chunk, num_warps=4, **overlap)
    _draw[(batch,)](
        *common, uniforms_B, tokens_B, log_probs_B, vocabulary, logits_BV.stride(0), chunks,
        CHUNK=chunk, CHUNKS=triton.next_power_of_2(chunks), num_warps=8, **overlap,
    )  # fmt: skip
    return tokens_B, log_probs_B


@triton.jit
def _scale_of(temperatures, row):  # type: ignore[no-untyped-def]
    """The temperature, 1 for a greedy row, and log2(e) over it."""
    temperature = tl.load(temperatures + row).to(tl.float32)
    temperature = tl.where(temperature == 0.0, 1.0, temperature)
    return temperature, 1.4426950408889634 / temperature


@triton.jit  # type: ignore[untyped-decorator]
def _summarize(  # type: ignore[no-untyped-def]
    logits, temperatures, largest_ptr, totals, best, vocabulary, row_stride, chunks,
    CHUNK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    chunk, row = tl.program_id(0), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    line = logits + row.to(tl.int64) * row_stride
    x = tl.load(line + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    _, scale = _scale_of(temperatures, row)
    largest = tl.max(x, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    place = row * chunks + chunk
    tl.store(largest_ptr + place, largest)
    tl.store(totals + place, tl.sum(tl.exp2((x - shift) * scale), 0))
    tl.store(best + place, tl.min(tl.where(x == largest, column, vocabulary), 0))


@triton.jit  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    logits, temperatures, largest_ptr, totals, best, uniforms, tokens, log_probs, vocabulary, row_stride, chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    begin(OVERLAPS)
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * row_stride
    temperature, scale = _scale_of(temperatures, row)
    number = tl.arange(0, CHUNKS)
    is_chunk = number < chunks
    largest_C = tl.load(largest_ptr + row * chunks + number, mask=is_chunk, other=float("-inf"))
    largest = tl.max(largest_C, 0)
    totals_C = tl.load(totals + row * chunks + number, mask=is_chunk, other=0.0)
    mass_C = totals_C.to(tl.float64) * tl.exp2((largest_C - largest) * scale).to(tl.float64)
    mass = tl.sum(mass_C, 0)

    threshold = tl.load(uniforms + row).to(tl.float64) * mass
    # Rounding may leave the threshold past the last step: then the last chunk and the last token of some mass.
    last_chunk = tl.max(tl.where(mass_C > 0.0, number, 0), 0)
    chunk = tl.min(tl.where(tl.cumsum(mass_C, 0) > threshold, number, last_chunk), 0)
    before = tl.sum(tl.where(number < chunk, mass_C, 0.0), 0)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(line + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
    probs = tl.exp2((x - largest) * scale)
    last_token = tl.max(tl.where(probs > 0.0, column, 0), 0)
    is_past = before + tl.cumsum(probs.to(tl.float64), 0) > threshold
    token = tl.min(tl.where(is_past, column, last_token), 0)
    if tl.load(temperatures + row) == 0.0:
        first_best = tl.min(tl.where(largest_C == largest, number, chunks - 1), 0)
        token = tl.load(best + row * chunks + first_best)
    logit = tl.load(line + token).to(tl.float32)
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(log_probs + row, tl.div_rn(logit - largest, temperature) - tl.log(mass.to(tl.float32)))
