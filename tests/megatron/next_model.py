"""Qwen3-Next as Megatron-Core's GPTModel on the CPU: its gated delta net, output gate, shared expert and MTP layer.

Megatron builds it for Transformer Engine alone. Here its local layers take that place, with a norm that scales by
1 + weight, and the map of names says what Transformer Engine's fused layers call the norms.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.ssm import gated_delta_net
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

gated_delta_net.HAVE_FLA = True  # its deterministic mode needs nothing of it but this norm
gated_delta_net.l2norm = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class ZeroCentredNorm(nn.Module):
    """RMSNorm that scales by 1 + weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(0.2 * torch.randn(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), 1 + self.weight, self.eps)


def make_next_model(hf: Any, *, vocab_size: int, has_mtp: bool, parallel: dict[str, int]) -> GPTModel:
    """The model that HF's config describes, every parameter drawn."""
    is_sparse = [
        int(i not in hf.mlp_only_layers and (i + 1) % hf.decoder_sparse_step == 0) for i in range(hf.num_hidden_layers)
    ]
    config = TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=True,
        qk_layernorm=True,
        add_bias_linear=False,
        add_qkv_bias=hf.attention_bias,
        activation_func=F.silu,
        gated_linear_unit=True,
        attention_output_gate=True,
        experimental_attention_variant="gated_delta_net",
        linear_attention_freq=[int(kind == "linear_attention") for kind in hf.layer_types],
        linear_conv_kernel_dim=hf.linear_conv_kernel_dim,
        linear_key_head_dim=hf.linear_key_head_dim,
        linear_value_head_dim=hf.linear_value_head_dim,
        linear_num_key_heads=hf.linear_num_key_heads,
        linear_num_value_heads=hf.linear_num_value_heads,
        num_moe_experts=hf.num_experts,
        moe_layer_freq=is_sparse,
        moe_ffn_hidden_size=hf.moe_intermediate_size,
        moe_router_topk=hf.num_experts_per_tok,
        moe_router_pre_softmax=not hf.norm_topk_prob,
        moe_router_load_balancing_type="none",
        moe_shared_expert_intermediate_size=hf.shared_expert_intermediate_size,
        moe_shared_expert_gate=True,
        moe_token_dispatcher_type="allgather",
        mtp_num_layers=1 if has_mtp else None,
        deterministic_mode=True,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.3,
        **parallel,
    )
    layers = [
        _layer_spec(hf, is_delta=kind == "linear_attention", is_sparse=bool(sparse))
        for kind, sparse in zip(hf.layer_types, is_sparse, strict=True)
    ]
    mtp = None
    if has_mtp:
        mtp = get_gpt_mtp_block_spec(
            config, _layer_spec(hf, is_delta=False, is_sparse=True), use_transformer_engine=False
        )
        for name in ("enorm", "hnorm", "layer_norm"):
            setattr(mtp.layer_specs[0].submodules, name, ZeroCentredNorm)
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=ZeroCentredNorm),
        vocab_size=vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(hf.rope_parameters["rope_theta"]),
        rotary_percent=hf.rope_parameters["partial_rotary_factor"],
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        mtp_block_spec=mtp,
    ).eval()


def _layer_spec(hf: Any, *, is_delta: bool, is_sparse: bool) -> ModuleSpec:
    spec = deepcopy(
        get_gpt_layer_local_spec(
            num_experts=hf.num_experts if is_sparse else None, qk_layernorm=True, normalization="RMSNorm"
        )
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = ZeroCentredNorm
    names = parts.sharded_state_dict_keys_map
    if is_delta:
        parts.self_attention = ModuleSpec(
            module=gated_delta_net.GatedDeltaNet,
            submodules=gated_delta_net.GatedDeltaNetSubmodules(
                in_proj=ColumnParallelLinear, out_norm=ZeroCentredNorm, out_proj=RowParallelLinear
            ),
        )
        names["input_layernorm."] = "self_attention.in_proj.layer_norm_"
    else:
        parts.self_attention.submodules.q_layernorm = ZeroCentredNorm
        parts.self_attention.submodules.k_layernorm = ZeroCentredNorm
    if is_sparse:
        assert parts.mlp.module is MoELayer
        del names["pre_mlp_layernorm."]
    return spec
