from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.config import Config
from lockstep.config.parsing import parse_options, recipe_name
from lockstep.errors import OptionError

BASE = ["--hf-checkpoint", "model"]


def parse(*words: str) -> Config:
    return parse_options("train", [*BASE, *words]).config


def test_flags_override_the_recipe_which_overrides_defaults(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text('lr = 0.5\n[rollout]\nrollout_batch_size = 4\n[model]\nhf_checkpoint = "from-recipe"\n')
    config = parse_options("train", [str(recipe), "--rollout-batch-size", "8"]).config
    assert (
        config.optimizer.lr,
        config.rollout.rollout_batch_size,
        config.model.hf_checkpoint,
        config.data.input_key,
    ) == (
        0.5,
        8,
        "from-recipe",
        "input",
    )


def test_the_run_is_named_after_the_recipe(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text('hf_checkpoint = "x"')
    assert parse_options("train", [str(recipe)]).config.logging.run_dir == "runs/small"
    assert parse_options("train", [str(recipe), "--run-dir", "here"]).config.logging.run_dir == "here"
    assert parse().logging.run_dir == "runs/default"
    assert recipe_name(Path("recipes/qwen3-0.6b/recipe.toml")) == "qwen3-0.6b"


def test_random_weights_stay_out_of_the_folders_of_a_recipe(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[model]\nhf_checkpoint = "m"\n[checkpoint]\nsave = "s"\nload = "s"\nsave_hf = "hf"\n[logging]\nrun_dir = "r"\n'
    )
    parsed = parse_options("train", [str(recipe), "--load-format", "dummy"])
    assert (parsed.config.checkpoint.save, parsed.config.checkpoint.load, parsed.config.checkpoint.save_hf) == (
        None,
    ) * 3
    assert parsed.config.logging.run_dir == "runs/mine-dummy"
    assert any("--load, --save, --save-hf, --run-dir of the recipe" in note for note in parsed.notes)
    asked_for = parse_options("train", [str(recipe), "--load-format", "dummy", "--save", "elsewhere"])
    assert asked_for.config.checkpoint.save == "elsewhere"


def test_a_recipe_and_flags_merge_sglang_arguments(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('hf_checkpoint = "x"\n[sglang]\nserver_args = {dp_size = 8, ep_size = 2}')
    config = parse_options("train", [str(recipe), "--sglang-ep-size", "4"]).config
    assert config.sglang.server_args == {"dp_size": 8, "ep_size": 4}


def test_the_last_value_of_a_repeated_flag_wins():
    assert parse("--lr", "1", "--lr", "2").optimizer.lr == 2.0
    assert parse("--use-wandb", "--no-use-wandb").logging.use_wandb is False


def test_a_repeatable_flag_collects_its_values():
    config = parse("--rollout-sample-hook-path", "a.b", "--rollout-sample-hook-path", "c.d")
    assert config.rollout.rollout_sample_hook_path == ("a.b", "c.d")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rollout-shuffle"], True),
        (["--rollout-shuffle", "true"], True),
        (["--rollout-shuffle", "False"], False),
        (["--rollout-shuffle=true"], True),
        (["--rollout-shuffle=false"], False),
        (["--no-rollout-shuffle"], False),
        ([], False),
    ],
)
def test_a_switch_can_be_spelled_in_every_way(words, expected):
    assert parse(*words).data.rollout_shuffle is expected


def test_a_switch_does_not_swallow_the_recipe(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("lr = 0.25")
    config = parse_options("train", [*BASE, "--rollout-shuffle", str(recipe)]).config
    assert (config.data.rollout_shuffle, config.optimizer.lr) == (True, 0.25)


def test_negative_numbers_are_values():
    config = parse("--rollout-top-k", "-1", "--entropy-coef", "-1e-3", "--log-probs-chunk-size=-1")
    assert (config.rollout.rollout_top_k, config.algorithm.entropy_coef) == (-1, -1e-3)


def test_lists_pairs_and_json_are_read():
    config = parse(
        "--rollout-stop", "a", "b", "--rollout-stop-token-ids", "1", "2", "--spec", "module", "function",
        "--eval-prompt-data", "aime", "a.jsonl", "math", "m.jsonl@[0:9]",
        "--apply-chat-template-kwargs", '{"enable_thinking": false}',
    )  # fmt: skip
    assert config.rollout.rollout_stop == ("a", "b")
    assert config.rollout.rollout_stop_token_ids == (1, 2)
    assert config.model.spec == ("module", "function")
    assert config.eval.eval_prompt_data == ("aime", "a.jsonl", "math", "m.jsonl@[0:9]")
    assert config.data.apply_chat_template_kwargs == {"enable_thinking": False}


def test_sglang_flags_of_any_name_take_any_number_of_words():
    config = parse(
        "--sglang-cuda-graph-bs", "1", "2", "4", "--sglang-mem-fraction-static", "0.7", "--sglang-enable-ep-moe",
        "--sglang-watchdog=-1", "--sglang-min-p", "-0.5", "--router-policy", "random", "--lr", "3",
    )  # fmt: skip
    assert config.sglang.server_args == {
        "cuda_graph_bs": [1, 2, 4],
        "mem_fraction_static": 0.7,
        "enable_ep_moe": True,
        "watchdog": -1,
        "min_p": -0.5,
    }
    assert config.sglang.router_args == {"policy": "random"}
    assert config.sglang.cuda_graph_bs == (1, 2, 4)
    assert config.optimizer.lr == 3.0


def test_other_spellings_reach_the_option():
    assert parse("--use-gated-attention").model.attention_output_gate is True
    assert parse("--params-dtype", "float32", "--bf16").model.params_dtype == "bfloat16"
    assert parse("--bf16", "--params-dtype", "float32").model.params_dtype == "float32"


def test_notes_name_accepted_and_unused_flags_and_the_reference():
    notes = parse_options(
        "train", [*BASE, "--moe-enable-deepep", "--sglang-dp-size", "8", "--use-kl-loss", "--lr", "1"]
    ).notes
    assert notes == [
        "--moe-enable-deepep: rows travel to experts on other ranks by all-to-all, whatever this says; results do not "
        "depend on it.",
        "--sglang-dp-size: for SGLang's servers; the embedded engine does not use them.",
        "--use-kl-loss: without --ref-load the reference model is model.",
    ]


def test_an_accepted_option_at_its_default_needs_no_note():
    assert parse_options("train", [*BASE, "--colocate", "--tensor-model-parallel-size", "1"]).notes == []


def test_a_recipe_may_hold_accepted_flags_of_slime(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('hf_checkpoint = "x"\nattention_dropout = 0.0\nuse_gated_attention = true\n')
    assert parse_options("train", [str(recipe)]).config.model.attention_output_gate is True
    recipe.write_text('hf_checkpoint = "x"\nattention_dropout = 0.1\n')
    with pytest.raises(OptionError, match="there is no dropout"):
        parse_options("train", [str(recipe)])
