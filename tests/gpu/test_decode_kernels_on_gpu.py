"""The kernels of a decoding step against their specifications, on fresh inputs and in memory full of NaN.

"As good as plain" is: an error in norm, against fp64 on the same bf16 inputs, at most twice that of torch's own
operations in bf16, or one rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lockstep.kernels.decode_experts import decode_experts
from lockstep.kernels.decode_linears import linears, swiglu_linear
from lockstep.kernels.experts import experts_reference
from lockstep.kernels.norm_rotary import norm_and_rotate
from lockstep.kernels.paged_attention import norm_rotate_store, paged_decode, paged_decode_reference, store_kv
from lockstep.kernels.sample import sample_tokens

GPU = torch.device("cuda")
Outputs = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def no_gradients() -> object:
    with torch.inference_mode():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(GPU).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, device=GPU).bfloat16()


def twice_in_poisoned_memory(run: Outputs) -> list[Tensor]:
    """What it returns, the same bits both times, from memory that held NaN before."""
    results = []
    for _ in range(2):
        torch.cuda.empty_cache()
        poison = [torch.full((size,), float("nan"), device=GPU) for size in (2**24, 2**18, 2**10, 2**7)]
        torch.cuda.synchronize()
        del poison
        results.append([x.clone() for x in run()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other), "the bits differ between two runs"
    return results[0]


def check(run: Callable[[], Tensor], plain: Tensor, wanted: Tensor) -> None:
    (got,) = twice_in_poisoned_memory(lambda: [run()])
    assert got.shape == wanted.shape
    error, allowed = ((x.double() - wanted.double()).norm() for x in (got, plain))
    one_rounding = torch.finfo(torch.bfloat16).eps / 2 * wanted.norm()
    assert error <= max(2 * allowed, one_rounding), (float(error), float(allowed), float(one_rounding))


class Paged:
    """Queries and a cache for sequences of these lengths, their blocks in random order."""

    def __init__(self, lengths: list[int], heads: int, keys: int, head_dim: int, block_size: int) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + heads)
        blocks = [-(-length // block_size) for length in lengths]
        self.tables = torch.zeros(len(lengths), max(blocks) + 1, dtype=torch.int32)
        order = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
        for row, count in zip(self.tables, blocks, strict=True):
            row[:count] = torch.tensor([order.pop() for _ in range(count)])
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=GPU)
        self.tables = self.tables.to(GPU)
        self.cache = draw(2, keys, sum(blocks) + 3, block_size, head_dim)
        self.q = draw(len(lengths), heads, 2 * head_dim).chunk(2, -1)[0]
        self.plain = paged_decode_reference(self.q, self.cache, self.tables, self.lengths)
        self.wanted = paged_decode_reference(self.q.double(), self.cache.double(), self.tables, self.lengths)
        self._spoil_the_rest(blocks, block_size)

    def _spoil_the_rest(self, blocks: list[int], block_size: int) -> None:
        is_used = torch.zeros(self.cache.shape[2], block_size, dtype=torch.bool, device=GPU)
        for row, count in enumerate(blocks):
            length = int(self.lengths[row])
            own = self.tables[row, :count].long()
            is_used[own] = True
            if length % block_size:
                is_used[own[-1], length % block_size :] = False
            self.tables[row, count:] = 10**9
        self.cache[:, :, ~is_used] = float("nan")

    def run(self) -> Tensor:
        return paged_decode(self.q, self.cache, self.tables, self.lengths)


LONG_TAIL = [1, 2, 16, 17, 0, 63, 64, 65, 700, 9000, 33, 0]


@pytest.mark.parametrize("lengths", [LONG_TAIL, [1], [4097], [0, 0], [300] * 130, [0] * 20 + [128] * 300])
@pytest.mark.parametrize(
    ("heads", "keys", "head_dim", "block_size"),
    [(32, 4, 128, 16), (32, 8, 128, 64), (16, 2, 256, 16), (16, 2, 256, 256), (4, 4, 64, 32), (5, 1, 128, 128)],
)
def test_one_new_token_sees_its_own_cache_and_nothing_else(
    lengths: list[int], heads: int, keys: int, head_dim: int, block_size: int
) -> None:
    case = Paged(lengths, heads, keys, head_dim, block_size)
    check(case.run, case.plain, case.wanted)


def test_every_row_alone_is_as_good_as_in_a_crowd() -> None:
    """Errors must not hide in the norm of all rows."""
    case = Paged(LONG_TAIL, 32, 4, 128, 16)
    got = case.run()
    for row in range(len(LONG_TAIL)):
        error, allowed = ((x[row].double() - case.wanted[row]).norm() for x in (got, case.plain))
        assert error <= max(2 * allowed, 2**-8 * case.wanted[row].norm())


@pytest.mark.parametrize(("keys", "head_dim"), [(1, 64), (2, 256), (4, 128), (8, 128)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_keys_and_values_go_to_their_slots(keys: int, head_dim: int, kind: torch.dtype) -> None:
    slots = torch.tensor([3, -1, 79, 0, -1, 40], dtype=kind, device=GPU)
    k, v = draw(6, keys, head_dim), draw(6, keys, 2 * head_dim, seed=1).chunk(2, -1)[1]
    cache = torch.full((2, keys, 5, 16, head_dim), 7.0, dtype=torch.bfloat16, device=GPU)
    wanted = cache.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            wanted[0, :, slot // 16, slot % 16], wanted[1, :, slot // 16, slot % 16] = k[row], v[row]
    store_kv(k, v, cache, slots)
    assert torch.equal(cache, wanted)


@pytest.mark.parametrize(
    ("rows", "heads", "keys", "dim", "turned", "offset"),
    [(1, 32, 4, 128, 128, 0.0), (70, 32, 8, 128, 128, 0.0), (9, 16, 2, 256, 64, 1.0), (3, 3, 1, 64, 64, 0.0)],
)
def test_norm_rotation_and_store_at_once_give_the_bits_of_the_separate_ones(
    rows: int, heads: int, keys: int, dim: int, turned: int, offset: float
) -> None:
    q, k, v = draw(rows, heads, 2 * dim).chunk(2, -1)[0], draw(rows, keys, dim, seed=1), draw(rows, keys, dim, seed=2)
    weights, tables = (draw(dim), draw(dim, seed=1)), (draw(rows, 1, turned), draw(rows, 1, turned, seed=1))
    slots = torch.randperm(10 * 16, generator=torch.Generator().manual_seed(rows))[:rows].to(GPU)
    slots[rows // 2] = -1
    cache, wanted_cache = (torch.zeros(2, keys, 10, 16, dim, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    wanted = norm_and_rotate(q, weights[0], 1e-6, offset, tables)
    store_kv(norm_and_rotate(k, weights[1], 1e-6, offset, tables), v, wanted_cache, slots)
    (got,) = twice_in_poisoned_memory(
        lambda: [norm_rotate_store(q, k, v, *weights, 1e-6, offset, tables, cache, slots)]
    )
    assert torch.equal(got, wanted)
    assert torch.equal(cache, wanted_cache)


def routes(tokens: int, experts: int, slots: int) -> Tensor:
    """Distinct experts; the last quarter gets none, the first many; some slots belong to nobody here."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, experts - experts // 4, generator=generator)
    scores[:, 0] += 0.5
    chosen = scores.topk(slots).indices
    chosen[torch.rand(tokens, slots, generator=generator) < 0.1] = experts
    chosen[-1, -1] = -1
    return chosen.to(GPU)


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 33, 200, 512])
@pytest.mark.parametrize(
    ("experts", "slots", "width", "inner"),
    [(16, 4, 256, 192), (128, 8, 2048, 768), (64, 10, 512, 512), (8, 1, 144, 40)],
)
def test_experts_of_few_tokens_are_as_good_as_plain(
    tokens: int, experts: int, slots: int, width: int, inner: int
) -> None:
    if tokens == 0:
        empty = decode_experts(draw(0, 64), draw(0, 2).long(), draw(0, 2), draw(4, 32, 64), draw(4, 64, 16))
        assert empty.shape == (0, 64)
        return
    chosen, x, weights = routes(tokens, experts, slots), draw(tokens, width), draw(tokens, slots).abs()
    gate_up, down = draw(experts, 2 * inner, width) / width**0.5, draw(experts, width, inner) / inner**0.5
    plain = experts_reference(x, chosen, weights, gate_up, down)
    wanted = experts_reference(*(t if t is chosen else t.double() for t in (x, chosen, weights, gate_up, down)))
    check(lambda: decode_experts(x, chosen, weights, gate_up, down), plain, wanted)
    unrounded = decode_experts(x, chosen, weights, gate_up, down, torch.float32)
    assert torch.equal(unrounded.bfloat16(), decode_experts(x, chosen, weights, gate_up, down))


