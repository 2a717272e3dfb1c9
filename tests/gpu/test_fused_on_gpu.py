"""The fused kernels against their specifications: bf16 against fp64 on the same inputs, gradients too.

"As good as plain" is: an error in norm at most twice that of torch's own operations in bf16, or one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lockstep.kernels.experts import experts_reference, grouped_experts
from lockstep.kernels.linear_log_probs import KeptTokens, linear_log_probs, linear_log_probs_reference
from lockstep.kernels.norm_rotary import norm_and_rotate, rotate
from lockstep.kernels.packed import PackedDocuments
from lockstep.kernels.rms_norm import residual_rms_norm, rms_norm, rms_norm_reference
from lockstep.kernels.slots import Slots, collect, spread
from lockstep.kernels.swiglu import swiglu, weighted_swiglu
from lockstep.kernels.top_k import top_k
from lockstep.models import build_model, read_model_config
from lockstep.models.language_model import run_layer

GPU = torch.device("cuda")


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(GPU, torch.bfloat16)


def routes(tokens: int, experts: int, slots: int, seed: int = 0) -> Tensor:
    """Distinct experts for every token; the last quarter of the experts gets none."""
    generator = torch.Generator().manual_seed(seed + tokens)
    return torch.rand(tokens, experts - experts // 4, generator=generator).topk(slots).indices.to(GPU)


def values_and_gradients(function: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What the function returns of these inputs in this type, and the gradients of a random sum of it."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    upstream = [draw(*x.shape, seed=100 + i).to(x.dtype) for i, x in enumerate(outs)]
    gradients = torch.autograd.grad(outs, leaves, upstream)
    assert [g.dtype for g in gradients] == [dtype] * len(leaves)
    return [*(x.detach() for x in outs), *gradients]


def check(fused: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Fused is as good as plain, and gives the same bits again."""
    wanted = values_and_gradients(plain, inputs, torch.float64)
    naive = values_and_gradients(plain, inputs, torch.bfloat16)
    got = values_and_gradients(fused, inputs, torch.bfloat16)
    again = values_and_gradients(fused, inputs, torch.bfloat16)
    for one, other, plain_one, want in zip(got, again, naive, wanted, strict=True):
        assert torch.equal(one, other), "the bits differ between two runs"
        assert one.shape == want.shape
        error, allowed = ((x.double() - want).norm() for x in (one, plain_one))
        one_rounding = torch.finfo(one.dtype).eps / 2 * want.norm()
        assert error <= max(2 * allowed, one_rounding), (float(error), float(allowed), float(one_rounding))


@pytest.mark.parametrize("shape", [(0, 64), (1, 8), (37, 200), (33, 2500), (2, 3, 40)])
def test_swiglu_is_as_good_as_plain(shape: tuple[int, ...]) -> None:
    check(swiglu, lambda gate, up: F.silu(gate) * up, [draw(*shape), draw(*shape, seed=1)])


