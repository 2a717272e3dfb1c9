"""The scheduled tokens of some sequences, packed into rows, after whatever the caches already hold of them.

T scheduled tokens, L cached ones (the scheduled among them), B sequences, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.attention import SegmentAttention
from lockstep.kernels.packed import PackedDocuments
from lockstep.kernels.paged_attention import store_kv
from lockstep.rollout.embedded.caches import Caches, PackedStates
from lockstep.rollout.embedded.sequence import Sequence


class PackedSequences(PackedStates):
    """`TokenMixer` without padding: fresh prompts, chunks of long ones and ends of shared ones in one pass.

    New keys and values are stored before attention reads, so sequences may share blocks that one of them is filling.

    Args:
        send: copies lists of whole numbers to the caches' device.
    """

    def __init__(self, sequences: list[Sequence], caches: Caches, send: Callable[..., list[Tensor]]) -> None:
        self.caches = caches
        self.lengths = [s.num_scheduled_tokens for s in sequences]
        starts = [s.num_computed_tokens for s in sequences]
        ends = [start + length for start, length in zip(starts, self.lengths, strict=True)]
        slots_of = [_slots(s.block_table, end, caches.block_size) for s, end in zip(sequences, ends, strict=True)]
        self.slots_T = np.concatenate([slots[start:] for slots, start in zip(slots_of, starts, strict=True)])
        self.last_rows = (np.cumsum(self.lengths) - 1).tolist()
        self.has_context = any(starts)
        self.key_lengths = ends
        self.input_ids, self.positions, self.slots, self.key_slots = send(
            [t for s, start, end in zip(sequences, starts, ends, strict=True) for t in s.tokens[start:end]],
            np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)]),
            self.slots_T,
            np.concatenate(slots_of) if self.has_context else [],
        )
        self.state_slots, is_fresh = send([s.state_slot for s in sequences], [start == 0 for start in starts])
        self.is_fresh = is_fresh.bool()
        self.packed = PackedDocuments(self.lengths, self.input_ids.device)
        self.segments = SegmentAttention(self.lengths, self.key_lengths, self.input_ids.device)

    def attend(self, attention_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        cache = self.caches.kv[attention_index]
        store_kv(k_TKH, v_TKH, cache, self.slots)
        if not self.has_context and not q_TNH.is_cuda:
            return self.packed.attend(attention_index, q_TNH, k_TKH, v_TKH)
        if self.has_context:
            k_TKH, v_TKH = cache.flatten(2, 3).index_select(2, self.key_slots).transpose(1, 2)
        if not q_TNH.is_cuda:
            return _attention_by_sequence(q_TNH, k_TKH, v_TKH, self.lengths, self.key_lengths)
        return self.segments(q_TNH, k_TKH, v_TKH)

    def _earlier(self, pool: Tensor) -> Tensor | None:
        """States to go on from; a fresh sequence's row still holds another's."""
        if not self.has_context:
            return None
        earlier = pool[self.state_slots]
        return earlier.masked_fill_(self.is_fresh.view(-1, *[1] * (earlier.dim() - 1)), 0.0)


def _slots(block_table: list[int], num_tokens: int, block_size: int) -> np.ndarray:
    slots = (np.array(block_table)[:, None] * block_size + np.arange(block_size)).ravel()
    return slots[:num_tokens]


def _attention_by_sequence(
    q_TNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, lengths: list[int], key_lengths: list[int]
) -> Tensor:
    """The specification: a sequence's queries are the last of its keys."""
    outputs = []
    for q, k, v in zip(q_TNH.split(lengths), k_LKH.split(key_lengths), v_LKH.split(key_lengths), strict=True):
        is_seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)
