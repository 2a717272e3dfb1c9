"""Small random models, each as transformers computes it and as Lockstep does, with the same weights."""

from __future__ import annotations

import random
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from lockstep.algorithms import Loss, make_policy_loss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.kernels.packed import PackedDocuments
from lockstep.models import LanguageModel, build_model, read_model_config
from lockstep.models.layers.moe import ChooseExperts, top_k_experts
from lockstep.trainer.local import LocalTrainer

VOCAB = 97


def dense_config(seed: int = 0, **changes: Any) -> Qwen3Config:
    """Two to four layers; heads, widths, biases and tied embeddings drawn from the seed."""
    return Qwen3Config(**(_common(random.Random(seed)) | changes), attn_implementation="eager")


def moe_config(seed: int = 0, **changes: Any) -> Qwen3MoeConfig:
    """The same with experts; which layers are dense, and whether weights are renormalised, drawn from the seed."""
    draw = random.Random(seed)
    common = _common(draw)
    layers = common["num_hidden_layers"]
    renormalises = bool(seed % 2)
    sparse = {
        "num_experts": draw.choice([4, 6, 8]),
        # One renormalised expert always weighs 1, so its router would have no gradient to compare.
        "num_experts_per_tok": draw.choice([2, 3] if renormalises else [1, 2, 3]),
        "moe_intermediate_size": draw.choice([16, 24]),
        "norm_topk_prob": renormalises,
        "decoder_sparse_step": 2 if seed % 3 == 2 else 1,
        "mlp_only_layers": [draw.randrange(layers)] if seed % 3 == 1 else [],
    }
    return Qwen3MoeConfig(**(common | sparse | changes), attn_implementation="eager", experts_implementation="eager")


def next_config(seed: int = 0, **changes: Any) -> Qwen3NextConfig:
    """Delta layers and gated attention in an order drawn from the seed, with at least one of each."""
    draw = random.Random(seed)
    common = _common(draw) | {"num_hidden_layers": draw.choice([2, 3, 4])}
    layers = common["num_hidden_layers"]
    renormalises = bool(seed % 2)
    interval = draw.choice([2, layers])
    key_heads = draw.choice([1, 2])
    rope = {"partial_rotary_factor": draw.choice([0.25, 0.5]), "rope_type": "default", "rope_theta": 1e7}
    mixed = {
        "head_dim": draw.choice([8, 16, 32]),
        "rope_parameters": rope,
        "layer_types": ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)],
        "linear_conv_kernel_dim": draw.choice([2, 4]),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw.choice([1, 2, 3]),
        "linear_key_head_dim": draw.choice([8, 16]),
        "linear_value_head_dim": draw.choice([8, 24]),
        "num_experts": draw.choice([4, 6, 8]),
        "num_experts_per_tok": draw.choice([2, 3]),
        "moe_intermediate_size": draw.choice([16, 24]),
        "shared_expert_intermediate_size": draw.choice([16, 40]),
        "norm_topk_prob": renormalises,
        "decoder_sparse_step": 2 if seed % 3 == 2 else 1,
        "mlp_only_layers": [draw.randrange(layers)] if seed % 3 == 1 else [],
    }
    return Qwen3NextConfig(**(common | mixed | changes), attn_implementation="eager", experts_implementation="eager")


CONFIGS = {"dense": dense_config, "moe": moe_config, "next": next_config}
"""Family -> its random config of a seed."""


def _common(draw: random.Random) -> dict[str, Any]:
    key_heads, heads_per_key = draw.choice([1, 2]), draw.choice([1, 2, 3])
    return {
        "vocab_size": VOCAB,
        "hidden_size": draw.choice([32, 48]),
        "intermediate_size": draw.choice([40, 64]),
        "num_hidden_layers": draw.choice([2, 3, 4]),
        "num_attention_heads": key_heads * heads_per_key,
        "num_key_value_heads": key_heads,
        "head_dim": draw.choice([8, 16, 24]),
        "max_position_embeddings": 512,
        "rms_norm_eps": draw.choice([1e-6, 1e-5]),
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([1e4, 1e6])},
        "attention_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }


def hf_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """transformers' model in fp32, every parameter drawn (also norms and biases, which start at 1 and 0 there)."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    zero_centred = isinstance(config, Qwen3NextConfig)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in name:
                parameter.copy_(0.2 * noise + (0.0 if zero_centred and "linear_attn" not in name else 1.0))
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3))
    return model


def twin_of(model: PreTrainedModel) -> LanguageModel:
    """Lockstep's model with the same weights; in memory both stack experts under the same names."""
    twin = build_model(read_model_config(model.config.to_dict()))
    twin.load_state_dict(model.state_dict())
    return twin


def tiny_dense(**changes: Any) -> LanguageModel:
    return twin_of(hf_model(dense_config(0, **changes)))


def tiny_next(**changes: Any) -> LanguageModel:
    return twin_of(hf_model(next_config(0, **changes)))


def tiny_moe(**changes: Any) -> LanguageModel:
    return twin_of(hf_model(moe_config(0, **changes)))


def packed_logits(model: LanguageModel, documents: list[list[int]], choose: ChooseExperts = top_k_experts) -> Tensor:
    """Logits `[T, V]` of the documents packed into one row."""
    lengths = [len(document) for document in documents]
    tokens = torch.tensor([token for document in documents for token in document])
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = model(tokens, positions, PackedDocuments(lengths, tokens.device), choose)
    return hidden @ model.lm_head.weight.T


def hf_logits(model: PreTrainedModel, documents: list[list[int]]) -> Tensor:
    """Logits `[T, V]` of the documents, each computed alone by transformers."""
    return torch.cat([model(torch.tensor([document])).logits[0] for document in documents])


def random_documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


class RoutingGap:
    """The router's own choice; remembers how close it came to another one."""

    def __init__(self) -> None:
        self.smallest = float("inf")

    def __call__(self, moe_index: int, probs_TE: Tensor, top_k: int) -> Tensor:
        ordered = probs_TE.detach().sort(-1, descending=True).values
        self.smallest = min(self.smallest, float((ordered[:, top_k - 1] - ordered[:, top_k]).min()))
        return top_k_experts(moe_index, probs_TE, top_k)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|; two tensors of zeros agree."""
    difference, size = float((ours - theirs).detach().abs().max()), float(theirs.detach().abs().max())
    return difference / size if size else difference


def tiny_trainer(
    model: LanguageModel,
    *,
    loss: Loss | None = None,
    temperature: float = 1.0,
    routing: Literal["own", "rollout", "old"] = "own",
    reference: LanguageModel | None = None,
    batching: dict[str, Any] | None = None,
    **optimizer: Any,
) -> LocalTrainer:
    return LocalTrainer(
        model,
        reference=reference,
        loss=loss or make_policy_loss(),
        optimizer=OptimizerOptions(**({"lr": 1e-2, "lr_decay_style": "constant"} | optimizer)),
        batching=BatchingOptions(**(batching or {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 128})),
        temperature=temperature,
        needs_entropy=True,
        routing=routing,
        num_steps=10,
    )
