"""Where the run happens: devices, parallel layout, SGLang servers and how weights reach them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from lockstep.config.base import Count, Index, OptionGroup
from lockstep.errors import OptionError


class ClusterOptions(OptionGroup):
    """Machines and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU when there is one."""
    num_threads: Count | None = None
    """CPU threads of PyTorch's operations in each process. Default: PyTorch's choice, divided by the processes. Results
    on CPU repeat for the same number."""
    actor_num_nodes: Count = 1
    """Machines that train."""
    actor_num_gpus_per_node: Count = 1
    """GPUs that train on each machine, each with a process of its own; without GPUs as many processes. slime's default
    is 8."""
    distributed_timeout_minutes: Count = 30
    """Minutes that processes wait for each other, and for a sign of life, before the run ends. slime's default: 10."""
    rollout_num_gpus: Index | None = None
    """GPUs of separate rollout engines. Default: rollout and training share theirs."""
    colocate: bool = True
    """Rollout and training share GPUs: here they even share the weights. slime's default is off."""


class ParallelOptions(OptionGroup):
    """How the model is divided over ranks."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: Count = 1
    """Ranks that share the layers. The embedded engine samples where it is 1."""
    decoder_first_pipeline_num_layers: Count | None = None
    """Layers of the first pipeline stage. Default: as many as the others."""
    decoder_last_pipeline_num_layers: Count | None = None
    """Layers of the last pipeline stage. Default: as many as the others."""
    context_parallel_size: Count = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: Count = 1
    """Ranks that share the experts."""
    expert_tensor_parallel_size: Count = 1
    """Ranks that share each expert's matrices: 1, as experts are divided over ranks whole."""
    sequence_parallel: bool = False
    """Divide activations over the tensor-parallel ranks; always on where those are more than one."""
    grad_reduce_in_bf16: bool = False
    """Sum gradients over ranks in bf16, not in fp32: half the traffic, and a rounding for every rank."""


class SglangOptions(OptionGroup):
    """Arguments for SGLang: every `--sglang-NAME` and `--router-NAME`, without the prefix."""

    server_args: dict[str, Any] = Field(default_factory=dict)
    """`--sglang-NAME value` for SGLang's servers. The embedded engine reads mem_fraction_static."""
    router_args: dict[str, Any] = Field(default_factory=dict)
    """`--router-NAME value` for SGLang's router."""

    @model_validator(mode="after")
    def _memory_and_batch_sizes_must_be_numbers(self) -> SglangOptions:
        fraction, sizes = self.server_args.get("mem_fraction_static"), self.cuda_graph_bs
        if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction < 1):
            raise OptionError(
                "--sglang-mem-fraction-static", fraction, "it must be a fraction of the memory.", "Use 0.7, say."
            )
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise OptionError(
                "--sglang-cuda-graph-bs", list(sizes), "batch sizes are whole numbers from 1.", "Use 1 2 4 8, say."
            )
        return self

    @property
    def mem_fraction_static(self) -> float | None:
        """Most of the GPU memory that is free beside the model which the KV cache may take, as a fraction."""
        value = self.server_args.get("mem_fraction_static")
        return None if value is None else float(value)

    @property
    def cuda_graph_bs(self) -> tuple[int, ...]:
        """Batch sizes to capture as CUDA graphs; empty when not given."""
        value = self.server_args.get("cuda_graph_bs", ())
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    @property
    def unused_by_the_embedded_engine(self) -> tuple[str, ...]:
        """Flags that only SGLang itself would obey."""
        servers = [f"--sglang-{name}" for name in self.server_args if name != "mem_fraction_static"]
        return tuple(flag.replace("_", "-") for flag in (*servers, *(f"--router-{name}" for name in self.router_args)))


class WeightSyncOptions(OptionGroup):
    """How new weights reach an engine. The embedded engine samples on the trainer's parameters: nothing to send."""

    update_weight_mode: Literal["full", "delta"] = "full"
    """Send all weights, or what changed. Not used by the embedded engine."""
    update_weight_transport: Literal["nccl", "disk"] = "nccl"
    """How weights travel. Not used by the embedded engine."""
    update_weights_interval: Count = 1
    """Rollouts between updates of the engine's weights. The embedded engine always sees the newest."""
    check_weight_update_equal: bool = False
    """Verify the engine's weights after an update. For the embedded engine equality holds by construction."""
