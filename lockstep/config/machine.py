"""Where the run happens: devices, parallel layout, SGLang servers and how weights reach them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lockstep.config.base import Count, Index, OptionGroup, Positive
from lockstep.errors import OptionError


class ClusterOptions(OptionGroup):
    """Machines and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto takes the GPU when there is one."""
    num_threads: Count | None = None
    """CPU threads of PyTorch's operations in each process. Default: PyTorch's choice, divided by the processes. Results
    on CPU repeat for the same number."""
    actor_num_nodes: Count = 1
    """Machines that train. Above 1, Ray starts the processes (docs/multi-node.md)."""
    actor_num_gpus_per_node: Count = 1
    """GPUs that train on each machine, each with a process of its own; without GPUs as many processes. slime's default
    is 8."""
    distributed_timeout_minutes: Count = 30
    """Minutes that processes wait for each other, and for a sign of life, before the run ends. slime's default: 10."""
    rollout_num_gpus: Index | None = None
    """GPUs that sample and do nothing else, after those that train: of SGLang's servers, or one for each copy of the
    model (embedded engine). Default: sampling shares training's."""
    offload_rollout: bool = True
    """SGLang servers that share training's GPUs release their memory while they have nothing to do. slime's default is
    on with --colocate."""
    rollout_num_gpus_per_engine: Count = 1
    """GPUs of one SGLang server, which divide its model (its tp-size)."""
    ray_address: str | None = None
    """Ray cluster that starts the processes: host:port, auto (the one that this machine belongs to) or local (a new one
    for this run alone). Default: no Ray on one machine; on several, RAY_ADDRESS, else auto."""
    colocate: bool = True
    """Rollout and training share GPUs: here they even share the weights. slime's default is off."""

    @property
    def num_ranks(self) -> int:
        """Processes that train, on all machines."""
        return self.actor_num_nodes * self.actor_num_gpus_per_node

    @property
    def uses_ray(self) -> bool:
        return self.actor_num_nodes > 1 or self.ray_address is not None

    def has_replicas(self, rollout_engine: str) -> bool:
        """Whether processes with a copy of the weights sample."""
        return rollout_engine == "embedded" and bool(self.rollout_num_gpus)


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
    """Ranks that share the work of each expert, by its width. Experts' memory is divided over all ranks in any case."""
    sequence_parallel: bool = False
    """Divide activations over the tensor-parallel ranks; always on where those are more than one."""
    grad_reduce_in_bf16: bool = False
    """Sum gradients over ranks in bf16, not in fp32: half the traffic, and a rounding for every rank."""


_READ_BY_THE_EMBEDDED_ENGINE = ("mem_fraction_static", "chunked_prefill_size", "cuda_graph_bs", "disable_cuda_graph")


class SglangOptions(OptionGroup):
    """SGLang's servers, and their arguments: every `--sglang-NAME` and `--router-NAME`, without the prefix."""

    sglang_router_ip: str = "127.0.0.1"
    """Address of this machine on which sglang_router_port is opened. Whoever can reach it can use the policy."""
    sglang_router_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of an endpoint for the policy in training, OpenAI's protocol and SGLang's /generate (docs/serve.md); 0 for
    a free one. Default: none is opened."""
    sglang_python: str | None = None
    """Python of the environment that SGLang is installed in; servers are started with it."""
    rollout_external_engine_addrs: tuple[str, ...] = ()
    """Addresses (host:port) of servers that somebody else has started, in place of our own."""
    rollout_request_timeout: Positive = 3600.0
    """Seconds after which a server that has not answered a request counts as lost."""
    rollout_server_start_timeout: Positive = 1800.0
    """Seconds that a server gets to start, or to come back."""
    rollout_health_check_interval: Positive = 30.0
    """Seconds without an answer after which a server is asked whether it works."""
    rollout_health_check_timeout: Positive = 30.0
    """Seconds that a server gets to say that it works, before it is started again."""

    server_args: dict[str, Any] = Field(default_factory=dict)
    """`--sglang-NAME value` for SGLang's servers. The embedded engine reads mem_fraction_static, chunked_prefill_size,
    cuda_graph_bs and disable_cuda_graph."""
    router_args: dict[str, Any] = Field(default_factory=dict)
    """`--router-NAME value` for SGLang's router."""

    @model_validator(mode="after")
    def _memory_and_batch_sizes_must_be_numbers(self) -> SglangOptions:
        fraction, sizes = self.server_args.get("mem_fraction_static"), self.cuda_graph_bs
        if fraction is not None and not (isinstance(fraction, int | float) and 0 < fraction < 1):
            raise OptionError(
                "--sglang-mem-fraction-static", fraction, "it must be a fraction of the memory.", "Use 0.7, say."
            )
        chunk = self.server_args.get("chunked_prefill_size", -1)
        if not isinstance(chunk, int) or (chunk < 1 and chunk != -1):
            raise OptionError(
                "--sglang-chunked-prefill-size",
                chunk,
                "it must be a number of tokens, or -1 for prompts in one piece.",
                "Use 8192, say.",
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
    def chunked_prefill_size(self) -> int | None:
        """Most tokens of prompts in one pass of the embedded engine; -1 for prompts in one piece, None by default."""
        value = self.server_args.get("chunked_prefill_size")
        return None if value is None else int(value)

    @property
    def cuda_graph_bs(self) -> tuple[int, ...]:
        """Batch sizes to capture as CUDA graphs; empty when not given."""
        value = self.server_args.get("cuda_graph_bs", ())
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    @property
    def graph_sizes(self) -> tuple[int, ...] | None:
        """What the embedded engine captures: these batch sizes, its own choice (empty), or nothing (None)."""
        return None if self.server_args.get("disable_cuda_graph") else self.cuda_graph_bs

    @property
    def unused_by_the_embedded_engine(self) -> tuple[str, ...]:
        """Flags that only SGLang itself would obey."""
        servers = [f"--sglang-{name}" for name in self.server_args if name not in _READ_BY_THE_EMBEDDED_ENGINE]
        return tuple(flag.replace("_", "-") for flag in (*servers, *(f"--router-{name}" for name in self.router_args)))


class WeightSyncOptions(OptionGroup):
    """How new weights reach SGLang's servers. The embedded engine samples on the trainer's parameters."""

    update_weight_mode: Literal["full"] = "full"
    """Send all weights."""
    update_weight_transport: Literal["nccl", "tensor", "disk"] | None = None
    """How weights travel: broadcast (nccl, between CPUs gloo), shared memory of this machine (tensor) or a folder.
    Default: tensor to servers that share training's devices, nccl to others. slime's default is nccl."""
    update_weight_disk_dir: str | None = None
    """Folder for weights on their way to servers, which must be able to read it. Default: a folder in run_dir."""
    update_weight_buffer_size: Count | None = None
    """Bytes of weights that are sent at a time; two such buffers are in memory. Default: 2 GiB by tensor on GPUs, else
    512 MiB, which were fastest on H200s. slime's default is 512 MiB."""
    update_weights_interval: Count = 1
    """Rollouts between updates of the engine's weights. Every rollout samples with the newest."""
    pause_generation_mode: Literal["finish", "abort", "retract"] = "retract"
    """What becomes of requests that SGLang's servers are at when new weights come: finish them first, hand them back
    with what they have, or go on under the new weights. abort and retract are SGLang's names."""
    check_weight_update_equal: bool = False
    """Compare the servers' weights with an export, bit for bit, after every update. For the embedded engine equality
    holds by construction."""