@pytest.mark.parametrize(("tokens", "slots", "width"), [(0, 2, 64), (1, 1, 8), (19, 3, 200), (40, 8, 768)])
def test_weighted_swiglu_is_as_good_as_plain(tokens: int, slots: int, width: int) -> None:
    sorted_slots = Slots.of(routes(tokens, 16, slots), 16)

    def plain(gate_up: Tensor, weights: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up * weights.flatten()[sorted_slots.slot_R].unsqueeze(1)

    inputs = [draw(tokens * slots, 2 * width), draw(tokens, slots)]
    check(lambda gate_up, weights: weighted_swiglu(gate_up, weights, sorted_slots), plain, inputs)


@pytest.mark.parametrize(
    ("tokens", "slots", "width"), [(0, 2, 64), (1, 1, 8), (19, 3, 200), (40, 8, 2048), (3, 2, 2500)]
)
def test_rows_go_to_their_experts_and_come_back_summed(tokens: int, slots: int, width: int) -> None:
    chosen = routes(tokens, 16, slots)
    there = Slots.of(chosen, 16)
    by_expert = sorted((int(e), t) for t in range(tokens) for e in chosen[t])
    x = draw(tokens, width)
    assert torch.equal(spread(x, there), x[[t for _, t in by_expert]])
    assert there.ends_E.tolist() == [sum(e <= expert for e, _ in by_expert) for expert in range(16)]
    check(lambda x: spread(x, there), lambda x: x[there.slot_R // slots], [x])
    check(lambda r: collect(r, there), lambda r: r[there.row_TS].sum(1), [draw(tokens * slots, width)])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("rows", "width"), [(0, 64), (1, 64), (37, 200), (2100, 96), (5, 2560)])
def test_the_norm_and_the_stream_it_passes_are_as_good_as_plain(rows: int, width: int, offset: float) -> None:
    def plain(x: Tensor, update: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + update, rms_norm_reference(x + update, weight, 1e-6, offset)

    x, update, weight = draw(rows, width), draw(rows, width, seed=1), draw(width)
    check(lambda x, u, w: residual_rms_norm(x, u, w, 1e-6, offset), plain, [x, update, weight])
    check(
        lambda x, w: residual_rms_norm(x, None, w, 1e-6, offset),
        lambda x, w: (x.clone(), rms_norm_reference(x, w, 1e-6, offset)),
        [x, weight],
    )
    check(lambda x, w: rms_norm(x, w, 1e-6, offset), lambda x, w: rms_norm_reference(x, w, 1e-6, offset), [x, weight])
    check(lambda x: residual_rms_norm(x, x, weight, 1e-6, offset)[0], lambda x: x + x, [x])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "turned"),
    [(0, 2, 64, 64), (1, 1, 64, 64), (37, 5, 128, 128), (700, 4, 16, 8), (9, 3, 256, 64)],
)
def test_turned_heads_are_as_good_as_plain(
    tokens: int, heads: int, dim: int, turned: int, offset: float, gated: bool
) -> None:
    """Qwen3's heads turn whole, Qwen3-Next's in part; with a gate beside it, a head's query has a stride."""
    angles = torch.rand(tokens, 1, turned // 2, generator=torch.Generator().manual_seed(tokens)) * 6
    cos, sin = (
        torch.cat(pair, -1).to(GPU, torch.bfloat16) for pair in ((angles.cos(),) * 2, (-angles.sin(), angles.sin()))
    )

    def heads_of(x: Tensor) -> Tensor:
        return x.chunk(2, -1)[0] if gated else x

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        tables = cos.to(x.dtype), sin.to(x.dtype)
        return rotate(rms_norm_reference(heads_of(x), weight, 1e-6, offset).to(x.dtype), tables)

    inputs = [draw(tokens, heads, dim * (2 if gated else 1)), draw(dim)]
    check(lambda x, w: norm_and_rotate(heads_of(x), w, 1e-6, offset, (cos, sin)), plain, inputs)


def nucleus(targets: Tensor, vocab: int) -> KeptTokens:
    """Rows keep, by turns: the whole vocabulary, their target alone, and their target among nine tokens."""
    rows: list[list[int]] = []
    for row, target in enumerate(targets.tolist()):
        others = [token for token in range(row, vocab, vocab // 8) if token != target]
        rows.append([[], [target], [*others[:4], target, *others[4:8]]][row % 3])
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return KeptTokens(torch.tensor([t for row in rows for t in row], dtype=torch.long).to(GPU), offsets.to(GPU))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("rows", "vocab", "chunk_rows"), [(50, 4999, 16), (50, 9000, None), (1, 100, None)])
def test_log_probs_are_as_good_as_plain(
    rows: int, vocab: int, chunk_rows: int | None, temperature: float, cut: bool
) -> None:
    hidden, weight = draw(rows, 64), draw(vocab, 64) / 3
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(1)).to(GPU)
    kept = nucleus(targets, vocab) if cut else None
    options: dict[str, Any] = {"temperature": temperature, "kept": kept}
    check(
        lambda h, w: linear_log_probs(h, w, targets, chunk_rows=chunk_rows, **options),
        lambda h, w: linear_log_probs_reference(h, w, targets, **options),
        [hidden, weight],
    )
    check(
        lambda h, w: linear_log_probs(h, w, targets, chunk_rows=chunk_rows, with_entropy=False, **options)[0],
        lambda h, w: linear_log_probs_reference(h, w, targets, **options)[0],
        [hidden, weight],
    )


def test_log_probs_of_no_rows_and_a_second_backward() -> None:
    hidden, weight = draw(20, 64).requires_grad_(), draw(3000, 64).requires_grad_()
    targets = torch.arange(20, device=GPU)
    empty, _ = linear_log_probs(hidden[:0], weight, targets[:0])
    assert not torch.autograd.grad(empty.sum(), weight)[0].any()
    for chunk_rows in (8, None):
        log_probs, entropy = linear_log_probs(hidden, weight, targets, chunk_rows=chunk_rows)
        assert entropy is not None
        once = torch.autograd.grad((log_probs + entropy).sum(), (hidden, weight), retain_graph=True)
        twice = torch.autograd.grad((log_probs + entropy).sum(), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(("tokens", "experts", "slots"), [(0, 8, 2), (1, 5, 5), (130, 128, 8), (33, 512, 10)])
def test_the_highest_scores_win_and_of_equal_ones_the_lower_id(tokens: int, experts: int, slots: int) -> None:
    """Rounded scores tie often; a token chooses alike whether it is alone or not."""
    scores = (draw(tokens, experts) * 4).round().float()
    wanted = [sorted(range(experts), key=lambda i, row=row: (-row[i], i))[:slots] for row in scores.tolist()]
    assert top_k(scores, slots).tolist() == wanted
    assert [top_k(row[None], slots)[0].tolist() for row in scores[:3]] == wanted[:3]


class CountProducts(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function is torch.ops.aten._grouped_mm.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("tokens", [0, 1, 129])
def test_experts_computed_again_give_the_same_gradients_with_one_product_less(tokens: int) -> None:
    """Two grouped products forward, one again, four backward. Experts without tokens get zeros."""
    chosen = routes(tokens, 16, 4)
    inputs = [draw(tokens, 256), draw(tokens, 4), draw(16, 384, 256) / 16, draw(16, 256, 192) / 14]

    def run(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return grouped_experts(x, chosen, weights, gate_up, down)

    plain = values_and_gradients(run, inputs, torch.bfloat16)
    with CountProducts() as counted:
        recomputed = values_and_gradients(lambda *i: checkpoint(run, *i, use_reentrant=False), inputs, torch.bfloat16)
    assert counted.products == 7
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert not plain[3][12:].any()
    assert not plain[4][12:].any()
    with torch.inference_mode():
        assert torch.equal(run(*inputs), plain[0])

    def loop(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return experts_reference(x, chosen, weights, gate_up, down)

    check(run, loop, inputs)


SHAPE = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 384,
    "vocab_size": 512, "num_hidden_layers": 2,
}  # fmt: skip
SPARSE = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 96, "norm_topk_prob": True}
LENGTHS = [130, 1, 64]


@pytest.mark.parametrize("kind", [{"model_type": "qwen3"}, {"model_type": "qwen3_moe"} | SPARSE])
def test_a_model_with_all_of_them_is_as_good_as_plain_and_repeats_when_layers_are_computed_again(
    kind: dict[str, Any],
) -> None:
    """Against fp32 on the CPU; plain is bf16 there. Experts are given: in bf16 a router may choose others."""
    torch.manual_seed(0)
    model = build_model(read_model_config(SHAPE | kind))
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * (0.05 if parameter.dim() > 1 else 0.2)
        parameter.data = (noise if parameter.dim() > 1 else 1.0 + noise).bfloat16().float()
    ids = torch.randint(0, 512, (sum(LENGTHS),))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    upstream, chosen = torch.randn(len(ids), 256).bfloat16(), routes(len(ids), 16, 4)

    def run(device: torch.device, dtype: torch.dtype, run_layer: Callable[..., Tensor]) -> list[Tensor]:
        copy = deepcopy(model).to(device, dtype)
        hidden = copy(
            ids.to(device),
            positions.to(device),
            PackedDocuments(LENGTHS, device),
            lambda *_: chosen.to(device),
            run_layer,
        )
        hidden.backward(upstream.to(device, dtype))
        return [x.detach().cpu() for x in (hidden, *(p.grad for p in copy.parameters() if p.grad is not None))]

    cpu = torch.device("cpu")
    wanted, plain = run(cpu, torch.float32, run_layer), run(cpu, torch.bfloat16, run_layer)
    got = run(GPU, torch.bfloat16, run_layer)
    again = run(GPU, torch.bfloat16, lambda *arguments: checkpoint(*arguments, use_reentrant=False))
    for one, other, plain_one, want in zip(got, again, plain, wanted, strict=True):
        assert torch.equal(one, other)
        assert (one.float() - want).norm() <= 2 * (plain_one.float() - want).norm() + 1e-6 * want.norm()
