"""Which model is trained, and where its training checkpoints live."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lockstep.config import checks
from lockstep.config.base import Count, Fraction, Index, NonNegative, OptionGroup, Positive
from lockstep.errors import OptionError

ShapeList = list[int] | int | str
"""Megatron's notation for one entry per layer: `[0,1,1]`, `1`, or `[0]*1+[1]*47`."""


class ModelOptions(OptionGroup):
    """The model. Its shape is read from the HF config; Megatron's shape flags are only checked against it."""

    hf_checkpoint: str = Field(min_length=1)
    """Folder in HF format with config.json, weights and tokenizer: the model's shape and start weights."""
    params_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in forward and backward. The optimizer's master weights are fp32 either way."""

    load_format: Literal["auto", "dummy"] = "auto"
    """`dummy`, SGLang's word, draws random weights and reads none: config.json and a tokenizer are enough to see how
    fast a run is and what memory it takes."""

    spec: tuple[str, str] | None = None
    """Megatron's layer spec (module and function). Accepted: the HF config decides which layers are built."""
    num_layers: Count | None = None
    """Checked against `num_hidden_layers`."""
    hidden_size: Count | None = None
    """Checked against `hidden_size`."""
    ffn_hidden_size: Count | None = None
    """Checked against `intermediate_size`."""
    num_attention_heads: Count | None = None
    """Checked against `num_attention_heads`."""
    group_query_attention: bool = False
    """Checked: `num_key_value_heads` must be below `num_attention_heads`."""
    num_query_groups: Count | None = None
    """Checked against `num_key_value_heads`."""
    kv_channels: Count | None = None
    """Checked against `head_dim`."""
    qk_layernorm: bool = False
    """Checked: the model must normalise queries and keys, as all Qwen3 models do."""
    normalization: str | None = None
    """Checked: the model must use this norm (RMSNorm)."""
    norm_epsilon: NonNegative | None = None
    """Checked against `rms_norm_eps`."""
    apply_layernorm_1p: bool = False
    """Checked: the model must scale by 1 + weight in its norms (Qwen3-Next)."""
    position_embedding_type: str | None = None
    """Checked: the model must use this kind of positions (rope)."""
    rotary_base: Positive | None = None
    """Checked against `rope_theta`."""
    rotary_percent: Fraction | None = None
    """Checked against `partial_rotary_factor`."""
    swiglu: bool = False
    """Checked: `hidden_act` must be silu."""
    disable_bias_linear: bool = False
    """Checked: `attention_bias` must be off."""
    untie_embeddings_and_output_weights: bool = False
    """Checked: `tie_word_embeddings` must be off."""
    attention_output_gate: bool = False
    """Checked: the model's attention must have an output gate (Qwen3-Next). Also spelled `--use-gated-attention`."""
    vocab_size: Count | None = None
    """Checked against `vocab_size`."""
    max_position_embeddings: Count | None = None
    """Checked against `max_position_embeddings`: may not exceed it."""
    num_experts: Count | None = None
    """Checked against `num_experts`."""
    moe_ffn_hidden_size: Count | None = None
    """Checked against `moe_intermediate_size`."""
    moe_router_topk: Count | None = None
    """Checked against `num_experts_per_tok`."""
    moe_layer_freq: ShapeList | None = None
    """Checked: which layers are mixtures of experts, one 0 or 1 per layer, `[1]*48`, or every n-th."""
    moe_router_score_function: str | None = None
    """Checked: the router's score (softmax)."""
    moe_router_pre_softmax: bool = False
    """Checked: `norm_topk_prob` must be off."""
    moe_shared_expert_intermediate_size: Index | None = None
    """Checked against `shared_expert_intermediate_size`."""
    moe_shared_expert_gate: bool = False
    """Checked: the model must have a gated shared expert (Qwen3-Next)."""


class CheckpointOptions(OptionGroup):
    """Training checkpoints, the reference model and HF exports."""

    ref_load: str | None = None
    """Folder in HF format of the reference model for the KL loss; without it, hf_checkpoint is the reference."""
    load: str | None = None
    """Training checkpoint folder to resume from. A folder that is empty or not there starts afresh."""
    save: str | None = None
    """Folder for training checkpoints."""
    save_interval: Count | None = None
    """Rollouts between checkpoints. Without it, `--save` writes at the end and when the run is stopped."""
    save_hf: str | None = None
    """Folder for HF exports, written with each checkpoint; `{rollout_id}` in it is replaced."""
    no_save_optim: bool = False
    """Leave optimizer state out of checkpoints. Such a checkpoint cannot resume bit for bit."""
    keep_last_checkpoints: Count | None = None
    """Newest checkpoints to keep; older ones are deleted after a save. Without it, all stay."""

    @model_validator(mode="after")
    def _check(self) -> CheckpointOptions:
        checks.reference_must_be_in_hf_format(self.ref_load)
        checks.only_the_rollout_may_vary({"--save-hf": self.save_hf})
        needs_save = {
            "--save-interval": self.save_interval,
            "--keep-last-checkpoints": self.keep_last_checkpoints,
            "--save-hf": self.save_hf,
        }
        for flag, value in needs_save.items():
            if value is not None and self.save is None:
                raise OptionError(flag, value, "there is no folder to save to.", "Give --save.")
        return self
