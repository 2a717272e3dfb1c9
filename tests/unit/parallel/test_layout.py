from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_models import dense_config, moe_config, next_config

from lockstep.errors import OptionError
from lockstep.models import ModelConfig, read_model_config
from lockstep.parallel.mesh import Layout

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 6, "vocab_size": 96}
DENSE = read_model_config(dense_config(0, **HEADS, intermediate_size=64).to_dict())
MOE = read_model_config(
    moe_config(
        0,
        **HEADS,
        num_experts=6,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_experts_per_tok=2,
        mlp_only_layers=[],
    ).to_dict()
)
NEXT = read_model_config(
    next_config(
        0,
        **HEADS,
        layer_types=["linear_attention", "full_attention"] * 3,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        shared_expert_intermediate_size=16,
        num_experts=8,
    ).to_dict()
)


def test_data_parallelism_is_what_is_left() -> None:
    layout = Layout(world_size=32, tp_size=2, cp_size=2, pp_size=2, ep_size=8)
    assert (layout.dp_size, layout.expert_dp_size) == (4, 2)
    layout.check(NEXT)


@pytest.mark.parametrize(
    ("sizes", "ranges"),
    [
        ({"pp_size": 3}, [range(0, 2), range(2, 4), range(4, 6)]),
        ({"pp_size": 3, "decoder_last_pipeline_num_layers": 0}, None),
        ({"pp_size": 1, "decoder_last_pipeline_num_layers": 6}, [range(0, 6)]),
        ({"pp_size": 3, "decoder_last_pipeline_num_layers": 2}, [range(0, 2), range(2, 4), range(4, 6)]),
        ({"pp_size": 2, "decoder_first_pipeline_num_layers": 4}, [range(0, 4), range(4, 6)]),
        (
            {"pp_size": 3, "decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 2},
            [range(0, 1), range(1, 4), range(4, 6)],
        ),
    ],
)
def test_stages_hold_the_layers_they_are_told_to(sizes: dict[str, int], ranges: list[range] | None) -> None:
    layout = Layout(world_size=6, **sizes)
    if ranges is None:
        with pytest.raises(OptionError, match="--pipeline-model-parallel-size"):
            layout.check(DENSE)
    else:
        layout.check(DENSE)
        assert layout.stage_layers(6) == ranges


REFUSED: list[tuple[ModelConfig, int, dict[str, Any], str]] = [
    (DENSE, 8, {"tp_size": 3}, "--tensor-model-parallel-size is 3"),
    (DENSE, 8, {"tp_size": 4, "cp_size": 4}, "--tensor-model-parallel-size is 4"),
    (DENSE, 16, {"tp_size": 16}, "--tensor-model-parallel-size is 16: it does not fit 8 attention heads"),
    (DENSE, 8, {"pp_size": 4}, "--pipeline-model-parallel-size is 4: 6 layers"),
    (DENSE, 2, {"pp_size": 2, "decoder_first_pipeline_num_layers": 6}, "--pipeline-model-parallel-size is 2: 6 layers"),
    (MOE, 8, {"ep_size": 4}, "--expert-model-parallel-size is 4: it does not divide the model's 6 experts"),
    (MOE, 8, {"pp_size": 2, "ep_size": 6}, "--expert-model-parallel-size is 6"),
    (MOE, 8, {"etp_size": 4}, "--expert-tensor-parallel-size is 4: a share of an expert's width 16"),
    (MOE, 8, {"ep_size": 6, "etp_size": 2}, "--expert-model-parallel-size is 6"),
    (NEXT, 8, {"tp_size": 8}, "--tensor-model-parallel-size is 8: it does not divide the delta rule's 4 key heads"),
    (NEXT, 8, {"tp_size": 2, "cp_size": 4}, "--context-parallel-size is 4"),
]


@pytest.mark.parametrize(("config", "world_size", "sizes", "message"), REFUSED)
def test_an_impossible_layout_is_refused_with_the_nearest_possible_one(
    config: ModelConfig, world_size: int, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)) as refusal:
        Layout(world_size=world_size, **sizes).check(config)
    numbers = [int(number) for number in re.findall(r"-size (\d+)", refusal.value.remedy)]
    names = ("tp_size", "cp_size", "pp_size", "ep_size", "etp_size")
    Layout(world_size=world_size, **dict(zip(names, numbers, strict=True))).check(config)


def test_too_few_ranks_are_named_before_the_nearest_layout() -> None:
    with pytest.raises(OptionError, match="does not divide the 1 rank that there are") as refusal:
        Layout(world_size=1, tp_size=2).check(DENSE)
    assert refusal.value.remedy.startswith(
        "Give 2 ranks: --actor-num-gpus-per-node 2. The nearest possible layout of 1"
    )


def test_the_nearest_layout_changes_as_few_options_as_possible() -> None:
    with pytest.raises(OptionError) as refusal:
        Layout(world_size=16, tp_size=16, ep_size=2).check(NEXT)
    assert "--tensor-model-parallel-size 4 " in refusal.value.remedy
    assert "--expert-model-parallel-size 2 " in refusal.value.remedy
