from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.rollout.embedded.sampler import kept_tokens, sample, stream_key, stream_uniform

DRAWS = 20_000
CHI_SQUARE_AT_1_PERCENT = {1: 6.63, 2: 9.21, 3: 11.34, 4: 13.28, 5: 15.09, 6: 16.81, 7: 18.48}
KOLMOGOROV_AT_1_PERCENT = 1.63


def chi_square_fits(counts: np.ndarray, probs: np.ndarray) -> bool:
    expected = counts.sum() * probs
    return bool(((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_AT_1_PERCENT[len(counts) - 1])


def uniforms(seed: int, count: int = DRAWS) -> torch.Tensor:
    keys = torch.tensor([stream_key(seed, sample) for sample in range(count // 100)])
    return stream_uniform(keys.repeat_interleave(100), torch.arange(100).repeat(count // 100))


def test_uniforms_are_uniform_and_independent_of_their_neighbours() -> None:
    """Kolmogorov-Smirnov for the shape; correlation between neighbouring positions, samples and seeds for the rest."""
    numbers = uniforms(7).numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    ranks = np.arange(1, DRAWS + 1) / DRAWS
    assert np.sqrt(DRAWS) * np.abs(np.sort(numbers) - ranks).max() < KOLMOGOROV_AT_1_PERCENT
    grid = numbers.reshape(-1, 100)
    for left, right in (
        (grid[:, :-1], grid[:, 1:]),
        (grid[:-1], grid[1:]),
        (numbers, uniforms(8).numpy()),
    ):
        correlation = np.corrcoef(left.ravel(), right.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(left.size)


def test_every_part_of_a_stream_key_counts_and_their_order_too() -> None:
    keys = {
        stream_key(*parts) for parts in [(1, 2, 3), (1, 2, 4), (1, 3, 2), (0, 2, 3), (1, 2), (1, 2, 3, 0), (-1, 2, 3)]
    }
    assert len(keys) == 7
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_a_number_depends_on_its_key_and_position_only() -> None:
    keys, positions = torch.tensor([stream_key(1, 5), stream_key(1, 6), stream_key(2, 5)]), torch.tensor([3, 9, 3])
    together = stream_uniform(keys, positions)
    alone = [stream_uniform(keys[i : i + 1], positions[i : i + 1]) for i in (2, 0, 1)]
    assert together[[2, 0, 1]].tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, -1), (0.7, 1.0, -1), (1.0, 0.8, -1), (1.0, 1.0, 3), (1.3, 0.9, 5)]
)
def test_tokens_are_drawn_with_the_probabilities_of_numpy(temperature: float, top_p: float, top_k: int) -> None:
    """Chi-square of 20000 draws with a fixed seed."""
    logits = np.array([1.0, -0.5, 2.0, 0.3, -2.0, 1.7, 0.0, -1.0])
    probs = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    kept = numpy_kept(probs, top_p, top_k)
    wanted = np.where(kept, probs, 0) / probs[kept].sum()
    rows = torch.tensor(logits, dtype=torch.float32).expand(DRAWS, -1)
    sampled = sample(
        rows,
        torch.full((DRAWS,), temperature),
        uniforms(3),
        top_p_B=torch.full((DRAWS,), top_p, dtype=torch.float64),
        top_k_B=torch.full((DRAWS,), top_k),
    )
    counts = np.bincount(sampled.tokens_B.numpy(), minlength=8)
    assert counts[~kept].sum() == 0
    assert chi_square_fits(counts[kept], wanted[kept])
    np.testing.assert_allclose(sampled.log_probs_B, np.log(wanted[sampled.tokens_B]), atol=1e-5)


def numpy_kept(probs: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """The smallest set of likeliest tokens whose mass reaches top_p, within the top_k likeliest."""
    order = np.argsort(-probs, kind="stable")
    kept, mass = np.zeros(len(probs), dtype=bool), 0.0
    for rank, token in enumerate(order):
        if rank and (mass >= top_p or (top_k > 0 and rank >= top_k)):
            break
        kept[token] = True
        mass += float(probs[token])
    return kept if top_p < 1 or top_k > 0 else np.ones(len(probs), dtype=bool)


def as_mask(order_BV: torch.Tensor, num_kept_B: torch.Tensor) -> torch.Tensor:
    ranks = torch.arange(order_BV.shape[1])
    return torch.zeros_like(order_BV, dtype=torch.bool).scatter_(1, order_BV, ranks < num_kept_B[:, None])


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0), st.integers(-1, 12).filter(lambda k: k != 0))
def test_kept_tokens_are_numpys(seed: int, top_p: float, top_k: int) -> None:
    probs = torch.softmax(3 * torch.randn(4, 10, generator=torch.Generator().manual_seed(seed)), -1)
    got = as_mask(*kept_tokens(probs, torch.full((4,), top_p, dtype=torch.float64), torch.full((4,), top_k)))
    for row in range(4):
        cumulative = np.sort(probs[row].numpy().astype(np.float64))[::-1].cumsum()
        if np.abs(cumulative - top_p).min() < 1e-9:
            continue  # a sum that may round to either side of the border
        assert got[row].tolist() == numpy_kept(probs[row].numpy().astype(np.float64), top_p, top_k).tolist()


def test_top_p_of_one_keeps_tokens_whose_probability_vanishes_in_rounding() -> None:
    probs = torch.softmax(torch.tensor([[40.0, 39.0, 0.0, -40.0]]), -1)
    assert as_mask(*kept_tokens(probs, torch.ones(1, dtype=torch.float64), torch.tensor([-1]))).all()


def test_temperature_zero_takes_the_largest_logit_and_reports_its_log_prob_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    sampled = sample(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.999, 0.0], dtype=torch.float64))
    assert sampled.tokens_B.tolist() == [1, 0]
    torch.testing.assert_close(sampled.log_probs_B, logits.log_softmax(-1)[[0, 1], [1, 0]])


def test_the_smallest_number_draws_the_first_kept_token_not_one_of_no_probability() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0]])
    zero = torch.zeros(1, dtype=torch.float64)
    sampled = sample(logits, torch.ones(1), zero, top_p_B=torch.ones(1, dtype=torch.float64), top_k_B=torch.tensor([2]))
    assert sampled.tokens_B.tolist() == [1]


