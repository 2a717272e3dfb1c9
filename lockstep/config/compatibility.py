"""What becomes of every slime flag: the data behind docs/compatibility.md and the parser's refusals.

`same` flags are options of ours with slime's meaning. The other three kinds are decided here, before an option is
typed: `accepted` flags ask for what happens anyway, `later` ones for what is not there yet, `never` ones for what does
not fit. A value in `works` is always fine, so that a slime script may spell out what it does not use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from lockstep.errors import OptionError


class Status(StrEnum):
    SAME = "same"
    ACCEPTED = "accepted"
    LATER = "later"
    NEVER = "never"


@dataclass(frozen=True)
class SlimeFlag:
    """One slime or Megatron flag and its fate."""

    flag: str
    status: Status
    note: str = ""
    """Same: what differs. Accepted: why its value is our behaviour anyway. Later and never: the reason."""
    remedy: str = ""
    """What to use instead, for a value that stops the run."""
    words: Literal["none", "one", "many"] = "one"
    """How many words follow the flag."""
    works: tuple[Any, ...] | None = None
    """Values that are fine; None for all of them."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Single values of a `same` flag that stop, with the reason."""
    default: Any = None
    """slime's default, where hooks may want to read it although the flag is not an option of ours."""

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def neutral(self) -> Any:
        """What hooks read as `args.<name>` when the flag is not an option of ours."""
        if self.works:
            return self.works[0]
        return False if self.words == "none" else self.default

    def refusal(self, value: Any) -> OptionError | None:
        """Why this value stops the run, or None."""
        plain = plain_value(value)
        if isinstance(plain, str) and plain in self.refused:
            return OptionError(self.flag, plain, self.refused[plain], self.remedy)
        if self.works is None or plain in self.works:
            return None
        return OptionError(self.flag, plain, self.note, self.remedy)


def plain_value(value: Any) -> Any:
    """A word of the command line as the bool, int, float or text that it spells; other values as they are."""
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _same(*flags: str, note: str = "", remedy: str = "", refused: Mapping[str, str] | None = None) -> list[SlimeFlag]:
    return [SlimeFlag(flag, Status.SAME, note, remedy, refused=refused or {}) for flag in flags]


def _accepted(
    *flags: str, why: str, words: Literal["none", "one", "many"] = "one", default: Any = None
) -> list[SlimeFlag]:
    return [SlimeFlag(flag, Status.ACCEPTED, why, words=words, default=default) for flag in flags]


def _only(*flags: str, value: Any, why: str, remedy: str) -> list[SlimeFlag]:
    """Accepted for one value, refused for every other."""
    return [SlimeFlag(flag, Status.ACCEPTED, f"only {value}: {why}", remedy, works=(value,)) for flag in flags]


def _later(
    *flags: str, why: str, use: str, words: Literal["none", "one", "many"] = "one", works: Any = None
) -> list[SlimeFlag]:
    neutral = (False,) if words == "none" else (works,)
    return [SlimeFlag(flag, Status.LATER, why, use, words, works=neutral) for flag in flags]


def _never(
    *flags: str, why: str, use: str, words: Literal["none", "one", "many"] = "one", works: Any = None
) -> list[SlimeFlag]:
    neutral = (False,) if words == "none" else (works,)
    return [SlimeFlag(flag, Status.NEVER, why, use, words, works=neutral) for flag in flags]


_NO_ROUTER = "a router is not there yet: requests go straight to the servers, which are all alike."
_USE_NO_ROUTER = "Leave it out; --rollout-external-engine-addrs names servers of your own."
_SENT_WHOLE = "weights are sent whole, and nothing of them is kept on the way."
_ALL_TO_ALL = "rows travel to experts on other ranks by all-to-all, whatever this says; results do not depend on it."
_SPEED_ONLY = "it chooses a kernel or a schedule and changes speed only."
_CHECKED = "never needed; checked against the HF config, and a disagreement stops."
_PPO = "there is no critic yet."
_USE_GRPO = "Use --advantage-estimator grpo or gspo without it."
_OWN_MODEL = "the loss and the model are not Megatron's, so Megatron's hooks have nothing to hold on to."

