from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.kernels.linear_log_probs import (
    KeptTokens,
    default_chunk_rows,
    even_chunk_rows,
    linear_log_probs,
    linear_log_probs_reference,
)

ROWS, WIDTH, VOCAB = 13, 8, 29


def problem(dtype: torch.dtype = torch.float64, rows: int = ROWS, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, WIDTH, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, WIDTH, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (rows,), generator=random)


def nucleus(targets: Tensor, vocab: int = VOCAB) -> KeptTokens:
    """Rows keep, by turns: the whole vocabulary, their target alone, and their target among seven tokens."""
    random = torch.Generator().manual_seed(1)
    rows = []
    for row, target in enumerate(targets.tolist()):
        others = [token for token in torch.randperm(vocab, generator=random).tolist() if token != target]
        rows.append([[], [target], [*others[:4], target, *others[4:6]]][row % 3])
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return KeptTokens(torch.tensor([token for row in rows for token in row], dtype=torch.long), offsets)


def values_and_gradients(
    function: Callable[..., Any], inputs: tuple[Tensor, Tensor, Tensor], *, entropy_grad: bool = True, **options: Any
) -> list[Tensor]:
    hidden, weight, targets = inputs
    log_probs, entropy = function(hidden, weight, targets, **options)
    random = torch.Generator().manual_seed(2)
    upstream, upstream_entropy = torch.randn(2, len(targets), generator=random, dtype=torch.float64).to(log_probs.dtype)
    loss = (log_probs * upstream).sum()
    if entropy_grad:
        loss = loss + (entropy * upstream_entropy).sum()
    return [log_probs, entropy, *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [1, 4, ROWS, 100, None])
def test_values_and_gradients_are_those_of_the_full_logits(
    chunk_rows: int | None, temperature: float, cut: bool, entropy_grad: bool
) -> None:
    inputs = problem()
    options = {"temperature": temperature, "kept": nucleus(inputs[2]) if cut else None, "entropy_grad": entropy_grad}
    expected = values_and_gradients(linear_log_probs_reference, inputs, **options)
    actual = values_and_gradients(linear_log_probs, inputs, chunk_rows=chunk_rows, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_fp32_is_as_exact_as_the_plain_version(chunk_rows: int) -> None:
    """Against fp64, our fp32 error is at most twice the plain fp32 error (plus one rounding)."""
    exact = values_and_gradients(linear_log_probs_reference, problem())
    single = tuple(tensor.detach() for tensor in problem())
    single = (single[0].float().requires_grad_(), single[1].float().requires_grad_(), single[2])
    plain = values_and_gradients(linear_log_probs_reference, single)
    ours = values_and_gradients(linear_log_probs, single, chunk_rows=chunk_rows)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - truth).abs().max() <= 2 * (b - truth).abs().max() + 2**-23 * truth.abs().max()


def test_bf16_inputs_give_fp32_log_probs_and_sum_the_weight_gradient_in_fp32() -> None:
    inputs = problem(torch.bfloat16, rows=512)
    doubles = (inputs[0].detach().double().requires_grad_(), inputs[1].detach().double().requires_grad_(), inputs[2])
    exact = values_and_gradients(linear_log_probs_reference, doubles)
    plain = values_and_gradients(linear_log_probs_reference, inputs)
    ours = values_and_gradients(linear_log_probs, inputs, chunk_rows=4)
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm()


def test_autograd_agrees_with_finite_differences() -> None:
    hidden, weight, targets = problem(rows=5, vocab=7)
    kept = nucleus(targets, vocab=7)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_log_probs(h, w, targets, temperature=1.3, kept=kept, chunk_rows=2), (hidden, weight)
    )


def test_a_row_over_its_nucleus_by_hand() -> None:
    """Logits (0, log 2, log 3, 9), nucleus {1, 2}: probabilities 2/5 and 3/5."""
    weight = torch.tensor([[0.0], [2.0], [3.0], [9.0]])
    weight[1:3].log_()
    kept = KeptTokens(torch.tensor([2, 1]), torch.tensor([0, 2]))
    log_probs, entropy = linear_log_probs(torch.ones(1, 1), weight, torch.tensor([1]), kept=kept)
    probs = torch.tensor([0.4, 0.6])
    torch.testing.assert_close(log_probs, probs[:1].log())
    torch.testing.assert_close(entropy, -(probs * probs.log()).sum().reshape(1))


def test_a_target_outside_its_nucleus_is_refused() -> None:
    hidden, weight, _ = problem(rows=3)
    kept = KeptTokens(torch.tensor([4, 5, 4]), torch.tensor([0, 2, 2, 3]))
    linear_log_probs(hidden, weight, torch.tensor([5, 20, 4]), kept=kept)
    with pytest.raises(ValueError, match="1 of 3 targets"):
        linear_log_probs(hidden, weight, torch.tensor([5, 20, 5]), kept=kept)
    with pytest.raises(ValueError, match="4 entries for 2 rows"):
        linear_log_probs(hidden[:2], weight, torch.tensor([5, 20]), kept=kept)