def test_forbidden_tokens_are_never_drawn_and_the_log_prob_stays_the_policys() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(DRAWS, -1)
    forbidden = torch.tensor([True, False, True, False]).expand(DRAWS, -1)
    ones = torch.ones(DRAWS)
    sampled = sample(logits, ones, uniforms(5), is_forbidden_BV=forbidden)
    counts = np.bincount(sampled.tokens_B.numpy(), minlength=4)
    probs = np.exp([1.0, -1.0]) / np.exp([1.0, -1.0]).sum()
    assert counts[[0, 2]].sum() == 0
    assert chi_square_fits(counts[[1, 3]], probs)
    torch.testing.assert_close(sampled.log_probs_B, logits[0].log_softmax(-1)[sampled.tokens_B])

    cut = sample(
        logits[:2],
        ones[:2],
        uniforms(5)[:2],
        is_forbidden_BV=forbidden[:2],
        top_p_B=torch.tensor([0.5, 1.0], dtype=torch.float64),
        top_k_B=torch.tensor([-1, -1]),
    )
    assert cut.num_kept_B is not None
    assert [ids.tolist() for ids in cut.kept_ids(cut.num_kept_B.tolist())] == [[1], [0, 1, 2, 3]]
    assert cut.log_probs_B[0] == 0
    torch.testing.assert_close(cut.log_probs_B[1], logits[0].log_softmax(-1)[cut.tokens_B[1]])


def test_a_row_draws_the_same_token_whatever_its_neighbours_ask_for() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, numbers = torch.randn(6, 50, generator=draw), torch.rand(6, generator=draw, dtype=torch.float64)
    temperatures = torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0, 1.0])
    top_p = torch.tensor([1.0, 1.0, 0.9, 0.5, 1.0, 1.0], dtype=torch.float64)
    top_k = torch.tensor([-1, -1, -1, 7, 2, -1])
    together = sample(logits, temperatures, numbers, top_p_B=top_p, top_k_B=top_k)
    for row in range(6):
        cuts = bool(top_p[row] < 1 or top_k[row] > 0)
        alone = sample(
            logits[row : row + 1],
            temperatures[row : row + 1],
            numbers[row : row + 1],
            top_p_B=top_p[row : row + 1] if cuts else None,
            top_k_B=top_k[row : row + 1] if cuts else None,
        )
        assert alone.tokens_B[0] == together.tokens_B[row]
        assert alone.log_probs_B[0] == together.log_probs_B[row]
