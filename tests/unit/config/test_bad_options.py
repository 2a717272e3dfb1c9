from __future__ import annotations

import pytest

from lockstep.config import Config
from lockstep.config.checks import check_evaluation, check_training
from lockstep.config.parsing import parse_options
from lockstep.errors import OptionError

BASE = ["--hf-checkpoint", "m", "--prompt-data", "p.jsonl", "--num-rollout", "2", "--rm-type", "math"]
GROUPED = ["--n-samples-per-prompt", "4"]

# words after BASE and GROUPED, field, value, part of the reason, part of the remedy
BAD = [
    ("--rollout-batch-siz 8", "--rollout-batch-siz", "8", "no such option", "Did you mean --rollout-batch-size?"),
    ("--no-lr", "--no-lr", None, "no such option", "--lr"),
    ("--rollout_batch_size 8", "--rollout_batch_size", "8", "no such option", "--rollout-batch-size?"),
    ("--zzzzqqqq", "--zzzzqqqq", None, "no such option", "--help"),
    ("--lr", "--lr", None, "expected one argument", "after the flag"),
    ("--rollout-stop", "--rollout-stop", None, "expected at least one argument", "after the flag"),
    ("--spec one", "--spec", None, "expected 2 arguments", "after the flag"),
    ("--lr fast", "--lr", "fast", "must be a number", "Give a number"),
    ("--lr -1", "--lr", "-1", "at least 0", "at least 0"),
    ("--lr nan", "--lr", "nan", "finite", "finite"),
    ("--rollout-batch-size 2.5", "--rollout-batch-size", "2.5", "whole number", "Give a whole number"),
    ("--rollout-batch-size 0", "--rollout-batch-size", "0", "at least 1", "at least 1"),
    ("--rollout-temperature 0", "--rollout-temperature", "0", "above 0", "above 0"),
    ("--rollout-top-p 1.5", "--rollout-top-p", "1.5", "at most 1", "at most 1"),
    ("--rollout-top-p 0", "--rollout-top-p", "0", "above 0", "above 0"),
    ("--rollout-top-k 0", "--rollout-top-k", 0, "no token to sample", "-1"),
    ("--rollout-top-k -2", "--rollout-top-k", "-2", "at least -1", "at least -1"),
    ("--eval-top-k 0", "--eval-top-k", 0, "no token", "-1"),
    ("--rollout-stop=", "--rollout-stop", "", "end every response", "Leave"),
    ("--rollout-shuffle=perhaps", "--rollout-shuffle", "perhaps", "true or false", "--no-rollout-shuffle"),
    ("--apply-chat-template-kwargs {a}", "--apply-chat-template-kwargs", "{a}", "not JSON", "enable_thinking"),
    ("--apply-chat-template-kwargs [1]", "--apply-chat-template-kwargs", [1], "a table", "table"),
    ("--advantage-estimator gpro", "--advantage-estimator", "gpro", "grpo or gspo", "Give grpo or gspo"),
    ("--advantage-estimator ppo", "--advantage-estimator", "ppo", "not there yet", "Use grpo or gspo"),
    ("--loss-type custom_loss", "--loss-type", "custom_loss", "not there yet", "policy_loss"),
    ("--loss-type sft_loss --use-kl-loss", "--use-kl-loss", True, "with --loss-type sft_loss it does nothing", "Leave"),
    ("--loss-type sft_loss --entropy-coef 0.01", "--entropy-coef", 0.01, "it does nothing", "Leave it out"),
    ("--rm-type ifbench", "--rm-type", "ifbench", "not there yet", "--custom-rm-path"),
    ("--rm-type mth", "--rm-type", "mth", "no such reward", "math"),
    ("--rm-type remote_rm", "--rm-url", None, "no address", "URL"),
    ("--group-rm", "--group-rm", True, "one sample at a time", "--custom-rm-path"),
    ("--rollout-engine sglang", "--sglang-python", None, "have to be started", "--rollout-external-engine-addrs"),
    (
        "--rollout-num-gpus 2 --rollout-num-gpus-per-engine 2",
        "--rollout-num-gpus-per-engine",
        2,
        "lies on one GPU",
        "--rollout-engine sglang",
    ),
    ("--schedule one-step-off", "--schedule", "one-step-off", "at the same time", "--rollout-num-gpus"),
    ("--max-staleness 1", "--max-staleness", 1, "0 behind", "--schedule async"),
    ("--update-weight-mode delta", "--update-weight-mode", "delta", "sent whole", "Use full"),
    (
        "--rollout-engine sglang --sglang-python p --rollout-num-gpus 4 --rollout-num-gpus-per-engine 3",
        "--rollout-num-gpus-per-engine",
        3,
        "does not divide the 4 GPUs",
        "Use 4",
    ),
    (
        "--rollout-engine sglang --sglang-python p --rollout-top-p 0.9",
        "--rollout-top-p",
        0.9,
        "renormalise",
        "embedded",
    ),
    ("--kl-coef 0.1", "--kl-coef", 0.1, "does nothing with grpo", "--kl-loss-coef"),
    ("--kl-loss-coef 0.1", "--kl-loss-coef", 0.1, "does nothing", "--use-kl-loss"),
    ("--use-unbiased-kl", "--use-unbiased-kl", True, "does nothing", "--use-kl-loss"),
    ("--use-tis --use-rollout-logprobs", "--use-tis", True, "already is", "one of the two"),
    ("--use-tis --tis-clip 1 --tis-clip-low 2", "--tis-clip-low", 2.0, "exceeds --tis-clip 1", "lower"),
    ("--eps-clip-c 0.9", "--eps-clip-c", "0.9", "above 1", "above 1"),
    ("--eps-clip-c inf", "--eps-clip-c", "inf", "finite", "finite"),
    (
        "--disable-compute-advantages-and-returns",
        "--disable-compute-advantages-and-returns",
        True,
        "learns from advantages",
        "sft_loss",
    ),
    ("--rollout-batch-size 8 --global-batch-size 5", "--global-batch-size", 5, "= 32 per rollout", "such as 4"),
    ("--rollout-batch-size 8 --num-steps-per-rollout 3", "--num-steps-per-rollout", 3, "does not divide", "such as 4"),
    (
        "--rollout-batch-size 8 --num-steps-per-rollout 2 --global-batch-size 8",
        "--global-batch-size",
        8,
        "times 2 steps it is 16, but 8 prompts x 4 samples = 32",
        "Use 16",
    ),
    ("--global-batch-size 4096", "--global-batch-size", 4096, "does not divide", "such as 128"),
    ("--over-sampling-batch-size 3", "--over-sampling-batch-size", 3, "below --rollout-batch-size 32", "Use 32"),
    (
        "--rollout-max-context-len 8 --rollout-max-prompt-len 8",
        "--rollout-max-prompt-len",
        8,
        "no room",
        "less than 8",
    ),
    ("--rollout-max-tokens 9", "--rollout-max-tokens", 9, "not even one response", "multiple"),
    ("--n-samples-per-prompt 1", "--n-samples-per-prompt", 1, "a group of one has advantage 0", "Use 2 or more"),
    ("--use-dynamic-batch-size", "--max-tokens-per-gpu", None, "size of a micro-batch", "Give --max-tokens-per-gpu"),
    ("--min-lr 1", "--min-lr", 1.0, "exceeds --lr 1e-06", "up to --lr"),
    ("--lr-warmup-iters 3 --lr-warmup-fraction 0.1", "--lr-warmup-fraction", 0.1, "says it too", "one of the two"),
    ("--lr-warmup-iters 3 --lr-decay-iters 3", "--lr-warmup-iters", 3, "until --lr-decay-iters 3", "less than 3"),
    ("--lr-decay-style WSD", "--lr-decay-style", "WSD", "not there", "cosine"),
    ("--optimizer sgd", "--optimizer", "sgd", "only adam", "Use adam"),
    ("--adam-beta2 1", "--adam-beta2", "1", "below 1", "below 1"),
    ("--save-interval 5", "--save-interval", 5, "no folder", "Give --save"),
    ("--keep-last-checkpoints 2", "--keep-last-checkpoints", 2, "no folder", "Give --save"),
    ("--eval-interval 5", "--eval-interval", 5, "no data set", "--eval-prompt-data"),
    ("--eval-prompt-data aime", "--eval-prompt-data", "aime", "pairs", "name before each path"),
    ("--eval-prompt-data a x a y", "--eval-prompt-data", "a x a y", "share a name", "of its own"),
    ("--debug-train-only", "--debug-train-only", True, "nothing to train on", "--load-debug-rollout-data"),
    (
        "--debug-rollout-only --load-debug-rollout-data f",
        "--debug-rollout-only",
        True,
        "training only",
        "one of the two",
    ),
    (
        "--load-debug-rollout-data-subsample 0.5",
        "--load-debug-rollout-data-subsample",
        0.5,
        "no data is loaded",
        "--load-debug-rollout-data",
    ),
    (
        "--save-debug-train-data f --save-debug-rollout-data f",
        "--save-debug-train-data",
        "f",
        "the same file",
        "of its own",
    ),
    ("--no-colocate", "--colocate", False, "share their device", "Leave it out"),
    (
        "--mask-offpolicy-in-partial-rollout",
        "--mask-offpolicy-in-partial-rollout",
        True,
        "without --partial-rollout",
        "Give --partial-rollout too",
    ),
    ("--attention-dropout 0.1", "--attention-dropout", 0.1, "no dropout", "Use 0"),
    ("--moe-aux-loss-coeff 0.001", "--moe-aux-loss-coeff", 0.001, "no auxiliary loss", "Use 0"),
    ("--fp16", "--fp16", True, "loss scaling", "bfloat16"),
    ("--no-bf16", "--bf16", False, "bfloat16", "float32"),
    ("--sglang-mem-fraction-static 7", "--sglang-mem-fraction-static", 7, "fraction", "0.7"),
    ("--sglang-cuda-graph-bs one", "--sglang-cuda-graph-bs", ["one"], "whole numbers", "1 2 4 8"),
    (
        "--partial-rollout --schedule one-step-off --rollout-engine sglang --rollout-num-gpus 1 --sglang-python p",
        "--partial-rollout",
        True,
        "older than --max-staleness",
        "Use --schedule sync",
    ),
    ("--sglang-chunked-prefill-size 0", "--sglang-chunked-prefill-size", 0, "number of tokens", "8192"),
    ("--sglang-router-port 70000", "--sglang-router-port", "70000", "65535", ""),
    ("--sglang-config x.yaml", "--sglang-config", "x.yaml", "not there yet", "Leave it out"),
    ("missing.toml", "recipe", "missing.toml", "no such file", "path of a recipe"),
]


