"""HF folder -> Megatron-Core's distributed checkpoint: one unit of the mapping in memory at a time."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lockstep.checkpoint.hf.files import FLOATS, WeightFiles
from lockstep.checkpoint.hf.folder import OnBytes, read_hf_config
from lockstep.checkpoint.hf.fp8 import (
    SCALE_SUFFIX,
    Blocks,
    read_into,
    read_quantization,
    require_readable,
    require_weight,
)
from lockstep.checkpoint.hf.shards import whole
from lockstep.checkpoint.megatron.ahead import one_ahead
from lockstep.checkpoint.megatron.mapping import VOCABULARY_MULTIPLE, Mapping, Unit
from lockstep.checkpoint.megatron.ranks import ALONE, Ranks
from lockstep.checkpoint.megatron.torch_dist import (
    RELEASE,
    TRACKER,
    TorchDistWriter,
    Written,
    require_absent,
    write_index,
)
from lockstep.errors import ModelError
from lockstep.models import read_model_config
from lockstep.models.qwen3_next import Qwen3NextConfig

_GIVE_BACK_EVERY = 2**30
"""Bytes read, after which the pages of the files go back to the system."""
_OTHER_CONFIG = "Use the config.json that belongs to these weights."


def hf_to_torch_dist(source: Path, target: Path, *, ranks: Ranks = ALONE, on_bytes: OnBytes | None = None) -> None:
    """Write the model of an HF folder as `target/release`, as a Megatron run loads it, atomically.

    Everything that headers can tell is checked before the first tensor is read. Each process reads and writes its part.
    FP8 is scaled to bfloat16.

    Raises:
        OptionError: `target` exists.
        ModelError: another model type; a tensor is missing, surplus, or of another shape or type.
        CheckpointError: a file is missing or damaged, or cannot be written; then nothing is left behind.
    """
    require_absent("--save", target)
    config = read_model_config(read_hf_config(source))
    files, blocks = WeightFiles(source), read_quantization(read_hf_config(source))
    mapping = Mapping.of_hf_names(config, files.tensors)
    _require_weights(files, mapping, blocks)
    with ranks.atomic_directory(target) as temporary:
        folder = temporary / RELEASE
        ranks.first(folder.mkdir)
        parts = ranks.together(lambda: _write_part(folder, files, blocks, mapping, ranks, on_bytes))
        ranks.first(lambda: write_index(folder, parts, _common(mapping)))
        ranks.first(lambda: (temporary / TRACKER).write_text(RELEASE))


def _require_weights(files: WeightFiles, mapping: Mapping, blocks: Blocks | None) -> None:
    shapes = mapping.hf_shapes()
    for name, info in files.tensors.items():
        if name.endswith(SCALE_SUFFIX):
            require_weight(files, name)
            continue
        if name not in shapes:
            raise ModelError(
                f"{files.folder} tensor {name}",
                list(info.shape),
                "the model that config.json describes has no such tensor.",
                _OTHER_CONFIG,
            )
        require_readable(files, name, blocks)
        if info.shape != shapes[name]:
            raise ModelError(
                f"{files.folder} tensor {name}",
                list(info.shape),
                f"config.json asks for {list(shapes[name])}.",
                _OTHER_CONFIG,
            )
    if missing := [name for name in shapes if name not in files.tensors]:
        raise ModelError(
            f"{files.folder} tensor {missing[0]}",
            "missing",
            f"{len(missing)} tensors that config.json asks for are not in the safetensors files.",
            "Download the missing files, or use the config.json that belongs to these weights.",
        )
    _require_same_types(files, mapping)


def _require_same_types(files: WeightFiles, mapping: Mapping) -> None:
    """What Megatron keeps in one tensor must be of one type."""
    types: dict[str, tuple[str, torch.dtype]] = {}
    for unit in mapping.units:
        for name in unit.hf:
            dtype = _read_type(files, name)
            for place in unit.places:
                first, expected = types.setdefault(place.key(stacks_layers=mapping.stacks_layers), (name, dtype))
                if dtype != expected:
                    raise ModelError(
                        f"{files.folder} tensor {name}",
                        files.tensors[name].dtype,
                        f"Megatron keeps it in one tensor with {first}, which is {files.tensors[first].dtype}.",
                        "Store the weights in one type.",
                    )


def _read_type(files: WeightFiles, name: str) -> torch.dtype:
    """The type in which a stored tensor goes to Megatron."""
    return FLOATS.get(files.tensors[name].dtype, torch.bfloat16)


def _read(files: WeightFiles, name: str, blocks: Blocks | None) -> Tensor:
    info = files.tensors[name]
    if info.dtype in FLOATS:
        return files.read(name)
    tensor = torch.empty(info.shape, dtype=_read_type(files, name))
    read_into(tensor, files, name, whole(info.shape), blocks)
    return tensor


def _write_part(
    folder: Path, files: WeightFiles, blocks: Blocks | None, mapping: Mapping, ranks: Ranks, on_bytes: OnBytes | None
) -> Written:
    """Convert this process's part of the units."""

    def nbytes(unit: Unit) -> int:
        return sum(files.tensors[name].nbytes for name in unit.hf)

    units = ranks.share(mapping.units, nbytes)
    done, total = 0, sum(map(nbytes, units))
    states = _extra_states(mapping) if ranks.rank == 0 else ()
    with TorchDistWriter(folder, ranks.rank) as writer:
        for key in states:
            writer.add_object(key, _no_state())
        for unit, tensors in one_ahead(_converted(units, files, blocks)):
            for place, tensor in zip(unit.places, tensors, strict=True):
                key = place.key(stacks_layers=mapping.stacks_layers)
                writer.add_tensor(key, tensor, place.lead(stacks_layers=mapping.stacks_layers))
            done += nbytes(unit)
            if on_bytes is not None:
                on_bytes(done, total)
        return writer.written


