"""One decode token of the gated delta rule as one Triton kernel. Imported only where there is a GPU.

The state is by far the largest thing that a token touches: the kernel reads and writes it once, in place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _WARPS = 32, 4
"""Value dims and warps of one program: the fastest of six tried on an H200."""


def gated_delta_step_triton(
    q_BKH: Tensor,
    k_BKH: Tensor,
    v_BVJ: Tensor,
    log_decay_BV: Tensor,
    beta_BV: Tensor,
    state_SVHJ: Tensor,
    slots_B: Tensor,
) -> Tensor:
    """`gated_delta_step` for a contiguous pool of states, with H and J powers of two, at least 16."""
    num_keys, key_dim = q_BKH.shape[1:]
    batch, num_values, value_dim = v_BVJ.shape
    out_BVJ = torch.empty_like(v_BVJ, memory_format=torch.contiguous_format)
    columns = min(_COLUMNS, value_dim)
    _step_kernel[(value_dim // columns, batch * num_values)](
        q_BKH.contiguous(),
        k_BKH.contiguous(),
        v_BVJ.contiguous(),
        log_decay_BV.contiguous(),
        beta_BV.contiguous(),
        state_SVHJ,
        slots_B,
        out_BVJ,
        key_dim**-0.5,
        NUM_KEYS=num_keys,
        NUM_VALUES=num_values,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        COLUMNS=columns,
        num_warps=_WARPS,
    )
    return out_BVJ


@triton.jit  # type: ignore[untyped-decorator]
def _step_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    log_decay_ptr,
    beta_ptr,
    state_ptr,
    slots_ptr,
    out_ptr,
    scale,
    NUM_KEYS: tl.constexpr,
    NUM_VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1)
    batch, value_head = row // NUM_VALUES, row % NUM_VALUES
    key_row = batch * NUM_KEYS + value_head // (NUM_VALUES // NUM_KEYS)
    h = tl.arange(0, KEY_DIM)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    q = tl.load(q_ptr + key_row * KEY_DIM + h).to(tl.float32)
    k = tl.load(k_ptr + key_row * KEY_DIM + h).to(tl.float32)
    q = q * (scale / tl.sqrt(tl.sum(q * q) + 1e-6))
    k = k / tl.sqrt(tl.sum(k * k) + 1e-6)
    v = tl.load(v_ptr + row * VALUE_DIM + j).to(tl.float32)
    decay = tl.exp(tl.load(log_decay_ptr + row).to(tl.float32))
    beta = tl.load(beta_ptr + row).to(tl.float32)
    slot = tl.load(slots_ptr + batch).to(tl.int64)
    cells = state_ptr + (slot * NUM_VALUES + value_head) * KEY_DIM * VALUE_DIM + h[:, None] * VALUE_DIM + j[None, :]
    state = tl.load(cells) * decay
    delta = (v - tl.sum(state * k[:, None], 0)) * beta
    state += k[:, None] * delta[None, :]
    tl.store(cells, state)
    tl.store(out_ptr + row * VALUE_DIM + j, tl.sum(state * q[:, None], 0).to(out_ptr.dtype.element_ty))