@pytest.mark.parametrize(("words", "field", "value", "reason", "remedy"), BAD, ids=[row[0] for row in BAD])
def test_a_bad_option_is_refused_in_four_parts(words, field, value, reason, remedy):
    with pytest.raises(OptionError) as caught:
        check_training(parse_options("train", [*BASE, *GROUPED, *words.split()]).config)
    error = caught.value
    assert (error.field, error.value) == (field, value)
    assert reason in error.reason
    assert remedy in error.remedy
    assert error.reason.endswith(".")
    assert error.remedy.endswith((".", "?"))
    assert error.exit_code == 2


def test_the_row_that_is_not_bad_passes():
    check_training(parse_options("train", [*BASE, *GROUPED]).config)


@pytest.mark.parametrize(
    ("left_out", "field"),
    [("hf_checkpoint", "--hf-checkpoint"), ("prompt_data", "--prompt-data"), ("num_rollout", "--num-rollout")],
)
def test_training_names_what_is_missing(left_out, field):
    given = {"hf_checkpoint": "m", "prompt_data": "p", "num_rollout": 2, "n_samples_per_prompt": 2}
    del given[left_out]
    with pytest.raises(OptionError) as caught:
        check_training(Config.from_dict(given))
    assert (caught.value.field, caught.value.value) == (field, None)