SECTIONS: dict[str, list[SlimeFlag]] = {
    "Cluster": [
        *_same("--actor-num-nodes", note="Above 1 with Ray: docs/multi-node.md."),
        *_same("--actor-num-gpus-per-node",
               note="Defaults to 1 (slime: 8). Each GPU has a process; with `--device cpu` there are only processes."),
        *_same("--rollout-num-gpus", note="Of servers, or of copies of the model for the embedded engine."),
        *_same("--rollout-num-gpus-per-engine", note="For `--rollout-engine sglang`."),
        *_accepted("--num-gpus-per-node", why="`--actor-num-gpus-per-node` says how many are used."),
        SlimeFlag(
            "--colocate",
            Status.ACCEPTED,
            "rollout and training share their device, unless `--rollout-num-gpus` gives sampling GPUs of its own.",
            "Leave it out, and give --rollout-num-gpus.",
            "none",
            works=(True,),
        ),
        *_accepted(
            "--offload", "--offload-train",
            words="none",
            why="the embedded engine has no weights of its own; SGLang's servers release theirs (`--offload-rollout`).",
        ),
        *_same("--offload-rollout", note="For `--rollout-engine sglang` on training's GPUs; on by default."),
        *_accepted("--distributed-backend", why="it is NCCL between GPUs and gloo between CPU processes."),
        *_same("--distributed-timeout-minutes", note="Defaults to 30 (slime: 10)."),
        *_never("--train-env-vars", why="all processes of a run have the shell's environment.",
                use="Set the variables in front of the command.", works="{}"),
        *_only(
            "--train-backend", value="megatron",
            why="the trainer is Lockstep's own and reads Megatron's flags.",
            remedy="Leave it out.",
        ),
    ],
    "Model and checkpoint": [
        *_same("--hf-checkpoint", note="The start weights too."),
        *_same(
            "--ref-load",
            note="A folder in HF format (slime: torch_dist). Start weights come from `--hf-checkpoint`.",
        ),
        *_later("--ref-ckpt-step", why="a reference is a folder in HF format and has no steps.",
                use="Give --ref-load the folder itself."),
        *_same("--load", "--save", note="Lockstep's own atomic checkpoints, not torch_dist."),
        *_same("--save-interval", note="Also after the last rollout (without it too); not at the ends of epochs."),
        *_same("--save-hf", "--no-save-optim"),
        *_accepted("--async-save", words="none", why="training waits for the write; only speed differs."),
        *_accepted("--model-name", why="the architecture is read from the HF config."),
        *_never("--custom-model-provider-path", why="models are Lockstep's own, not Megatron's.",
                use="Add the architecture to lockstep/models."),
        *_later("--only-train-params-name-list", "--freeze-params-name-list", words="many",
                why="freezing parameters is not there yet.", use="Leave it out to train all parameters."),
        *_later("--megatron-config-path", why=_PPO, use=_USE_GRPO),
        *_same("--custom-config-path", note="Names that are options are refused: they belong in the recipe."),
        *_later("--no-load-optim", "--no-load-rng", "--finetune", words="none",
                why="resuming always restores the whole state.",
                use="Leave out --load and give the weights as --hf-checkpoint to start afresh from them."),
    ],
    "Rollout": [
        *_same("--rollout-function-path"),
        *_same("--custom-generate-function-path",
               note="`lockstep.rollout.current_policy()` takes the place of posting to SGLang's router."),
        *_same("--rollout-temperature", "--rollout-top-p", "--rollout-top-k"),
        *_same("--rollout-max-response-len", note="Defaults to 1024 (slime: none)."),
        *_same("--rollout-max-prompt-len", "--rollout-max-context-len"),
        *_same("--rollout-stop", "--rollout-stop-token-ids", "--rollout-skip-special-tokens"),
        *_same("--rollout-shuffle", "--rollout-seed"),
        *_same("--rollout-batch-size", note="Defaults to 32 (slime: required)."),
        *_same("--n-samples-per-prompt", "--global-batch-size", "--num-steps-per-rollout"),
        *_same("--num-rollout", "--start-rollout-id"),
        *_same("--num-epoch", note="The rows that do not fill a rollout are carried over into the next epoch."),
        *_same("--over-sampling-batch-size", "--dynamic-sampling-filter-path"),
        *_same("--partial-rollout", "--mask-offpolicy-in-partial-rollout",
               note="see docs/rollouts.md. When a filter drops groups, interrupted ones go on in the same rollout."),
        *_same("--buffer-filter-path", "--rollout-sample-hook-path", "--rollout-sample-filter-path"),
        *_same("--rollout-all-samples-process-path"),
        *_same("--rollout-data-postprocess-path",
               note="`rollout_data` is a `lockstep.training_data.TrainingData` of objects, not a dict of lists."),
        *_same("--rollout-external-engine-addrs", note="For `--rollout-engine sglang`."),
        *_accepted("--rollout-data-transport", why="samples never leave the machine."),
        *_later("--buffer-sort-by-staleness", words="none", why="the buffer keeps its order.",
                use="Sort in a --buffer-filter-path function."),
        *_only("--flush-cache-interval", value=1, why="the cache is dropped at every change of the weights.",
               remedy="Use 1 or leave it out."),
    ],
    "Data": [
        *_same("--prompt-data", "--input-key", "--label-key", "--metadata-key", "--tool-key"),
        *_never("--multimodal-keys", why="the models read text only.", use="Use a text data set."),
        *_same("--apply-chat-template", "--apply-chat-template-kwargs"),
        *_same("--data-source-path",
               note="Built as `cls(args)`, or by `from_config(config, tokenizer)` where it has that. What `state_dict` "
               "returns goes into the checkpoint; without it `save(rollout_id)` and `load(rollout_id)` are called."),
        *_later("--disable-rollout-global-dataset", words="none", why="prompts always come from the data source.",
                use="Give --data-source-path a class of your own."),
        *_accepted("--loss-mask-type", default="qwen",
                   why="SFT finds the assistant's tokens by rendering the chat template itself, whatever its format."),
        *_accepted("--data-pad-size-multiplier", why="rows are packed without padding."),
    ],
    "Batching": [
        *_same("--micro-batch-size", "--use-dynamic-batch-size", "--max-tokens-per-gpu"),
        *_same("--log-probs-max-tokens-per-gpu", "--log-probs-chunk-size"),
        *_accepted("--balance-data", "--balance-by-flops", words="none",
                   why="micro-batches are always dealt to ranks by size; results do not depend on it."),
    ],
    "Algorithm": [
        *_same(
            "--advantage-estimator",
            refused=dict.fromkeys(
                ("cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "ppo"),
                "this estimator is not there yet.",
            ),
            remedy="Use grpo or gspo.",
        ),
        *_same("--loss-type", refused={"custom_loss": "losses of your own are not there yet."},
               remedy="Use policy_loss or sft_loss."),
        *_same("--eps-clip", "--eps-clip-high", "--eps-clip-c"),
        *_accepted("--value-clip", "--critic-lr", why="it is the critic's, and there is none."),
        *_later("--num-critic-only-steps", works=0, why=_PPO, use=_USE_GRPO),
        *_only("--kl-coef", value=0, why="a KL in the reward does nothing with grpo and gspo, in slime either.",
               remedy="Use --use-kl-loss and --kl-loss-coef."),
        *_same("--use-kl-loss", note="Without `--ref-load` the reference is `--hf-checkpoint` (slime: an error)."),
        *_same("--kl-loss-coef", "--kl-loss-type", "--use-unbiased-kl", "--ref-update-interval", "--entropy-coef"),
        *_accepted("--gamma", "--lambd", why="neither grpo nor gspo uses it."),
        *_same("--normalize-advantages"),
        *_same("--disable-grpo-std-normalization", "--disable-rewards-normalization", "--calculate-per-token-loss"),
        *_same("--use-rollout-logprobs", "--get-mismatch-metrics"),
        *_later("--use-rollout-entropy", words="none", why="entropy is reported by the training step only.",
                use="Leave it out and read train/entropy_loss."),
        *_same("--use-tis", "--tis-clip", "--tis-clip-low"),
        *_later("--custom-tis-function-path", why="importance corrections of your own are not there yet.",
                use="Use --use-tis."),
        *_never("--tis-level", why="slime has dropped it.", use="Use --use-tis."),
        *_later("--use-opsm", words="none", why="off-policy sequence masking is not there yet.", use="Use --use-tis."),
        *_accepted("--opsm-delta", why="it does nothing without `--use-opsm`."),
        *_same("--use-routing-replay", "--use-rollout-routing-replay"),
        *_later("--use-opd", words="none", why="on-policy distillation is not there yet.", use="Leave it out."),
        *_accepted("--opd-kl-coef", why="it does nothing without `--use-opd`."),
        *_later("--opd-type", "--opd-teacher-load", "--opd-teacher-ckpt-step",
                why="on-policy distillation is not there yet.", use="Leave it out."),
        *_later("--enable-mtp-training", words="none", why="multi-token prediction layers are not trained yet.",
                use="Leave it out."),
        *_accepted("--mtp-num-layers", "--mtp-loss-scaling-factor",
                   why="it does nothing without `--enable-mtp-training`."),
        *_later("--custom-loss-function-path", "--custom-advantage-function-path",
                "--custom-pg-loss-reducer-function-path",
                why="losses and advantages of your own are not there yet.",
                use="Use --custom-reward-post-process-path to change what rewards become."),
        *_accepted("--disable-compute-advantages-and-returns", words="none",
                   why="with sft_loss none are computed anyway; with policy_loss it is refused."),
        *_same("--seed", note="Seeds the generators of Python, NumPy and PyTorch for hooks; nothing else draws there."),
        *_same("--lr", "--clip-grad", "--weight-decay", "--adam-beta1", "--adam-beta2", "--adam-eps"),
        *_later("--reset-optimizer-states", words="none", why="the optimizer keeps its state between rollouts.",
                use="Leave it out."),
        *_later("--use-stateless-adam", words="none", why="only Adam with both moments is there.", use="Leave it out."),
        *_later("--use-score-centering", words="none", why="score centering is not there yet.", use="Use --use-tis."),
        *_later("--pg-loss-type", why="only the clipped objective is there.", use="Leave it out.", works="ppo"),
    ],
    "Reward": [
        *_same("--rm-type", refused={"ifbench": "this reward is not there yet."},
               remedy="Use --custom-rm-path with a function of your own.",
               note="math uses math-verify; see above."),
        *_same("--custom-rm-path", note="Runs in a worker process that is killed after `--reward-timeout`."),
        *_same("--rm-url", "--group-rm", "--reward-key", "--eval-reward-key"),
        *_same("--custom-reward-post-process-path",
               note="the metric rollout/raw_reward stays the mean of the samples' rewards."),
        *_later("--custom-convert-samples-to-train-data-path",
                why="the conversion of samples cannot be replaced yet.",
                use="Use --rollout-data-postprocess-path to change its result."),
    ],
    "Evaluation": [
        *_same("--eval-interval", note="Without it, data sets are evaluated before the first and after the last "
               "rollout (slime: never). Not at the ends of epochs."),
        *_same("--eval-prompt-data", "--eval-config", "--skip-eval-before-train"),
        *_same("--n-samples-per-eval-prompt", "--eval-temperature", "--eval-top-p", "--eval-top-k"),
        *_same("--eval-max-response-len", "--eval-max-prompt-len", "--eval-max-context-len", "--eval-min-new-tokens"),
        *_same("--eval-input-key", "--eval-label-key", "--eval-tool-key", "--eval-function-path"),
    ],
    "Weight sync": [
        *_same("--update-weight-mode", refused={"delta": "weights are sent whole."}, remedy="Use full."),
        *_same("--update-weight-transport", note="`tensor` besides. The embedded engine needs none."),
        *_same("--update-weight-disk-dir", "--check-weight-update-equal", note="For `--rollout-engine sglang`."),
        *_same("--update-weight-buffer-size",
               note="For `--rollout-engine sglang`. By default 2 GiB by CUDA IPC (slime: 512 MiB)."),
        *_accepted("--update-weight-local-checkpoint-dir", "--update-weight-delta-encoding",
                   "--update-weight-delta-checksum", why=_SENT_WHOLE),
        *_accepted("--update-weight-disk-keep-files", words="none", why=_SENT_WHOLE),
        *_later("--update-weights-interval", works=1, why="every rollout samples with the newest weights.",
                use="Use 1 or leave it out."),
        *_accepted("--keep-old-actor", words="none",
                   why="old log-probs are computed before the first step of a rollout, so no old copy is needed."),
        *_accepted("--release-train", words="none", why="the sampler needs the trainer's weights, which stay."),
        *_accepted("--custom-update-weight-post-write-path", why=_SENT_WHOLE),
    ],
    "SGLang and router": [
        *_later("--sglang-config", why=_NO_ROUTER, use=_USE_NO_ROUTER),
        *_same("--sglang-router-ip", "--sglang-router-port",
               note="Where Lockstep's own endpoint is opened (slime: where a router is found); see docs/serve.md."),
        *_accepted("--sglang-server-concurrency",
                   why="engines admit by `--rollout-max-running-requests` (embedded) or "
                   "`--sglang-max-running-requests`."),
        *_later("--prefill-num-servers", why=_NO_ROUTER, use=_USE_NO_ROUTER),
        *_accepted("--use-distributed-post", words="none", why="samples never leave the machine."),
        *_accepted("--http-proxy", why="the engine is in this process; rewards obey HTTP_PROXY of the environment."),
    ],
    "Megatron": [
        *_same("--tensor-model-parallel-size", "--context-parallel-size", "--expert-model-parallel-size",
               "--expert-tensor-parallel-size", note="explained in docs/parallelism.md."),
        *_same("--pipeline-model-parallel-size",
               note="Above 1 SGLang's servers sample, not the embedded engine: see docs/parallelism.md."),
        *_same("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"),
        *_accepted("--sequence-parallel", words="none",
                   why="it is always on where --tensor-model-parallel-size is above 1, and means nothing elsewhere."),
        *_accepted("--recompute-granularity",
                   why="selective recomputes all but attention (Megatron: what is named), with equal results."),
        *_accepted("--recompute-method", "--recompute-num-layers", why="every layer is recomputed on its own."),
        *_accepted("--recompute-modules", words="many", why="selective recomputes all but attention."),
        *_same("--optimizer", refused={"sgd": "only adam is there."}, remedy="Use adam."),
        *_same(
            "--lr-decay-style",
            refused=dict.fromkeys(("inverse-square-root", "WSD"), "this decay is not there."),
            remedy="Use constant, linear or cosine.",
        ),
        *_same("--min-lr", "--lr-decay-iters"),
        *_same("--lr-warmup-iters", "--lr-warmup-fraction", note="The first of n steps runs at lr / n (Megatron: 0)."),
        *_only("--lr-warmup-init", value=0, why="warm-up rises from 0.", remedy="Use 0 or leave it out."),
        *_same("--optimizer-cpu-offload", "--optimizer-offload-fraction", "--overlap-cpu-optimizer-d2h-h2d",
               note="The state leaves the GPU, the update stays there (Megatron: it runs on the CPU)."),
        *_accepted("--use-precision-aware-optimizer", words="none",
                   why="it changes nothing itself; it lets gradients and moments be less than fp32."),
        *_same("--main-grads-dtype"),
        *_same(
            "--exp-avg-dtype", "--exp-avg-sq-dtype",
            note="`8bit` is a code with a scale per 128 numbers. bf16 and 8-bit moments are rounded at random.",
            refused=dict.fromkeys(("fp16", "fp8"), "moments are fp32, bf16 or 8bit."),
            remedy="Use bf16, or 8bit in place of fp8.",
        ),
        *_only("--main-params-dtype", value="fp32",
               why="masters keep all 32 bits; where weights are bf16, only the 16 that these lack are stored.",
               remedy="Use fp32: with bf16 weights it takes no more memory than fp16 would."),
        *_accepted("--use-distributed-optimizer", words="none",
                   why="the optimizer's state is always divided over all ranks."),
        *_only("--attention-dropout", "--hidden-dropout", value=0, why="there is no dropout.",
               remedy="Use 0: dropout would make the trainer's log-probs differ from the sampler's."),
        *_accepted("--accumulate-allreduce-grads-in-fp32", words="none",
                   why="gradients add up in fp32, unless `--grad-reduce-in-bf16` (over ranks) or "
                   "`--main-grads-dtype bf16` (over micro-batches) says otherwise."),
        *_same("--grad-reduce-in-bf16", note="Over ranks only; micro-batches add up in `--main-grads-dtype`."),
        *_accepted("--attention-softmax-in-fp32", words="none", why="the softmax runs in fp32."),
        *_accepted("--attention-backend", "--transformer-impl", "--qwen-gdn-backend", why=_SPEED_ONLY),
        *_accepted("--moe-token-dispatcher-type", why=_ALL_TO_ALL),
        *_accepted("--moe-enable-deepep", words="none", why=_ALL_TO_ALL),
        *_accepted("--moe-grouped-gemm", "--moe-permute-fusion", "--use-flash-attn",
                   "--moe-shared-expert-overlap", "--overlap-grad-reduce", "--overlap-param-gather",
                   "--no-gradient-accumulation-fusion", "--no-rope-fusion", "--no-masked-softmax-fusion",
                   "--no-bias-swiglu-fusion", "--cross-entropy-loss-fusion", "--use-mcore-models",
                   "--no-persist-layer-norm", "--manual-gc", "--recompute-loss-function",
                   words="none", why=_SPEED_ONLY),
        *_accepted("--cross-entropy-fusion-impl", "--manual-gc-interval", "--num-workers", why=_SPEED_ONLY),
        *_accepted("--moe-token-drop-policy", why="no token is ever dropped."),
        SlimeFlag("--moe-router-load-balancing-type", Status.ACCEPTED, "the balancing loss has weight 0.",
                  "Use none.", works=("none", "aux_loss", "seq_aux_loss", "global_aux_loss")),
        *_never("--moe-expert-capacity-factor", why="no token is ever dropped.", use="Leave it out."),
        *_only("--moe-aux-loss-coeff", "--moe-z-loss-coeff", value=0, why="there is no auxiliary loss for the router.",
               remedy="Use 0: in reinforcement learning it would pull the policy away from the reward."),
        *_only("--moe-router-dtype", value="fp32",
               why="the router's softmax runs in fp32, on logits of the weights' precision, as in transformers.",
               remedy="Use fp32."),
        *_only("--moe-router-bias-update-rate", value=0, why="Qwen3's router has no bias to update.", remedy="Use 0."),
        SlimeFlag("--bf16", Status.ACCEPTED, "it means `--params-dtype bfloat16`, the default.",
                  "Use --params-dtype float32 for fp32.", "none", works=(True,)),
        *_never("--fp16", words="none", why="fp16 needs loss scaling, which is not there.",
                use="Use --params-dtype bfloat16."),
        *_accepted("--seq-length", "--make-vocab-size-divisible-by", "--padded-vocab-size", "--tokenizer-type",
                   "--tokenizer-model", "--ckpt-format", "--dist-ckpt-strictness",
                   why="lengths, vocabulary and formats come from the data and the HF checkpoint."),
        *_accepted("--use-rotary-position-embeddings", words="none", why="all supported models use rotary positions."),
        *_never("--add-qkv-bias", words="none", why="Qwen3's attention has no bias.", use="Leave it out."),
    ],
    "Megatron model shape": _accepted("--spec", why="the HF config decides which layers are built.") + _accepted(
        "--num-layers", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads",
        "--group-query-attention", "--num-query-groups", "--kv-channels", "--qk-layernorm", "--normalization",
        "--norm-epsilon", "--apply-layernorm-1p", "--position-embedding-type", "--rotary-base", "--rotary-percent",
        "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights", "--attention-output-gate",
        "--vocab-size", "--max-position-embeddings", "--num-experts", "--moe-ffn-hidden-size", "--moe-router-topk",
        "--moe-layer-freq", "--moe-router-score-function", "--moe-router-pre-softmax",
        "--moe-shared-expert-intermediate-size", "--moe-shared-expert-gate",
        why=_CHECKED,
    ),
    "Fault tolerance": [
        *_accepted("--use-fault-tolerance", words="none",
                   why="SGLang's servers and rewards are always guarded; the embedded engine cannot die alone."),
        *_same("--rollout-health-check-interval", "--rollout-health-check-timeout",
               note="For `--rollout-engine sglang`. A server is asked when it has not answered for so long."),
        *_accepted("--rollout-health-check-first-wait", why="servers are asked once they have started."),
    ],
    "Logging": [
        *_same("--use-wandb", "--wandb-mode", "--wandb-dir"),
        *_same("--wandb-key", note="Never written to a file; hooks read it as `***`."),
        *_same("--wandb-host", "--wandb-team", "--wandb-group", "--wandb-project", "--wandb-run-id"),
        *_same("--disable-wandb-random-suffix", "--wandb-always-use-train-step"),
        *_same("--use-tensorboard", "--tb-project-name", "--tb-experiment-name"),
        *_same("--log-multi-turn", "--log-passrate", "--log-reward-category", "--log-correct-samples"),
        *_same("--custom-rollout-log-function-path", "--custom-eval-rollout-log-function-path"),
    ],
    "Debug": [
        *_same("--debug-rollout-only", "--debug-train-only"),
        *_same("--save-debug-rollout-data", "--load-debug-rollout-data"),
        *_same("--load-debug-rollout-data-subsample", note="The first groups (slime: some of the first and last)."),
        *_same("--save-debug-train-data", note="A list of dicts, one per sample."),
        *_later("--load-forge-rollout-data", why="rollouts cannot be replayed with a live engine yet.",
                use="Use --load-debug-rollout-data."),
        *_never("--dump-details", why="each kind of debug data has its own option.",
                use="Use --save-debug-rollout-data and --save-debug-train-data."),
        *_later("--profile-target", words="many", why="profiling from the command line is not there yet.",
                use="Leave it out; perf/* metrics show the time of each phase."),
        *_later("--memory-recorder", works="torch", why="recording memory is not there yet.", use="Leave it out."),
        *_later("--record-memory-history", words="none", why="recording memory is not there yet.", use="Leave it out."),
        *_never("--ci-test", words="none", why="it switches on assertions of slime's own tests.",
                use="Use --logprob-diff-limit to stop when sampler and trainer disagree."),
    ],
    "Megatron hooks": [
        *_never("--custom-megatron-init-path", "--custom-megatron-before-log-prob-hook-path",
                "--custom-megatron-before-train-step-hook-path", why=_OWN_MODEL,
                use="Use --rollout-data-postprocess-path, or change lockstep/loop.py, which is short."),
    ],
}  # fmt: skip

FLAGS: dict[str, SlimeFlag] = {entry.name: entry for entries in SECTIONS.values() for entry in entries}
"""Every classified flag by its name with underscores."""

ALIASES: dict[str, str] = {
    "use_gated_attention": "attention_output_gate",
    "true_on_policy_mode": "true_on_policy",
}
"""Other spellings of an option."""

SHORTHANDS: dict[str, tuple[str, str]] = {"bf16": ("params_dtype", "bfloat16")}
"""Switches that mean a value of an option."""


def refuse_unavailable(values: Mapping[str, Any]) -> None:
    """Stop at the first given option whose value asks for what is not there.

    Raises:
        OptionError: with the reason and what to use instead.
    """
    for name, value in values.items():
        entry = FLAGS.get(name)
        if entry is not None and value is not None and (error := entry.refusal(value)):
            raise error


def notes(names: Iterable[str]) -> list[str]:
    """What to tell the user about accepted flags among the given ones: one line per reason."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        if (entry := FLAGS.get(name)) is not None and entry.status is Status.ACCEPTED:
            by_reason.setdefault(entry.note, []).append(entry.flag)
    return [f"{', '.join(flags)}: {reason}" for reason, flags in by_reason.items()]
