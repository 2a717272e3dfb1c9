from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep.kernels.attention import packed_attention_reference
from lockstep.kernels.norm_rotary import norm_and_rotate
from lockstep.kernels.paged_attention import length_bias, norm_rotate_store, paged_attention, paged_decode, store_kv

BLOCK_SIZE, KEYS, HEADS, DIM = 2, 2, 4, 8


def heads(length: int, num_heads: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed + num_heads)
    return torch.randn(length, num_heads, DIM, generator=draw, dtype=torch.float64)


def paged(lengths: list[int], block_tables: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A cache with those keys and values, in order of sequences; elsewhere numbers that would show."""
    kv_cache = torch.full((2, KEYS, 8, BLOCK_SIZE, DIM), 1e9, dtype=torch.float64)
    slots = [
        BLOCK_SIZE * int(block_tables[row, position // BLOCK_SIZE]) + position % BLOCK_SIZE
        for row, length in enumerate(lengths)
        for position in range(length)
    ]
    store_kv(k, v, kv_cache, torch.tensor(slots))
    return kv_cache


def test_new_tokens_attend_to_all_cached_tokens_of_their_own_sequence() -> None:
    """Two sequences in scattered blocks of two slots, one with two new tokens and one with three."""
    lengths, new = [7, 4], [2, 3]
    q, k, v = heads(11, HEADS), heads(11, KEYS), heads(11, KEYS, seed=1)
    block_tables = torch.tensor([[4, 1, 0, 7], [3, 5, 0, 0]])
    # Blocks may be shared: the last of the first sequence's is nobody else's.
    block_tables[0, 2] = 2
    kv_cache = paged(lengths, block_tables, k, v)
    wanted = packed_attention_reference(q, k, v, lengths).split(lengths)
    queries = torch.zeros(2, 3, HEADS, DIM, dtype=torch.float64)
    bias = torch.full((2, 3, 8), float("-inf"), dtype=torch.float64)
    for row, (length, count) in enumerate(zip(lengths, new, strict=True)):
        queries[row, :count] = q.split(lengths)[row][length - count :]
        for column in range(count):
            bias[row, column, : length - count + column + 1] = 0
    bias[0, 2, 0] = 0  # a padded query must see something
    got = paged_attention(queries, kv_cache, block_tables, bias)
    for row, count in enumerate(new):
        # Scores go through softmax in fp32, whatever the inputs are.
        torch.testing.assert_close(got[row, :count], wanted[row][-count:], rtol=1e-5, atol=1e-5)


def test_one_new_token_per_sequence_sees_as_many_slots_as_its_length_says() -> None:
    """Rows of length 0 stand for nobody and get zeros; a length may end inside a block."""
    lengths = [5, 0, 1, 4]
    block_tables = torch.tensor([[4, 1, 6], [0, 0, 0], [3, 0, 0], [5, 2, 0]])
    q, k, v = heads(10, HEADS), heads(10, KEYS), heads(10, KEYS, seed=1)
    kv_cache = paged(lengths, block_tables, k, v)
    ends = torch.tensor(lengths).cumsum(0)
    lengths_B = torch.tensor(lengths, dtype=torch.int32)
    got = paged_decode(q[ends - 1], kv_cache, block_tables, lengths_B)
    wanted = packed_attention_reference(q, k, v, [5, 1, 4])[[4, 5, 9]]
    torch.testing.assert_close(got[[0, 2, 3]], wanted, rtol=1e-5, atol=1e-5)
    assert not got[1].any()
    shared_bias = length_bias(lengths_B, 3 * BLOCK_SIZE, torch.float64)
    assert torch.equal(paged_decode(q[ends - 1], kv_cache, block_tables, lengths_B, shared_bias), got)


@pytest.mark.parametrize("slots", [[3, -1, 15, 0], [-1, -1, -1, -1], [1, 2, 3, 4]])
def test_keys_and_values_go_to_their_slots_and_nowhere_without_one(slots: list[int]) -> None:
    k, v = heads(4, KEYS), heads(4, KEYS, seed=1)
    kv_cache = torch.zeros(2, KEYS, 8, BLOCK_SIZE, DIM, dtype=torch.float64)
    store_kv(k, v, kv_cache, torch.tensor(slots, dtype=torch.int32))
    for slot in range(16):
        stored = kv_cache[:, :, slot // BLOCK_SIZE, slot % BLOCK_SIZE]
        wanted = torch.stack([k, v])[:, slots.index(slot)] if slot in slots else torch.zeros_like(stored)
        assert torch.equal(stored, wanted)


def test_norm_rotation_and_store_at_once_are_the_three_in_turn() -> None:
    q, k, v = heads(3, HEADS), heads(3, KEYS), heads(3, KEYS, seed=1)
    q_weight, k_weight = heads(2, 1)[:, 0]
    tables = heads(3, 1, seed=2)[..., :4], heads(3, 1, seed=3)[..., :4]
    slots = torch.tensor([5, 0, 9])
    kv_cache = torch.zeros(2, KEYS, 8, BLOCK_SIZE, DIM, dtype=torch.float64)
    got = norm_rotate_store(q, k, v, q_weight, k_weight, 1e-6, 1.0, tables, kv_cache, slots)
    assert torch.equal(got, norm_and_rotate(q, q_weight, 1e-6, 1.0, tables))
    in_slots = kv_cache.flatten(2, 3)[:, :, slots].transpose(1, 2)
    assert torch.equal(in_slots[0], norm_and_rotate(k, k_weight, 1e-6, 1.0, tables))
    assert torch.equal(in_slots[1], v)
