"""The argument arrays of slime's two seed recipes, word for word, and what becomes of each flag.

Each line is an outcome and a flag: it works as in slime (same), asks for what happens anyway (accepted), works because
its value is 1 (one), is kept for SGLang (sglang), or stops with what to use instead (stops).
"""

from __future__ import annotations

import shlex

import pytest

from lockstep.config.checks import check_training
from lockstep.config.compatibility import ALIASES, FLAGS, Status
from lockstep.config.config import HOME
from lockstep.config.parsing import parse_options
from lockstep.errors import OptionError

COMMON = """
same      --input-key prompt
same      --label-key label
same      --apply-chat-template
same      --rollout-shuffle
same      --rm-type deepscaler
same      --num-rollout 3000
same      --rollout-temperature 1
accepted  --balance-data
same      --eval-interval 20
same      --eval-top-p 1
same      --actor-num-gpus-per-node 8
accepted  --colocate
accepted  --sequence-parallel
same      --expert-model-parallel-size 8
same      --expert-tensor-parallel-size 1
accepted  --recompute-granularity full
accepted  --recompute-method uniform
accepted  --recompute-num-layers 1
same      --use-dynamic-batch-size
same      --entropy-coef 0.00
same      --optimizer adam
same      --lr 1e-6
same      --lr-decay-style constant
same      --weight-decay 0.1
same      --adam-beta1 0.9
same      --adam-beta2 0.98
same      --optimizer-cpu-offload
same      --overlap-cpu-optimizer-d2h-h2d
accepted  --use-precision-aware-optimizer
same      --use-wandb
same      --wandb-project slime-dev
same      --wandb-group group
same      --wandb-key secret
same      --rollout-num-gpus-per-engine 8
accepted  --attention-dropout 0.0
accepted  --hidden-dropout 0.0
accepted  --accumulate-allreduce-grads-in-fp32
accepted  --attention-softmax-in-fp32
accepted  --attention-backend flash
accepted  --disable-bias-linear
accepted  --qk-layernorm
accepted  --group-query-attention
accepted  --normalization RMSNorm
accepted  --norm-epsilon 1e-6
accepted  --swiglu
accepted  --untie-embeddings-and-output-weights
accepted  --vocab-size 151936
accepted  --num-layers 48
accepted  --hidden-size 2048
accepted  --moe-router-score-function softmax
accepted  --moe-layer-freq [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]
accepted  --moe-grouped-gemm
accepted  --moe-token-drop-policy probs
accepted  --moe-router-dtype fp32
accepted  --moe-permute-fusion
accepted  --moe-aux-loss-coeff 0
accepted  --moe-token-dispatcher-type alltoall
accepted  --moe-router-load-balancing-type none
"""  # noqa: E501

QWEN3_30B_A3B = (
    COMMON
    + """
same      --hf-checkpoint /root/Qwen3-30B-A3B
same      --ref-load /root/Qwen3-30B-A3B_torch_dist
same      --load /root/Qwen3-30B-A3B_slime/
same      --save /root/Qwen3-30B-A3B_slime/
same      --save-interval 20
same      --prompt-data /root/dapo-math-17k/dapo-math-17k.jsonl
same      --rollout-batch-size 32
same      --n-samples-per-prompt 8
same      --rollout-max-response-len 8192
same      --global-batch-size 256
same      --eval-prompt-data aime /root/aime-2024/aime-2024.jsonl
same      --n-samples-per-eval-prompt 16
same      --eval-max-response-len 16384
same      --actor-num-nodes 1
same      --tensor-model-parallel-size 4
same      --pipeline-model-parallel-size 1
same      --context-parallel-size 1
same      --max-tokens-per-gpu 20480
same      --advantage-estimator grpo
same      --use-kl-loss
same      --kl-loss-coef 0.00
same      --kl-loss-type low_var_kl
accepted  --kl-coef 0.00
same      --eps-clip 0.2
same      --eps-clip-high 0.28
sglang    --sglang-mem-fraction-static 0.7
sglang    --sglang-cuda-graph-bs 1 2 4 8 16 24 32 40 48 56 64 72 80 88 96 104 112 120 128 136 144 152 160
sglang    --sglang-enable-ep-moe
sglang    --sglang-ep-size 8
sglang    --sglang-enable-dp-attention
sglang    --sglang-dp-size 8
sglang    --sglang-moe-dense-tp-size 1
sglang    --sglang-enable-dp-lm-head
sglang    --sglang-ep-num-redundant-experts 16
accepted  --ffn-hidden-size 6144
accepted  --num-attention-heads 32
accepted  --num-query-groups 4
accepted  --kv-channels 128
accepted  --rotary-base 1000000
accepted  --num-experts 128
accepted  --moe-ffn-hidden-size 768
accepted  --moe-router-topk 8
accepted  --moe-router-pre-softmax false
"""
)

