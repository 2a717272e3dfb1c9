"""What the optimizer does with a rollout: the loss, the update and how samples are packed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lockstep.config.base import Count, Decay, Index, NonNegative, OptionGroup, Positive
from lockstep.errors import OptionError


class AlgorithmOptions(OptionGroup):
    """The advantage and the loss."""

    advantage_estimator: Literal["grpo", "gspo"] = "grpo"
    """How rewards become advantages, and whether the importance ratio is per token (grpo) or per sequence (gspo)."""
    loss_type: Literal["policy_loss", "sft_loss"] = "policy_loss"
    """Reinforcement learning, or supervised fine-tuning: on the assistant's turns where a prompt is messages, on the
    label where it is text."""
    eps_clip: NonNegative = 0.2
    """The importance ratio is clipped below at 1 - eps_clip."""
    eps_clip_high: NonNegative = Field(default_factory=lambda data: data.get("eps_clip", 0.2))
    """The importance ratio is clipped above at 1 + eps_clip_high. Default: eps_clip."""
    eps_clip_c: float | None = Field(default=None, gt=1)
    """Dual clip: where the advantage is negative, the loss is at most eps_clip_c times its size."""
    use_kl_loss: bool = False
    """Add the KL to the reference model to the loss."""
    kl_loss_coef: NonNegative = 0.0
    """Weight of the KL loss. At 0 with use_kl_loss the KL is measured only."""
    kl_loss_type: Literal["k1", "k2", "k3", "low_var_kl"] = "k1"
    """Estimator of the KL; low_var_kl is k3 clamped to +-10."""
    use_unbiased_kl: bool = False
    """Weight the KL estimate by the importance ratio, which makes its gradient unbiased off policy."""
    ref_update_interval: Count | None = None
    """Rollouts after which the policy becomes the new reference model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, subtracted from the loss."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount of later rewards. grpo and gspo do not use it."""
    lambd: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Lambda of generalised advantage estimation. grpo and gspo do not use it."""
    normalize_advantages: bool = False
    """Whiten the advantages over all trainable tokens of the rollout."""
    disable_grpo_std_normalization: bool = False
    """Do not divide by the group's standard deviation (Dr. GRPO)."""
    disable_rewards_normalization: bool = False
    """Use rewards as advantages without subtracting the group's mean."""
    disable_compute_advantages_and_returns: bool = False
    """For sft_loss, which computes none anyway; refused with policy_loss."""
    calculate_per_token_loss: bool = False
    """Average the loss over all trainable tokens of the batch, in place of first within each sample."""
    use_rollout_logprobs: bool = False
    """Take the sampler's log-probs as old log-probs, in place of the trainer's own."""
    get_mismatch_metrics: bool = False
    """Report the importance-correction metrics of trainer against sampler without correcting."""
    use_tis: bool = False
    """Multiply the loss by the truncated importance weight of trainer against sampler."""
    tis_clip: NonNegative = 2.0
    """Upper bound of that weight."""
    tis_clip_low: NonNegative = 0.0
    """Lower bound of that weight."""
    use_routing_replay: bool = False
    """Route the training forward through the experts chosen when the old log-probs were computed (R2)."""
    use_rollout_routing_replay: bool = False
    """Route the trainer's forwards through the experts that the sampler chose (R3)."""
    true_on_policy: bool = False
    """Give every token the same bits in sampling and in training, whatever is computed beside it. A step in which a
    log-prob of the two differs at all stops the run. For Qwen3 and Qwen3-MoE in one process; slower."""
    logprob_diff_limit: Positive = 1.0
    """Stop when the mean absolute difference of the trainer's and the sampler's log-probs exceeds this."""

    @model_validator(mode="after")
    def _kl_must_have_an_effect(self) -> AlgorithmOptions:
        needs = {
            "--kl-loss-coef": self.kl_loss_coef,
            "--use-unbiased-kl": self.use_unbiased_kl,
            "--ref-update-interval": self.ref_update_interval,
        }
        for flag, value in needs.items():
            if value and not self.use_kl_loss:
                raise OptionError(flag, value, "without --use-kl-loss it does nothing.", "Add --use-kl-loss.")
        return self

    @model_validator(mode="after")
    def _sft_has_one_term(self) -> AlgorithmOptions:
        for flag, value in {"--use-kl-loss": self.use_kl_loss, "--entropy-coef": self.entropy_coef}.items():
            if value and self.loss_type == "sft_loss":
                raise OptionError(flag, value, "with --loss-type sft_loss it does nothing.", "Leave it out.")
        return self

    @model_validator(mode="after")
    def _correction_must_be_consistent(self) -> AlgorithmOptions:
        if self.use_tis and self.use_rollout_logprobs:
            raise OptionError(
                "--use-tis",
                True,
                "with --use-rollout-logprobs the ratio already is trainer against sampler.",
                "Use one of the two.",
            )
        if self.tis_clip_low > self.tis_clip:
            raise OptionError(
                "--tis-clip-low", self.tis_clip_low, f"it exceeds --tis-clip {self.tis_clip:g}.", "Use a lower value."
            )
        return self

    @model_validator(mode="after")
    def _policy_loss_needs_advantages(self) -> AlgorithmOptions:
        if self.disable_compute_advantages_and_returns and self.loss_type == "policy_loss":
            raise OptionError(
                "--disable-compute-advantages-and-returns",
                True,
                "policy_loss learns from advantages.",
                "Use it with --loss-type sft_loss only.",
            )
        return self


