from __future__ import annotations

import pickle
import tomllib
import typing

import pytest
from pydantic import ValidationError

from lockstep.config import Config
from lockstep.config.config import GROUPS, HOME
from lockstep.errors import OptionError

SLIME_DEFAULTS = {
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "rollout_top_k": -1,
    "rollout_seed": 42,
    "rollout_shuffle": False,
    "n_samples_per_prompt": 1,
    "input_key": "input",
    "label_key": None,
    "metadata_key": "metadata",
    "tool_key": "tools",
    "apply_chat_template_kwargs": {},
    "loss_mask_type": "qwen",
    "micro_batch_size": 1,
    "log_probs_chunk_size": -1,
    "advantage_estimator": "grpo",
    "loss_type": "policy_loss",
    "eps_clip": 0.2,
    "eps_clip_high": 0.2,
    "eps_clip_c": None,
    "kl_coef": 0.0,
    "kl_loss_coef": 0.0,
    "kl_loss_type": "k1",
    "entropy_coef": 0.0,
    "gamma": 1.0,
    "lambd": 1.0,
    "tis_clip": 2.0,
    "tis_clip_low": 0.0,
    "lr": 1e-6,
    "clip_grad": 1.0,
    "seed": 1234,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "lr_decay_style": "linear",
    "n_samples_per_eval_prompt": 1,
    "eval_interval": None,
    "update_weight_mode": "full",
    "update_weights_interval": 1,
}


def config(**options: object) -> Config:
    return Config.from_dict({"hf_checkpoint": "model", **options})


def test_defaults_are_slimes():
    args = config().args()
    assert {name: getattr(args, name) for name in SLIME_DEFAULTS} == SLIME_DEFAULTS


def test_every_option_is_declared_once_and_documented():
    names = [name for group in GROUPS.values() for name in group.model_fields]
    assert len(names) == len(set(names)) == len(HOME)
    undocumented = [n for g in GROUPS.values() for n, field in g.model_fields.items() if not field.description]
    assert undocumented == []


def test_an_optional_option_defaults_to_none_because_toml_cannot_say_none():
    fields = [field for group in GROUPS.values() for field in group.model_fields.values()]
    optional = [f for f in fields if type(None) in typing.get_args(f.annotation) and f.default_factory is None]
    assert len(optional) > 50
    assert [field for field in optional if field.default is not None] == []


def test_options_cannot_be_changed():
    built = config()
    with pytest.raises(ValidationError, match="frozen"):
        built.optimizer.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        built.optimizer = built.optimizer


@pytest.mark.parametrize(
    ("given", "global_batch_size", "steps"),
    [
        ({}, 32, 1),
        ({"num_steps_per_rollout": 4}, 8, 4),
        ({"global_batch_size": 16}, 16, 2),
        ({"global_batch_size": 8, "num_steps_per_rollout": 4}, 8, 4),
    ],
)
def test_batch_size_and_steps_follow_from_each_other(given, global_batch_size, steps):
    rollout = config(rollout_batch_size=8, n_samples_per_prompt=4, **given).rollout
    assert (rollout.samples_per_rollout, rollout.global_batch_size, rollout.steps_per_rollout) == (
        32,
        global_batch_size,
        steps,
    )


def test_derived_defaults_follow_the_option_they_name():
    built = config(eps_clip=0.3, use_dynamic_batch_size=True, max_tokens_per_gpu=99, rollout_batch_size=5)
    assert built.algorithm.eps_clip_high == 0.3
    assert built.batching.log_probs_max_tokens_per_gpu == 99
    assert built.rollout.over_sampling_batch_size == 5
    assert config(eps_clip=0.3, eps_clip_high=0.5).algorithm.eps_clip_high == 0.5


def test_tables_and_flat_names_mean_the_same():
    nested = Config.from_dict({"model": {"hf_checkpoint": "model"}, "optimizer": {"optimizer": "adam", "lr": 0.5}})
    assert nested == config(optimizer="adam", lr=0.5)


def test_toml_loads_as_an_equal_config():
    built = config(
        lr=1e-4,
        rollout_stop=["\n", '"quoted"'],
        rollout_stop_token_ids=[3, 4],
        spec=["module", "function"],
        moe_layer_freq=[0, 1],
        apply_chat_template_kwargs={"enable_thinking": False, "nested": {"a": [1, 2]}},
        sglang_cuda_graph_bs=[1, 2],
        sglang_enable_ep_moe=True,
        router_policy="cache_aware",
        eval_prompt_data=["a", "b"],
        num_steps_per_rollout=4,
    )
    assert Config.from_dict(tomllib.loads(built.to_toml())) == built


def test_a_secret_is_never_written():
    built = config(wandb_key="s3cret")
    assert built.logging.wandb_key == "s3cret"
    assert "s3cret" not in built.to_toml() + repr(built)


def test_args_are_flat_and_read_only_and_survive_pickling():
    args = config(lr=0.5).args()
    copied = pickle.loads(pickle.dumps(args))
    assert (copied.lr, copied.rollout_batch_size, copied == args) == (0.5, 32, True)
    with pytest.raises(AttributeError, match="read-only"):
        copied.lr = 1.0
    with pytest.raises(AttributeError, match="no option 'nonsense'"):
        _ = args.nonsense
    assert getattr(args, "nonsense", 7) == 7


def test_args_give_hooks_neutral_values_of_slime_options_that_are_not_ours():
    args = config().args()
    assert (args.partial_rollout, args.use_opd, args.multimodal_keys, args.num_gpus_per_node) == (
        False,
        False,
        None,
        None,
    )
    assert args.tensor_model_parallel_size == 1


def test_sglang_arguments_are_collected_and_named_when_unused():
    sglang = config(
        sglang={"server_args": {"dp_size": 8}}, sglang_mem_fraction_static=0.7, router_policy="random"
    ).sglang
    assert sglang.server_args == {"dp_size": 8, "mem_fraction_static": 0.7}
    assert sglang.mem_fraction_static == 0.7
    assert sglang.unused_by_the_embedded_engine == ("--sglang-dp-size", "--router-policy")


def test_an_option_in_the_wrong_table_names_the_right_one():
    with pytest.raises(OptionError) as caught:
        config(optimizer={"eps_clip": 0.2})
    assert str(caught.value) == (
        "optimizer.eps_clip is 0.2: eps_clip belongs to the table [algorithm]. Move it below [algorithm]."
    )


def test_an_unknown_key_in_a_table_names_the_closest():
    with pytest.raises(OptionError) as caught:
        config(rollout={"rollout_temprature": 1})
    assert "in table [rollout]" in caught.value.reason
    assert caught.value.remedy == "Did you mean rollout_temperature?"