@pytest.mark.parametrize("tokens", [3, 100])
def test_a_tokens_experts_do_not_depend_on_the_tokens_beside_it(tokens: int) -> None:
    chosen, x, weights = routes(tokens, 16, 4), draw(tokens, 256), draw(tokens, 4)
    gate_up, down = draw(16, 384, 256) / 16, draw(16, 256, 192) / 14
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(GPU)
    one = decode_experts(x, chosen, weights, gate_up, down)
    other = decode_experts(x[order], chosen[order], weights[order], gate_up, down)
    assert torch.equal(one[order], other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 151_936), (300, 151_936), (40, 5000), (7, 100)])
def test_tokens_stand_where_their_numbers_fall_in_the_distribution(
    rows: int, vocabulary: int, dtype: torch.dtype
) -> None:
    """Against the cumulative distribution in fp64; entropies from a fraction of a nat to many."""
    generator = torch.Generator(GPU).manual_seed(rows)
    peaks = torch.linspace(0.5, 12, rows, device=GPU)[:, None]
    logits = (torch.randn(rows, vocabulary, device=GPU, generator=generator) * peaks).to(dtype)
    logits[0, : vocabulary // 2] = float("-inf")
    temperatures = torch.rand(rows, device=GPU, generator=generator) + 0.3
    temperatures[rows // 3] = 1.0
    temperatures[1::5] = 0.0
    uniforms = torch.rand(rows, dtype=torch.float64, device=GPU, generator=generator)
    uniforms[-1], uniforms[rows // 2] = 0.0, 1 - 2.0**-53
    tokens, log_probs = twice_in_poisoned_memory(lambda: list(sample_tokens(logits, temperatures, uniforms)))
    is_greedy = temperatures == 0
    probs = (logits.double() / temperatures.double().masked_fill(is_greedy, 1.0)[:, None]).softmax(-1)
    own = probs.gather(1, tokens[:, None]).squeeze(1)
    ends = probs.cumsum(1).gather(1, tokens[:, None]).squeeze(1)
    places = torch.arange(vocabulary, device=GPU).where(logits == logits.amax(1, keepdim=True), vocabulary)
    assert torch.equal(tokens[is_greedy], places.amin(1)[is_greedy])
    assert bool((own > 0).all())
    assert bool(((ends - own - 1e-6 <= uniforms) & (uniforms <= ends + 1e-6))[~is_greedy].all())
    torch.testing.assert_close(log_probs.double(), own.log(), rtol=1e-6, atol=1e-5)


def test_of_equal_largest_logits_the_first_is_taken() -> None:
    logits = torch.zeros(2, 9000, dtype=torch.bfloat16, device=GPU)
    logits[0, [4500, 300, 8000]] = 3.0
    tokens, _ = sample_tokens(logits, torch.zeros(2, device=GPU), torch.zeros(2, dtype=torch.float64, device=GPU))
    assert tokens.tolist() == [300, 0]


@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17])
@pytest.mark.parametrize(("width", "sizes"), [(2560, (4096, 1024, 1024)), (144, (72, 40)), (9728, (2560,))])
def test_products_of_few_rows_are_as_good_as_plain(rows: int, width: int, sizes: tuple[int, ...]) -> None:
    x, weights = draw(rows, width), [draw(size, width, seed=i) / width**0.5 for i, size in enumerate(sizes)]
    for number, weight in enumerate(weights):
        check(
            lambda number=number: linears(x, weights)[number],  # type: ignore[misc]
            F.linear(x, weight),
            F.linear(x.double(), weight.double()),
        )
    gate, up = weights[0], draw(sizes[0], width, seed=9) / width**0.5
    wide = [F.linear(x.double(), w.double()) for w in (gate, up)]
    plain = F.silu(F.linear(x, gate)) * F.linear(x, up)
    check(lambda: swiglu_linear(x, gate, up), plain, F.silu(wide[0]) * wide[1])


def test_a_captured_graph_follows_its_inputs() -> None:
    """Lengths, routes, slots and temperatures change between replays; the graph gives what the calls give."""
    case = Paged([200] * 8, 16, 4, 128, 16)
    case.cache.nan_to_num_()
    k, v = draw(8, 4, 128), draw(8, 4, 128, seed=1)
    slots = torch.arange(8, device=GPU)
    x, chosen, weights = draw(8, 256), routes(8, 16, 4), draw(8, 4)
    gate_up, down = draw(16, 384, 256) / 16, draw(16, 256, 192) / 14
    logits, temperatures = draw(8, 9000), torch.ones(8, device=GPU)
    uniforms = torch.linspace(0, 0.99, 8, dtype=torch.float64, device=GPU)

    def run() -> list[Tensor]:
        store_kv(k, v, case.cache, slots)
        outputs = [case.run(), decode_experts(x, chosen, weights, gate_up, down)]
        outputs += [*linears(x, [gate_up[0], down[0].T.contiguous()]), *sample_tokens(logits, temperatures, uniforms)]
        return [*outputs, case.cache]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(3):
        case.lengths.copy_(torch.randint(0, 200, (8,), generator=torch.Generator().manual_seed(seed)))
        slots.copy_(torch.randperm(100)[:8] - 5).clamp_(min=-1)
        chosen.copy_(routes(8 + seed, 16, 4)[:8])
        x.copy_(draw(8, 256, seed=seed))
        temperatures.fill_(seed / 2)
        graph.replay()
        got = [x.clone() for x in captured]
        for one, other in zip(got, run(), strict=True):
            assert torch.equal(one, other)