MomentDtype = Literal["fp32", "bf16", "8bit"]


class OptimizerOptions(OptionGroup):
    """The update and its learning rate."""

    optimizer: Literal["adam"] = "adam"
    """AdamW."""
    lr: NonNegative = 1e-6
    """Learning rate after warm-up."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls from lr to min_lr after warm-up."""
    lr_decay_iters: Count | None = None
    """Optimizer steps until min_lr is reached. Default: the whole run."""
    lr_warmup_iters: Index = 0
    """Optimizer steps of linear warm-up."""
    lr_warmup_fraction: Decay | None = None
    """Warm-up as a fraction of lr_decay_iters, in place of lr_warmup_iters."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, on matrices only (not on norms and biases)."""
    adam_beta1: Decay = 0.9
    """Decay of the first moment."""
    adam_beta2: Decay = 0.999
    """Decay of the second moment."""
    adam_eps: Positive = 1e-8
    """Added to the root of the second moment."""
    clip_grad: NonNegative = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    use_precision_aware_optimizer: bool = False
    """Allow gradients and moments in less than fp32, with the dtype options below."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """How gradients of bf16 weights add up over micro-batches and wait for the update. bf16 rounds every addition."""
    exp_avg_dtype: MomentDtype = "fp32"
    """First moment: fp32, bf16, or 8-bit codes with a scale per block of 128. Masters are fp32 in any case."""
    exp_avg_sq_dtype: MomentDtype = "fp32"
    """Second moment, likewise."""
    optimizer_cpu_offload: bool = False
    """Keep the optimizer's state in pinned host memory and stream it through the GPU's update. CPU: no difference."""
    optimizer_offload_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the parameters whose state optimizer_cpu_offload moves, from the model's end."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Copy state in, update and copy it out at the same time, for four more buffers on the GPU."""
    seed: int = 1234
    """Seed of the generators of Python, NumPy and PyTorch, for hooks that draw from them, and of the rounding of
    bf16 and 8-bit moments. Sampling has rollout_seed."""

    @model_validator(mode="after")
    def _schedule_must_be_consistent(self) -> OptimizerOptions:
        if self.min_lr > self.lr:
            raise OptionError("--min-lr", self.min_lr, f"it exceeds --lr {self.lr:g}.", "Use a value up to --lr.")
        if self.lr_warmup_iters and self.lr_warmup_fraction is not None:
            raise OptionError(
                "--lr-warmup-fraction",
                self.lr_warmup_fraction,
                f"--lr-warmup-iters {self.lr_warmup_iters} says it too.",
                "Give one of the two.",
            )
        if self.lr_decay_iters is not None and self.lr_warmup_iters >= self.lr_decay_iters:
            raise OptionError(
                "--lr-warmup-iters",
                self.lr_warmup_iters,
                f"warm-up would last until --lr-decay-iters {self.lr_decay_iters}.",
                f"Use less than {self.lr_decay_iters}.",
            )
        return self

    @model_validator(mode="after")
    def _less_than_fp32_must_be_wanted(self) -> OptimizerOptions:
        dtypes = {
            "--main-grads-dtype": self.main_grads_dtype,
            "--exp-avg-dtype": self.exp_avg_dtype,
            "--exp-avg-sq-dtype": self.exp_avg_sq_dtype,
        }
        for flag, dtype in dtypes.items():
            if dtype != "fp32" and not self.use_precision_aware_optimizer:
                raise OptionError(
                    flag,
                    dtype,
                    "without --use-precision-aware-optimizer everything is fp32.",
                    "Add --use-precision-aware-optimizer.",
                )
        return self


class BatchingOptions(OptionGroup):
    """How samples become micro-batches. None of it changes the result, only speed and memory."""

    micro_batch_size: Count = 1
    """Samples per micro-batch when use_dynamic_batch_size is off."""
    use_dynamic_batch_size: bool = False
    """Pack samples of any length up to max_tokens_per_gpu per micro-batch."""
    max_tokens_per_gpu: Count | None = None
    """Tokens of a packed micro-batch. A longer sample gets one of its own."""
    log_probs_max_tokens_per_gpu: Count | None = Field(default_factory=lambda data: data.get("max_tokens_per_gpu"))
    """Tokens of a packed micro-batch in passes without gradient. Default: max_tokens_per_gpu."""
    log_probs_chunk_size: Annotated[int, Field(ge=-1)] = -1
    """Tokens per chunk of the fused log-probs; -1 chooses."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute every layer in backward to save memory. selective keeps what attention found (on a Hopper GPU in bf16,
    without context parallelism) and recomputes the rest of the layer."""
    backward_order: Literal["micro-batch", "layer"] = "micro-batch"
    """Finish one micro-batch after the other, or one layer after the other for all micro-batches (layer). By layer,
    gradients add up in fp32 one layer at a time, whatever main_grads_dtype; activations are recomputed, and the inputs
    of all layers of the whole step must fit into memory."""

    @model_validator(mode="after")
    def _dynamic_batches_need_a_size(self) -> BatchingOptions:
        if self.use_dynamic_batch_size and self.max_tokens_per_gpu is None:
            raise OptionError(
                "--max-tokens-per-gpu",
                None,
                "--use-dynamic-batch-size needs the size of a micro-batch.",
                "Give --max-tokens-per-gpu.",
            )
        return self