@pytest.mark.parametrize("cut", [False, True])
def test_no_rows_give_zero_gradients(cut: bool) -> None:
    """An empty micro-batch must still take part in the backward pass."""
    hidden, weight, targets = problem(rows=0)
    kept = KeptTokens(torch.empty(0, dtype=torch.long), torch.zeros(1, dtype=torch.long)) if cut else None
    log_probs, entropy = linear_log_probs(hidden, weight, targets, kept=kept)
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, WIDTH)
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradient_that_is_asked_for_is_computed(frozen: str) -> None:
    hidden, weight, targets = problem()
    _, _, hidden_grad, weight_grad = values_and_gradients(linear_log_probs, (hidden, weight, targets), chunk_rows=4)
    trained, expected = (weight, weight_grad) if frozen == "hidden" else (hidden, hidden_grad)
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    log_probs, entropy = linear_log_probs(hidden, weight, targets, chunk_rows=4)
    random = torch.Generator().manual_seed(2)
    upstream, upstream_entropy = torch.randn(2, ROWS, generator=random, dtype=torch.float64)
    with LargestTensor() as seen:
        ((log_probs * upstream).sum() + (entropy * upstream_entropy).sum()).backward()
    torch.testing.assert_close(trained.grad, expected)
    assert (VOCAB, WIDTH) not in seen.shapes or frozen == "hidden"
    assert (ROWS, WIDTH) not in seen.shapes or frozen == "weight"


def test_without_grad_nothing_is_kept() -> None:
    hidden, weight, targets = problem()
    with torch.no_grad():
        log_probs, entropy = linear_log_probs(hidden, weight, targets)
    assert log_probs.grad_fn is None
    assert entropy.grad_fn is None
    torch.testing.assert_close((log_probs, entropy), linear_log_probs_reference(hidden, weight, targets))


def test_entropy_can_be_left_out() -> None:
    hidden, weight, targets = problem()
    log_probs, entropy = linear_log_probs(hidden, weight, targets, with_entropy=False, chunk_rows=3)
    assert entropy is None
    expected, _ = linear_log_probs_reference(hidden, weight, targets)
    torch.testing.assert_close(
        torch.autograd.grad(log_probs.sum(), weight),
        torch.autograd.grad(expected.sum(), weight),
        rtol=1e-11,
        atol=1e-11,
    )


class LargestTensor(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)}
        return result

    @property
    def numel(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.parametrize("cut", [False, True])
def test_the_full_logits_never_exist(cut: bool) -> None:
    """No tensor is larger than one chunk of logits (or than the weight), forward and backward."""
    rows, vocab, chunk_rows = 512, 1024, 16
    inputs = problem(torch.float32, rows=rows, vocab=vocab)
    options = {"temperature": 0.9, "kept": nucleus(inputs[2], vocab) if cut else None}
    with LargestTensor() as fused:
        values_and_gradients(linear_log_probs, inputs, chunk_rows=chunk_rows, **options)
    with LargestTensor() as plain:
        values_and_gradients(linear_log_probs_reference, inputs, **options)
    assert plain.numel == rows * vocab
    assert fused.numel == chunk_rows * vocab


def test_nothing_of_a_chunk_outlives_the_forward_pass() -> None:
    """Saved for backward: inputs and three numbers a row, when there is more than one chunk."""
    inputs = problem(torch.float32, rows=512, vocab=1024)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_log_probs(*inputs, chunk_rows=16)
    assert {tuple(tensor.shape) for tensor in saved} == {(512, WIDTH), (1024, WIDTH), (512,)}


def test_default_chunks_fit_their_budget() -> None:
    assert default_chunk_rows(512, "cpu") * 512 * 4 == 64 * 2**20
    assert default_chunk_rows(151_936, "cpu") * 151_936 * 4 < 64 * 2**20
    assert default_chunk_rows(151_936, "cuda") * 151_936 * 4 < 256 * 2**20
    assert default_chunk_rows(10**7, "cpu") == 64


def test_even_chunks_are_as_few_as_allowed_and_of_about_one_size() -> None:
    assert even_chunk_rows(16384, 4417) == 4096
    assert even_chunk_rows(16384, 3533) == 3328  # five of them, the last 3072
    assert even_chunk_rows(4500, 4417) == 2304
    assert even_chunk_rows(100, 4417) == 128
    assert even_chunk_rows(0, 4417) == 128
    assert even_chunk_rows(16384, 64) == 64
