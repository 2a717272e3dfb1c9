"""Parity ladder: random two-to-four-layer models in fp32 on the CPU against transformers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    CONFIGS,
    VOCAB,
    RoutingGap,
    dense_config,
    hf_logits,
    hf_model,
    moe_config,
    next_config,
    packed_logits,
    random_documents,
    relative_error,
    twin_of,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from lockstep.models import LanguageModel

TOLERANCES = {"dense": 1e-5, "moe": 1e-5, "next": 1e-4}
"""max |a - b| / max |b| per tensor. The delta rule solves a triangular system per chunk, in another order than HF."""
SMALLEST_GAP = 1e-5
"""Closer calls between two experts may fall either way in fp32."""
LENGTHS = [7, 1, 23, 12, 70]
"""The longest spans two chunks of the delta rule."""


def without_close_calls(family: str, seed: int) -> tuple[PreTrainedModel, LanguageModel, list[list[int]]]:
    """A model of the seed's config, its twin, and documents whose routing is clear; weights are redrawn if need be."""
    config = CONFIGS[family](seed)
    for weight_seed in range(seed, seed + 1000, 100):
        theirs = hf_model(config, weight_seed)
        ours, documents, gap = twin_of(theirs), random_documents(LENGTHS, weight_seed), RoutingGap()
        packed_logits(ours, documents, gap)
        if gap.smallest > SMALLEST_GAP:
            return theirs, ours, documents
    raise AssertionError("no draw has clear routes")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_every_gradient_of_packed_documents_equal_transformers(family: str, seed: int) -> None:
    theirs, ours, documents = without_close_calls(family, seed)
    upstream = torch.randn(sum(LENGTHS), VOCAB, generator=torch.Generator().manual_seed(seed))

    wanted = hf_logits(theirs, documents)
    (wanted * upstream).sum().backward()
    got = packed_logits(ours, documents)
    (got * upstream).sum().backward()

    tolerance = TOLERANCES[family]
    assert relative_error(got, wanted) <= tolerance
    wanted_grads = {name: p.grad for name, p in theirs.named_parameters()}
    assert wanted_grads.keys() == dict(ours.named_parameters()).keys()
    errors = {
        name: relative_error(p.grad, wanted_grads[name]) for name, p in ours.named_parameters() if p.grad is not None
    }
    assert errors.keys() == {name for name, grad in wanted_grads.items() if grad is not None}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


@pytest.mark.parametrize("seed", range(6))
def test_a_freshly_initialised_hybrid_computes_the_logits_of_transformers(seed: int) -> None:
    """transformers' own start, with memories from a token to hundreds. The decays' gradients are then what is left of
    sums that cancel, 1e-7 to 1e-3 in size, and two fp32 runs differ by more than 1e-4: all others are compared."""
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(next_config(seed)).eval()
    ours, documents, gap = twin_of(theirs), random_documents(LENGTHS, seed), RoutingGap()
    upstream = torch.randn(sum(LENGTHS), VOCAB, generator=torch.Generator().manual_seed(seed))
    got = packed_logits(ours, documents, gap)
    wanted = hf_logits(theirs, documents)
    assert relative_error(got, wanted) <= 1e-5
    if gap.smallest <= SMALLEST_GAP:
        return
    (wanted * upstream).sum().backward()
    (got * upstream).sum().backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None and not name.endswith(("A_log", "dt_bias")):
            assert relative_error(parameter.grad, theirs_by_name[name].grad) <= TOLERANCES["next"], name


def test_the_seeds_cover_every_kind_of_config() -> None:
    configs = [moe_config(seed) for seed in range(6)]
    for field in ("tie_word_embeddings", "attention_bias", "norm_topk_prob"):
        assert {getattr(c, field) for c in configs} == {True, False}
        if field != "norm_topk_prob":
            assert {getattr(dense_config(seed), field) for seed in range(6)} == {True, False}
    assert any(c.mlp_only_layers for c in configs)
    assert {c.decoder_sparse_step for c in configs} == {1, 2}
    assert any(c.head_dim * c.num_attention_heads != c.hidden_size for c in configs)
    assert any(c.num_key_value_heads < c.num_attention_heads for c in configs)


@pytest.mark.parametrize("changes", [{"hidden_size": 30}, {"moe_intermediate_size": 18}])
def test_widths_that_grouped_products_refuse_are_computed_all_the_same(changes: dict[str, int]) -> None:
    """`grouped_mm` wants rows of a multiple of 16 bytes."""
    theirs, documents = hf_model(moe_config(0, **changes)), random_documents(LENGTHS)
    assert relative_error(packed_logits(twin_of(theirs), documents), hf_logits(theirs, documents)) <= 1e-5


def test_the_seeds_of_the_hybrid_cover_every_order_of_its_layers() -> None:
    configs = [next_config(seed) for seed in range(6)]
    assert all(set(c.layer_types) == {"linear_attention", "full_attention"} for c in configs)
    assert any(c.layer_types[:2] == ["linear_attention", "full_attention"] for c in configs)
    assert any(c.layer_types.count("linear_attention") >= 2 for c in configs)
    assert {c.linear_num_value_heads // c.linear_num_key_heads for c in configs} == {1, 2, 3}
    assert len({c.linear_conv_kernel_dim for c in configs}) > 1
    assert any(c.linear_key_head_dim != c.linear_value_head_dim for c in configs)
    assert any(c.mlp_only_layers for c in configs)
    assert {c.decoder_sparse_step for c in configs} == {1, 2}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_document_does_not_see_its_neighbours_in_the_pack(family: str) -> None:
    _, ours, documents = without_close_calls(family, 3)
    alone = torch.cat([packed_logits(ours, [document]) for document in documents])
    tolerance = TOLERANCES[family]
    assert relative_error(packed_logits(ours, documents), alone) <= tolerance
    others = [document if i == 2 else [(t + 1) % VOCAB for t in document] for i, document in enumerate(documents)]
    rows = slice(sum(LENGTHS[:2]), sum(LENGTHS[:3]))
    assert relative_error(packed_logits(ours, others)[rows], packed_logits(ours, documents)[rows]) <= tolerance


def test_a_sparse_config_without_head_dim_divides_the_width_as_transformers_does() -> None:
    config = moe_config(0, hidden_size=48, num_attention_heads=4)
    del config.head_dim
    theirs, documents = hf_model(config), random_documents(LENGTHS)
    assert relative_error(packed_logits(twin_of(theirs), documents), hf_logits(theirs, documents)) <= 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_bf16_is_at_most_twice_as_far_from_fp32_as_transformers_bf16(family: str) -> None:
    """Mean over all logits of the distance to the fp32 reference; ours may be at most twice theirs."""
    theirs, ours, documents = without_close_calls(family, 4)
    exact = hf_logits(theirs, documents)
    their_error = (hf_logits(theirs.bfloat16(), documents).float() - exact).abs().mean()
    our_error = (packed_logits(ours.bfloat16(), documents).float() - exact).abs().mean()
    assert our_error <= 2 * their_error
