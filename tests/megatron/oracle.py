"""Megatron-Core's own model and checkpoints on the CPU, with mbridge between its weights and HF's.

Run by the tests in the environment of scripts/setup_megatron, as several processes that go through a list of cases. It
imports nothing of Lockstep.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

warnings.filterwarnings("ignore")
torch.cuda.current_device = lambda: torch.device("cpu")  # where Megatron makes its tensors
torch.cuda.synchronize = lambda *_: None

from mbridge import AutoBridge  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from next_model import make_next_model  # noqa: E402
from transformers import AutoConfig  # noqa: E402

moe_utils.te_general_gemm = None  # which it forgets to say when Transformer Engine is not there
CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()  # there is no GPU's random state to keep apart

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class Case:
    """What is loaded and saved, and in which layout."""

    hf: str
    """Folder with the config.json."""
    out: str
    """File for the logits, and for the weights as mbridge exports them."""
    save: str
    """Where Megatron saves the weights."""
    load: str | None = None
    """Checkpoint with the weights; random ones without it."""
    tp: int = 1
    ep: int = 1
    etp: int = 1
    moe_layer_freq: int | list[int] = 1
    metadata: dict[str, Any] | None = None
    """Of the sharded state dict that is saved."""
    has_mtp: bool = False
    te_names: bool = False
    """Name the norms before experts as the layers of Transformer Engine do."""


def main() -> None:
    cases, meeting, rank, world_size = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(world_size))
    for case in json.loads(Path(cases).read_text()):
        run(Case(**case))
    dist.destroy_process_group()


def run(case: Case) -> None:
    parallel_state.initialize_model_parallel(
        case.tp, expert_model_parallel_size=case.ep, expert_tensor_parallel_size=case.etp
    )
    torch.manual_seed(dist.get_rank())
    hf, bridge = AutoConfig.from_pretrained(case.hf), None
    if hf.model_type == "qwen3_next":  # mbridge does not know it
        model = make_next_model(
            hf,
            vocab_size=padded(hf.vocab_size, case),
            has_mtp=case.has_mtp,
            parallel={"tensor_model_parallel_size": case.tp, "expert_model_parallel_size": case.ep},
        )
    else:
        bridge = make_bridge(case)
        model = make_model(bridge, case)
    if case.load:
        load(model, Path(case.load))
    else:
        make_replicas_equal(model)
    weights = exported(bridge, model) if bridge else {}
    Path(case.save).mkdir(parents=True, exist_ok=True)
    state = {"model": model.sharded_state_dict(metadata=case.metadata)}
    dist_checkpointing.save(state, case.save, content_metadata=case.metadata)
    logits = forward(model)
    if dist.get_rank() == 0:
        torch.save({"logits": logits, "weights": weights}, case.out)
    parallel_state.destroy_model_parallel()


def padded(vocab_size: int, case: Case) -> int:
    """The vocabulary as Megatron's trainer pads it."""
    multiple = VOCABULARY_MULTIPLE * case.tp
    return -(-vocab_size // multiple) * multiple


def make_bridge(case: Case) -> Any:
    """mbridge for the model type, with settings that a CPU can compute."""
    bridge = AutoBridge.from_pretrained(str(case.hf), make_vocab_size_divisible_by=VOCABULARY_MULTIPLE * case.tp)
    bridge.dtype = torch.float32
    hf = bridge.hf_config
    bridge.set_extra_args(
        use_cpu_initialization=True,
        sequence_parallel=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        add_qkv_bias=hf.attention_bias,
        init_method_std=0.3,
        **(
            {
                "moe_grouped_gemm": False,
                "moe_layer_freq": case.moe_layer_freq,
                "moe_token_dispatcher_type": "allgather",  # the others want streams
                "variable_seq_lengths": False,
            }
            if getattr(hf, "num_experts", None)
            else {}
        ),
    )
    return bridge


def make_model(bridge: Any, case: Case) -> GPTModel:
    """GPTModel of Megatron's local layers, every parameter drawn."""
    hf, config = bridge.hf_config, bridge.config
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    if case.te_names:
        for layer in spec.layer_specs:
            if "Moe" in str(layer.submodules.mlp.module) or "MoE" in str(layer.submodules.mlp.module):
                layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    bridge.vocab_size = hf.vocab_size
    bridge.padded_vocab_size = padded(hf.vocab_size, case)
    model = GPTModel(
        config,
        spec,
        vocab_size=bridge.padded_vocab_size,
        max_sequence_length=hf.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(hf.rope_parameters["rope_theta"]),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.manual_seed(0)
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
    return model


def make_replicas_equal(model: GPTModel) -> None:
    """Megatron's trainer starts what several processes hold with equal values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not getattr(parameter, "tensor_model_parallel", False) and ".local_experts." not in name:
                dist.broadcast(parameter, src=0)


def load(model: GPTModel, checkpoint: Path) -> None:
    metadata = dist_checkpointing.load_content_metadata(str(checkpoint))
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(checkpoint))
    model.load_state_dict(loaded["model"])


def forward(model: GPTModel) -> Tensor:
    """Logits of the first 16 token ids in order, without the padding of the vocabulary."""
    model.mtp_process, model.config.mtp_num_layers = False, None  # it would want labels, and give a loss
    ids = torch.arange(16)[None]
    later = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(ids, ids, later)[0]


def exported(bridge: Any, model: GPTModel) -> dict[str, Tensor]:
    """HF's tensors, put together from all processes as mbridge does."""
    weights, is_sparse, mpu = {}, bridge.config.num_moe_experts is not None, bridge.mpu
    for name, parameter in model.named_parameters():
        copies, is_expert = [parameter.detach()], ".local_experts." in name
        if getattr(parameter, "tensor_model_parallel", False) and (mpu.etp_size if is_expert else mpu.tp_size) > 1:
            parts = gathered(copies[0], mpu.etp_group if is_expert else mpu.tp_group)
            copies = [bridge._weight_merge_across_tp(te_name(name, is_sparse=is_sparse), parts, parameter)]
        if is_expert:
            copies = gathered(copies[0], mpu.ep_group)
        for rank, copy in enumerate(copies):
            first = rank * bridge.config.num_moe_experts // mpu.ep_size if is_expert else 0
            global_name = te_name(name, is_sparse=is_sparse, first_expert=first)
            names, tensors = bridge._weight_to_hf_format(global_name, copy)
            weights |= {hf_name: tensor.clone() for hf_name, tensor in zip(names, tensors, strict=True)}
    return weights


def gathered(tensor: Tensor, group: Any) -> list[Tensor]:
    """The tensors of all processes of a group."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def te_name(name: str, *, is_sparse: bool, first_expert: int = 0) -> str:
    """A parameter of the local layers by the name that mbridge knows."""
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    if not is_sparse:
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    if expert := re.search(r"experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight", name):
        return name.replace(expert[0], f"experts.{expert[2]}.weight{int(expert[1]) + first_expert}")
    return name


if __name__ == "__main__":
    main()