QWEN3_NEXT_80B_A3B = (
    COMMON
    + """
accepted  --spec slime_plugins.models.qwen3_next get_qwen3_next_spec
same      --hf-checkpoint /root/Qwen3-Next-80B-A3B-Thinking
same      --ref-load /root/Qwen3-Next-80B-A3B-Thinking_torch_dist
same      --load /root/Qwen3-Next-80B-A3B-Thinking_slime/
same      --save /root/Qwen3-Next-80B-A3B-Thinking_slime/
same      --save-interval 20
same      --prompt-data /root/dapo-math-17k/dapo-math-17k.jsonl
same      --rollout-batch-size 8
same      --n-samples-per-prompt 8
same      --rollout-max-response-len 32768
same      --global-batch-size 64
same      --eval-prompt-data aime /root/aime-2024/aime-2024.jsonl
same      --n-samples-per-eval-prompt 8
same      --eval-max-response-len 32768
same      --actor-num-nodes 4
same      --tensor-model-parallel-size 2
same      --pipeline-model-parallel-size 4
same      --decoder-last-pipeline-num-layers 9
same      --context-parallel-size 4
same      --max-tokens-per-gpu 8192
same      --advantage-estimator gspo
same      --kl-loss-coef 0.00
same      --kl-loss-type low_var_kl
accepted  --kl-coef 0.00
same      --eps-clip 4e-4
sglang    --sglang-mem-fraction-static 0.8
sglang    --sglang-ep-size 8
sglang    --sglang-cuda-graph-bs 1 2 4 8 16 24 32 40 48 56 64 72 80 88 96 104 112 120 128
sglang    --sglang-speculative-algorithm EAGLE
sglang    --sglang-speculative-num-steps 3
sglang    --sglang-speculative-eagle-topk 1
sglang    --sglang-speculative-num-draft-tokens 4
sglang    --sglang-max-running-requests 256
accepted  --moe-enable-deepep
accepted  --moe-token-dispatcher-type flex
same      --grad-reduce-in-bf16
accepted  --ffn-hidden-size 5120
accepted  --num-attention-heads 16
accepted  --num-query-groups 2
accepted  --kv-channels 256
accepted  --use-gated-attention
accepted  --attention-output-gate
accepted  --apply-layernorm-1p
accepted  --position-embedding-type rope
accepted  --rotary-percent 0.25
accepted  --rotary-base 10000000
accepted  --num-experts 512
accepted  --moe-ffn-hidden-size 512
accepted  --moe-shared-expert-intermediate-size 512
accepted  --moe-shared-expert-gate
accepted  --moe-router-topk 10
accepted  --mtp-num-layers 1
"""
)


def rows(recipe: str) -> list[tuple[str, list[str]]]:
    """(outcome, words) for each line."""
    return [
        (outcome, shlex.split(rest))
        for outcome, rest in (line.split(maxsplit=1) for line in recipe.split("\n") if line)
    ]


def words_except(recipe: str, left_out: set[str]) -> list[str]:
    return [word for _, words in rows(recipe) if words[0] not in left_out for word in words]


def first_stop(words: list[str]) -> OptionError | None:
    try:
        check_training(parse_options("train", words).config)
    except OptionError as error:
        return error
    return None


@pytest.mark.parametrize("recipe", [QWEN3_30B_A3B, QWEN3_NEXT_80B_A3B], ids=["30b", "next"])
def test_exactly_the_marked_flags_stop_and_say_what_to_use(recipe):
    stopped: list[str] = []
    while error := first_stop(words_except(recipe, set(stopped))):
        assert error.remedy.startswith(("Use ", "Leave it out"))
        assert error.field not in stopped
        stopped.append(error.field)
    assert sorted(stopped) == sorted(words[0] for outcome, words in rows(recipe) if outcome == "stops")


@pytest.mark.parametrize("recipe", [QWEN3_30B_A3B, QWEN3_NEXT_80B_A3B], ids=["30b", "next"])
def test_every_other_flag_has_the_marked_outcome(recipe):
    stops = {words[0] for outcome, words in rows(recipe) if outcome == "stops"}
    config = parse_options("train", words_except(recipe, stops)).config
    for outcome, words in rows(recipe):
        name = words[0].removeprefix("--").replace("-", "_")
        name = ALIASES.get(name, name)
        if outcome == "same":
            assert (FLAGS[name].status, HOME.get(name) is not None) == (Status.SAME, True), name
        elif outcome == "accepted":
            assert FLAGS[name].status is Status.ACCEPTED, name
        elif outcome == "one":
            assert (FLAGS[name].status, FLAGS[name].works, words[1:]) == (Status.LATER, (1,), ["1"]), name
        elif outcome == "sglang":
            assert name.removeprefix("sglang_") in config.sglang.server_args


def test_the_30b_recipe_arrives_as_written():
    config = parse_options("train", words_except(QWEN3_30B_A3B, set())).config
    assert config.cluster.actor_num_gpus_per_node == config.parallel.expert_model_parallel_size == 8
    assert config.parallel.tensor_model_parallel_size == 4
    assert (config.rollout.samples_per_rollout, config.rollout.steps_per_rollout) == (256, 1)
    assert (config.algorithm.eps_clip, config.algorithm.eps_clip_high) == (0.2, 0.28)
    assert (config.optimizer.adam_beta2, config.optimizer.lr) == (0.98, 1e-6)
    assert config.sglang.cuda_graph_bs[:5] == (1, 2, 4, 8, 16)
    assert config.batching.log_probs_max_tokens_per_gpu == 20480
    assert config.eval.eval_prompt_data == ("aime", "/root/aime-2024/aime-2024.jsonl")


def test_the_last_dispatcher_of_the_next_recipe_counts_and_its_model_flags_arrive():
    stops = {words[0] for outcome, words in rows(QWEN3_NEXT_80B_A3B) if outcome == "stops"}
    config = parse_options("train", words_except(QWEN3_NEXT_80B_A3B, stops)).config
    assert config.algorithm.eps_clip_high == 4e-4
    assert config.model.spec == ("slime_plugins.models.qwen3_next", "get_qwen3_next_spec")
    assert config.model.attention_output_gate is True
    assert config.sglang.server_args["speculative_algorithm"] == "EAGLE"