@pytest.mark.parametrize("why", [{"loss_type": "sft_loss"}, {"disable_rewards_normalization": True}])
def test_a_group_of_one_is_fine_where_groups_do_not_matter(why):
    check_training(Config.from_dict({"hf_checkpoint": "m", "prompt_data": "p", "num_epoch": 1, **why}))


def test_evaluation_needs_data_but_no_training_options():
    with pytest.raises(OptionError, match="no data set"):
        check_evaluation(Config.from_dict({"hf_checkpoint": "m"}))
    check_evaluation(Config.from_dict({"hf_checkpoint": "m", "eval_prompt_data": ["a", "b"]}))


def test_a_megatron_reference_is_refused(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(OptionError, match="Megatron checkpoint"):
        Config.from_dict({"hf_checkpoint": "m", "ref_load": str(tmp_path)})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lr = ", "it is not TOML"),
        ("[rollot]\nlr = 1", r"table is '\[rollot\]': there is no such table"),
        ("\xff", "it is not TOML"),
    ],
)
def test_a_bad_recipe_is_refused(tmp_path, text, reason):
    recipe = tmp_path / "r.toml"
    recipe.write_bytes(text.encode("latin-1"))
    with pytest.raises(OptionError, match=reason):
        parse_options("train", [str(recipe)])


def test_a_misspelt_table_names_the_right_one(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[rollot]\nrollout_batch_size = 1")
    with pytest.raises(OptionError, match=r"Did you mean \[rollout\]\?"):
        parse_options("train", [str(recipe)])


def test_a_second_recipe_is_refused():
    with pytest.raises(OptionError, match=r"second\.toml"):
        parse_options("train", ["--hf-checkpoint", "m", "first.toml", "second.toml"])