def _converted(units: Sequence[Unit], files: WeightFiles, blocks: Blocks | None) -> Iterator[tuple[Unit, list[Tensor]]]:
    """Each unit with its tensors in Megatron's layout."""
    given_back = files.bytes_read
    for unit in units:
        yield unit, unit.layout.to_megatron([_read(files, name, blocks) for name in unit.hf])
        if files.bytes_read - given_back >= _GIVE_BACK_EVERY:
            files.close()
            given_back = files.bytes_read


def _extra_states(mapping: Mapping) -> Iterator[str]:
    """Names of the objects in which Transformer Engine's layers keep what FP8 needs; loading asks for each of them."""
    seen = set()
    for unit in mapping.units:
        for place in unit.places:
            module = place.module_name
            if module is None:
                continue
            for name in (module, "self_attention.core_attention") if module.endswith("linear_qkv") else (module,):
                key = place.key(stacks_layers=mapping.stacks_layers, name=f"{name}._extra_state")
                lead = place.lead(stacks_layers=mapping.stacks_layers) or ((0, 1),)
                index, sizes = (".".join(str(axis[i]) for axis in lead) for i in (0, 1))
                if (full := f"{key}/shard_{index}_{sizes}") not in seen:
                    seen.add(full)
                    yield full


@cache
def _no_state() -> bytes:
    pickled = io.BytesIO()
    torch.save([None], pickled)
    return pickled.getvalue()


def _common(mapping: Mapping) -> dict[str, Any]:
    """What Megatron reads before the tensors."""
    return {
        "args": Namespace(**_megatron_args(mapping)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"non_homogeneous_layers": not mapping.stacks_layers, "singleton_local_shards": False},
    }


def _megatron_args(mapping: Mapping) -> dict[str, Any]:
    """The model's shape by the names of Megatron's options."""
    config = mapping.config
    padded = config.vocab_size + -config.vocab_size % VOCABULARY_MULTIPLE
    args: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "norm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.attention_bias,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rope.theta),
        "rotary_percent": config.rope.rotary_dim / config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "add_position_embedding": True,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "padded_vocab_size": padded,
        "num_experts": config.num_experts or None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "ckpt_format": "torch_dist",
    }
    if config.num_experts:
        args |= {
            "moe_layer_freq": [int(config.is_sparse(layer)) for layer in range(config.num_hidden_layers)],
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "moe_router_topk": config.num_experts_per_tok,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not config.norm_topk_prob,
        }
    if isinstance(config, Qwen3NextConfig):
        args |= {
            "apply_layernorm_1p": True,
            "attention_output_gate": True,
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": [int(kind == "linear_attention") for kind in config.layer_types],
            "linear_conv_kernel_dim": config.linear_conv_kernel_dim,
            "linear_key_head_dim": config.linear_key_head_dim,
            "linear_value_head_dim": config.linear_value_head_dim,
            "linear_num_key_heads": config.linear_num_key_heads,
            "linear_num_value_heads": config.linear_num_value_heads,
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
            "mtp_num_layers": 1 if mapping.has_mtp else None,
        }
    return args
