from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import VOCAB, packed_logits, random_documents, tiny_moe, tiny_next

from lockstep.kernels.norm_rotary import rotate
from lockstep.models import LanguageModel
from lockstep.models.layers.mlp import GatedMLP
from lockstep.models.layers.moe import MoE, RecordRoutes
from lockstep.models.layers.norm import RMSNorm
from lockstep.models.layers.rotary import Rope, rotary_tables


def test_rms_norm_scales_rows_to_the_weight() -> None:
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([1.0, 10.0])
    root = (12.5) ** 0.5  # of (3^2 + 4^2) / 2
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3 / root, 40 / root]]))


def test_rotation_by_position_leaves_only_the_distance_in_the_product_of_query_and_key() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 16, generator=draw)

    def product(position_q: int, position_k: int) -> torch.Tensor:
        tables_q, tables_k = (
            rotary_tables(torch.tensor([p]), Rope(1e4, 16), torch.float32) for p in (position_q, position_k)
        )
        return (rotate(q, tables_q) * rotate(k, tables_k)).sum()

    torch.testing.assert_close(product(9, 4), product(105, 100), rtol=0, atol=1e-5)
    assert (product(9, 4) - product(9, 5)).abs() > 1e-2


def test_each_expert_mixes_in_by_its_probability_and_renormalising_makes_the_weights_sum_to_one() -> None:
    torch.manual_seed(0)
    moe = MoE(8, 8, 4, 2, norm_topk_prob=False)
    x = torch.randn(5, 8)
    experts = []
    for expert in range(4):
        gate, up = moe.experts.gate_up_proj[expert].chunk(2)
        mlp = GatedMLP(8, 8)
        mlp.load_state_dict(
            {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": moe.experts.down_proj[expert]}
        )
        experts.append(mlp)
    probs = torch.softmax(x @ moe.gate.weight.T, -1)
    top = probs.topk(2).indices
    wanted = torch.stack([sum(probs[t, e] * experts[e](x[t]) for e in top[t].tolist()) for t in range(5)])
    torch.testing.assert_close(moe(x, 0, RecordRoutes()), wanted)
    moe.norm_topk_prob = True
    torch.testing.assert_close(moe(x, 0, RecordRoutes()), wanted / probs.gather(1, top).sum(-1, keepdim=True))


def test_recorded_routes_have_one_layer_per_sparse_layer() -> None:
    record = RecordRoutes()
    probs = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
    record(0, probs, 2)
    record(1, probs.flip(1), 2)
    assert record.stacked().tolist() == [[[1, 2], [1, 0]], [[0, 2], [2, 0]]]


@pytest.mark.parametrize("make", [tiny_moe, tiny_next])
def test_gradients_repeat_bit_for_bit_on_two_threads(make: Callable[..., LanguageModel]) -> None:
    """Every number of every gradient, of a pack that is large enough for both: a resumed run is equal to one that was
    never stopped."""
    model = make(hidden_size=128)
    documents = random_documents([700, 500, 900])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(4):
            model.zero_grad()
            logits_TV = packed_logits(model, documents)
            (logits_TV.log_softmax(-1) * torch.linspace(0, 1, VOCAB)).sum().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    finally:
        torch.set_num_threads(threads)
    assert [n for other in gradients[1:] for n, g in other.items() if not torch.equal(g, gradients[0][n])] == []
