"""How many bytes every phase of a run takes, on the GPU and in host memory, from the options and config.json alone.

Sizes come from the functions that allocate, called with shapes (`place_state`, `piece_bytes`, `bytes_per_token`,
`default_chunk_rows`), and from `lockstep.models.activations`. A phase is as large as its largest moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch

from lockstep.cluster.parts import kv_tokens, layout_of, running_requests
from lockstep.config import Config, OptimizerOptions
from lockstep.kernels.linear_log_probs import FUSED_CHUNK_BYTES, MIN_CHUNK_ROWS, default_chunk_rows, even_chunk_rows
from lockstep.models import ModelConfig
from lockstep.models.activations import Kernels, Pack, attention_results, block_memory, logits_memory
from lockstep.parallel.mesh import Layout
from lockstep.plan.batches import Batches
from lockstep.plan.hardware import GIB, Hardware
from lockstep.plan.shares import largest_stage, num_dense
from lockstep.rollout.embedded.caches import bytes_of_states, bytes_per_token
from lockstep.trainer.optimizer.host_memory import RESERVE
from lockstep.trainer.optimizer.placement import place_state
from lockstep.trainer.optimizer.streaming import num_buffers, piece_bytes

CONTEXT = GIB // 2
"""Bytes that CUDA and its libraries take on a GPU before the first tensor. An estimate."""

ALLOCATOR_SHARE = 0.031
"""What torch's allocator holds above the tensors' peak: 134.6 GiB for 130.55 in steps of Qwen3-30B-A3B."""

PROCESS = {"cpu": int(0.42 * GIB), "cuda": int(1.9 * GIB)}
"""Host memory of Python, torch, a tokenizer and a step's samples, measured: a tiny model on a CPU, with torch 2.13; on
a GPU what 13.9 GiB leave beside the pinned state in a run of 1.3 billion parameters."""

LOADED_PROCESS = {"cpu": int(0.37 * GIB), "cuda": int(0.9 * GIB)}
"""The same when the model is loaded and nothing has been computed."""

TENSORS_IN_FLIGHT = 4
"""Of a save from a GPU, beside the state in host memory: one that is written, its bytes on their way to the file, and
the next ones as they come. 3.1 GiB were measured where the largest has 0.75."""

REWARD_WORKER = int(0.08 * GIB)
"""Measured with a reward of ours. They start with the first rollout."""

FILE = 5 * 10**9
"""Largest file of weights in HF's folders: its pages are in memory while it is read."""

_KV_SHARE = 0.8
"""Of what training leaves, for the KV cache that no option sizes; the rest covers errors of the prediction."""

GRAPHS = GIB // 8
"""Of the graphs of decoding beside their logits: measured peaks of a run leave about 0.1 GiB for them."""

_FEWEST_SAMPLES = 8
"""Of full length, that such a KV cache has room for at least. Fewer would decode very slowly."""

_PINNED = "optimizer state, pinned"
RESERVED, CUDA = "allocator's reserve", "CUDA"

Items = dict[str, int]
"""Bytes by name."""

Moment = tuple[str, Items]


@dataclass(frozen=True)
class Phase:
    """The largest moment of one phase, item by item."""

    name: str
    moment: str
    gpu: Items
    host: Items

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def tensor_bytes(self) -> int:
        """What torch has allocated for tensors on the GPU."""
        return sum(size for name, size in self.gpu.items() if name not in (RESERVED, CUDA))


@dataclass(frozen=True)
class Prediction:
    """All phases of a run on some hardware. GPU bytes are those of the fullest GPU, host bytes of one machine."""

    hardware: Hardware
    num_gpus: int
    """That each machine uses; 0 is a run in host memory."""
    phases: tuple[Phase, ...]
    batches: Batches
    kv_tokens: int
    num_parameters: int

    @property
    def gpu_peak(self) -> int:
        return max(phase.gpu_bytes for phase in self.phases)

    @property
    def host_peak(self) -> int:
        return max(phase.host_bytes for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.missing_gpu_bytes == 0 and self.missing_host_bytes == 0

    @property
    def missing_gpu_bytes(self) -> int:
        return max(0, self.gpu_peak - self.hardware.gpu_bytes) if self.num_gpus else 0

    @property
    def missing_host_bytes(self) -> int:
        return max(0, self.host_peak - self.host_limit)

    @property
    def host_limit(self) -> int:
        """Pinned memory is taken only where it leaves a reserve."""
        is_pinned = any(_PINNED in phase.host for phase in self.phases)
        return self.hardware.host_bytes - (RESERVE if is_pinned else 0)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def predict(
    config: Config, model: ModelConfig, hardware: Hardware, *, kernels: Kernels | None = None, samples: bool = True
) -> Prediction:
    """What a run with these options takes.

    Args:
        kernels: which the GPU has; by default Triton's for bf16.
        samples: whether the run has a sampler of its own.
    """
    return _Predictor(config, model, hardware, kernels, samples).prediction()


@dataclass(frozen=True)
class _State:
    """Bytes of one rank's optimizer state."""

    on_device: int
    on_host: int
    buffer: int
    """One of those through which the state on the host is streamed."""
    largest: int
    """Its largest tensor."""


@cache
def _optimizer_state(model: ModelConfig, layout: Layout, dtype: torch.dtype, options: OptimizerOptions) -> _State:
    parameters = largest_stage(model, layout, dtype).parameters
    placement = place_state(parameters, options)
    pieces = [piece_bytes(placement.layouts[name], parameters[name].numel()) for name in placement.on_host]
    tensors = (entry for layout in placement.layouts.values() for entry in layout.values())
    largest = max(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)
    return _State(placement.device_bytes, placement.host_bytes, max(pieces, default=0), largest)


class _Predictor:
    def __init__(
        self, config: Config, model: ModelConfig, hardware: Hardware, kernels: Kernels | None, samples: bool
    ) -> None:
        self.config, self.model, self.hardware, self.samples = config, model, hardware, samples
        self.on_gpu = hardware.num_gpus > 0 and config.cluster.device != "cpu"
        self.layout = layout_of(config)
        self.layout.check(model)
        self.num_ranks = self.layout.world_size
        self.ranks_here = config.cluster.actor_num_gpus_per_node
        """Ranks that share a machine's memory."""
        self.dtype: torch.dtype = getattr(torch, config.model.params_dtype)
        self.element = self.dtype.itemsize
        if kernels is None:
            kernels = "cpu" if not self.on_gpu else "fused" if self.dtype == torch.bfloat16 else "plain"
        self.kernels = kernels
        self.stage = largest_stage(model, self.layout, self.dtype)
        self.stored = self.stage.stored
        self.whole = largest_stage(model, Layout(world_size=1), self.dtype).stored
        self.batches = Batches.of(config, model, dp_size=self.layout.dp_size)
        self.options = config.optimizer
        self.state = _optimizer_state(model, self.layout, self.dtype, config.optimizer)
        self.by_layer = config.batching.backward_order == "layer"
        is_bf16 = self.dtype == torch.bfloat16 and self.options.main_grads_dtype == "bf16"
        self.kept_gradient = 2 if is_bf16 else 4
        """Bytes of a number of a gradient that waits for the update."""
        self.summed_gradient = 4 if self.by_layer else self.kept_gradient
        self.is_ahead = self.on_gpu and kernels == "fused"
        """Decoding is a replay of graphs, and chosen experts are kept on the host."""
        self.hands_over = samples and self.on_gpu and self.num_ranks == 1
        """The sampler's caches may take what training needs. Those of several ranks have memory while they sample only,
        too, but are planned as if they stayed."""
        self.micro_batch = self._pack(self.batches.micro_batch_tokens)

    def prediction(self) -> Prediction:
        return Prediction(
            hardware=self.hardware,
            num_gpus=self.num_ranks if self.on_gpu else 0,
            phases=tuple(self._phases(self.kv_tokens)),
            batches=self.batches,
            kv_tokens=self.kv_tokens,
            num_parameters=self.whole.total,
        )

    # Phases

    def _phases(self, kv_tokens: int) -> Iterator[Phase]:
        always = self._resident(kv_tokens)
        caches = self._caches(kv_tokens) if self.hands_over else {}
        routes = self._host_routes(kv_tokens)
        # A file's pages are given back before the optimizer's state is made.
        file = min(FILE, self.whole.total * self.element) - self._host.get(_PINNED, 0)
        yield self._phase("load", [("at its end", caches)], always, self._loading(file) | routes)
        if self.samples:
            moments = [(moment, caches | items) for moment, items in self._rollout_moments(kv_tokens)]
            yield self._phase("rollout", moments, always, routes)
        if self._has_log_probs_pass:
            yield self._phase("log-probs", self._log_probs_moments, always, routes)
        yield self._phase("backward", self._backward_moments, always, routes)
        yield self._phase("optimizer", [("at its start", self._gradients(self.stored.total))], always, routes)
        yield self._phase("save", [("while it writes", {})], always, self._saving | routes)

    def _phase(self, name: str, moments: list[Moment], always: Items, of_host: Items | None = None) -> Phase:
        moment, items = max(moments, key=lambda moment: sum(moment[1].values()))
        device, host = _without_zeros(always | items), _without_zeros(self._host | (of_host or {}))
        if not self.on_gpu:
            return Phase(name, moment, {}, {key: self.ranks_here * size for key, size in device.items()} | host)
        reserve = int(ALLOCATOR_SHARE * sum(device.values()))
        return Phase(name, moment, device | {RESERVED: reserve, CUDA: CONTEXT}, host)

    @cached_property
    def _host(self) -> Items:
        """What every phase has in host memory beside the model."""
        pinned = self.ranks_here * self.state.on_host if self.on_gpu else 0
        return {
            "processes": self._num_processes * PROCESS["cuda" if self.on_gpu else "cpu"],
            "reward workers": self.config.reward.reward_num_workers * REWARD_WORKER,
            _PINNED: pinned,
        }

    def _loading(self, file: int) -> Items:
        """What is otherwise while the model is loaded."""
        processes = self._num_processes * LOADED_PROCESS["cuda" if self.on_gpu else "cpu"]
        return {"processes": processes, "reward workers": 0, "pages of a file of weights": file}

    @property
    def _num_processes(self) -> int:
        """Ranks, and the controller where it is none of them."""
        return self.ranks_here + (self.num_ranks > 1)

    @property
    def _saving(self) -> Items:
        tensor = self.stage.largest_tensor * self.element
        if not self.config.checkpoint.no_save_optim:
            tensor = max(tensor, self.state.largest)
        flying = TENSORS_IN_FLIGHT * self.ranks_here * tensor
        return {"tensors on their way to files": flying} if self.on_gpu else {}

    # What is there in all phases

    def _resident(self, kv_tokens: int) -> Items:
        weights = self.stored.total * self.element
        is_streamed = self.on_gpu and self.state.on_host > 0
        buffers = num_buffers(overlaps=self.options.overlap_cpu_optimizer_d2h_h2d)
        items = {
            "weights": weights,
            "reference model": weights if self.config.algorithm.use_kl_loss else 0,
            "optimizer state": self.state.on_device + (0 if self.on_gpu else self.state.on_host),
            "streaming buffers": buffers * self.state.buffer if is_streamed else 0,
        }
        if not self.samples:
            return items
        graphs = {"graphs of decoding": GRAPHS + 2 * self._running * self.model.vocab_size} if self.is_ahead else {}
        return items | graphs | ({} if self.hands_over else self._caches(kv_tokens))

    def _caches(self, kv_tokens: int) -> Items:
        most = running_requests(
            self.config,
            self.model,
            element_size=self.element,
            num_tokens=kv_tokens,
            longest=self.batches.longest_sample,
        )
        states = bytes_of_states(self.model, self.element, most) if self.model.num_delta_layers else 0
        items = {"KV cache": kv_tokens * bytes_per_token(self.model, self.element), "delta-rule states": states}
        return items | ({} if self.is_ahead else self._routes(kv_tokens))

    def _routes(self, kv_tokens: int) -> Items:
        per_token = 2 * self.model.num_sparse_layers * self.model.num_experts_per_tok
        return {"recorded routes": kv_tokens * per_token}

    def _host_routes(self, kv_tokens: int) -> Items:
        if not self.samples or not self.is_ahead:
            return {}
        return {name: self.ranks_here * size for name, size in self._routes(kv_tokens).items()}

    @cached_property
    def kv_tokens(self) -> int:
        """Of one rank's cache: the option, else what the run's own function makes of what the largest phase leaves."""
        if not self.samples:
            return 0
        phases = [phase for phase in self._phases(0) if not self.hands_over or phase.name in ("load", "rollout")]
        if self.on_gpu:
            left = self.hardware.gpu_bytes - max(phase.gpu_bytes for phase in phases)
        else:
            left = (self.hardware.host_bytes - max(phase.host_bytes for phase in phases)) // self.ranks_here
        share = self.config.sglang.mem_fraction_static or _KV_SHARE
        longest = max(self.batches.longest_sample, self._longest_evaluation)
        states = self._caches(0)["delta-rule states"]  # part of what the phases took
        num_bytes = int(max(0, left) * share) + states
        found = kv_tokens(self.config, self.model, element_size=self.element, num_bytes=num_bytes, longest=longest)
        if self.config.rollout.rollout_max_tokens is not None:
            return found
        return max(found, min(_FEWEST_SAMPLES, self.batches.samples_per_rollout) * longest)

    @property
    def _longest_evaluation(self) -> int:
        rollout, options = self.config.rollout, self.config.eval
        if not options.eval_prompt_data and options.eval_config is None:
            return 0
        limit = options.eval_max_context_len or rollout.rollout_max_context_len or self.model.max_position_embeddings
        prompt = options.eval_max_prompt_len or rollout.rollout_max_prompt_len or 0
        return min(limit, prompt + (options.eval_max_response_len or rollout.rollout_max_response_len))

    # Sampling

    @property
    def _running(self) -> int:
        return self.config.rollout.rollout_max_running_requests

    def _rollout_moments(self, kv_tokens: int) -> list[Moment]:
        longest, model = self.batches.longest_sample, self.model
        samples = -(-self.batches.samples_per_rollout // self.num_ranks)
        running = max(1, min(self._running, samples))
        context = 2 * running * longest * model.num_key_value_heads * model.head_dim * self.element
        scores = running * longest * model.num_attention_heads * (2 * 4 + self.element)
        prompts = self._pack(min(max(16384, longest), running * self._longest_prefill(running, kv_tokens)))
        gathered = {"dense weights of all ranks": num_dense(model) * self.element if self.num_ranks > 1 else 0}
        logits = {"logits": 3 * 4 * running * model.vocab_size}
        in_prefill = ("in a prefill", gathered | {"one layer": self._forward_bytes(prompts)} | logits)
        if self.is_ahead:
            return [in_prefill]
        return [
            in_prefill,
            ("in a decode", gathered | {"keys and values that a layer reads": context, "attention scores": scores}),
        ]

    def _longest_prefill(self, running: int, kv_tokens: int) -> int:
        """Tokens of a sequence that one pass may have to compute: all of them where it can be continued, by another
        turn, by a partial rollout, or after it gave way to others in a cache too small for all."""
        rollout, longest = self.config.rollout, self.batches.longest_sample
        continues = rollout.custom_generate_function_path is not None or rollout.partial_rollout
        if continues or running * longest > kv_tokens:
            return longest
        return min(longest, rollout.longest_prompt or longest)

    # Training

    @property
    def _has_log_probs_pass(self) -> bool:
        algorithm = self.config.algorithm
        return self.batches.steps_per_rollout > 1 or algorithm.use_routing_replay or algorithm.use_kl_loss

    @cached_property
    def _log_probs_moments(self) -> list[Moment]:
        pack = self._pack(self.batches.log_probs_tokens)
        everywhere = self._gathered_layers | {"hidden states": 2 * self._stream(pack.tokens)}
        return [
            ("in a layer", everywhere | {"one layer": self._forward_bytes(pack)}),
            ("at the logits", everywhere | {"logits": self._logits(pack)[0]}),
        ]

    @cached_property
    def _backward_moments(self) -> list[Moment]:
        return list(self._by_layer() if self.by_layer else self._by_micro_batch())

    def _by_layer(self) -> Iterator[Moment]:
        """Inputs of layers go as gradients of layers come; only what is being finished has fp32 gradients."""
        pack, stored, whole = self.micro_batch, self.stored, self.stage.gathered
        step = self._stream(self.batches.tokens_per_step // (self.layout.tp_size * self.layout.cp_size))
        tied = whole.embedding if self.model.tie_word_embeddings else 0
        found = self._attention_results(self._pack(self.batches.tokens_per_step))

        def finishing(numbers: int) -> Items:
            return {"gradients of what is being finished": self.summed_gradient * numbers}

        def gathered(layer: int | None = None) -> Items:
            if self.num_ranks == 1:
                return {}
            return {
                "gathered weights": (whole.outside_layers + (whole.layers[layer] if layer is not None else 0))
                * self.element
            }

        yield (
            "at the logits",
            {
                "layer inputs": (len(stored.layers) + 1) * step,
                "results of attention": sum(found),
                "hidden states": 2 * self._stream(pack.tokens),
                "logits": self._logits(pack)[1],
            }
            | gathered()
            | finishing(whole.head + tied),
        )
        done = stored.head
        for layer in reversed(self.stage.layers):
            memory = block_memory(self.model, layer, pack)
            yield (
                f"in layer {layer}",
                self._gradients(done)
                | gathered(layer)
                | finishing(whole.layers[layer] + tied)
                | {
                    "layer inputs": (layer + 1) * step,
                    "results of attention": sum(found[: layer - self.stage.layers[0]]),
                    "gradients of layer inputs": step,
                    "activations of one layer": memory.kept_bytes,
                    "backward of one layer": memory.backward,
                },
            )
            done += stored.layers[layer]
        fresh = {"backward of the embedding": whole.embedding * self.element, "gradients of layer inputs": step}
        yield "at the embedding", self._gradients(done) | gathered() | finishing(whole.embedding) | fresh

    def _by_micro_batch(self) -> Iterator[Moment]:
        """From the second micro-batch on, the sums of all gradients exist; pipeline stages have several under way."""
        pack, layers, stored = self.micro_batch, list(self.stage.layers), self.stored
        recomputes = self.config.batching.recompute_granularity is not None
        is_first_kept = self.batches.num_micro_batches > 1
        under_way = min(self.layout.pp_size, self.batches.num_micro_batches)
        stream = self._stream(pack.tokens)
        memory = [block_memory(self.model, layer, pack) for layer in layers]
        found = self._attention_results(pack)
        kept = found if recomputes else [block.kept_bytes for block in memory]
        inputs = {"layer inputs": (under_way if recomputes else under_way - 1) * len(layers) * stream}

        def moment(layers_left: int, done: int, items: Items) -> Items:
            activations = sum(kept[:layers_left]) + (under_way - 1) * sum(kept)
            gradients = self._gradients(stored.total if is_first_kept else done)
            return gradients | inputs | self._gathered_layers | {"activations of all layers": activations} | items

        at_logits = {"hidden states": 3 * stream, "logits": self._logits(pack)[1]}
        yield "at the logits", moment(len(layers), stored.head, at_logits)
        done = stored.head
        for number in reversed(range(len(layers))):
            done += stored.layers[layers[number]]
            of_one = {
                "activations of one layer": memory[number].kept_bytes - found[number] if recomputes else 0,
                "backward of one layer": memory[number].backward + stream,
            }
            yield f"in layer {layers[number]}", moment(number + 1, done, of_one)
        fresh = {"backward of the embedding": self.stage.gathered.embedding * self.element}
        yield "at the embedding", moment(0, stored.total, fresh)

    @cached_property
    def _gathered_layers(self) -> Items:
        """FSDP: the layer that is computed and the next one, whole, and what is gathered throughout."""
        if self.num_ranks == 1:
            return {}
        layer = max(self.stage.gathered.layers.values()) * self.element
        throughout = self.stage.gathered.outside_layers * self.element
        return {"gathered weights": 2 * layer + throughout, "gradients to be reduced": 2 * layer}

    # Parts

    def _pack(self, tokens: int) -> Pack:
        """A rank's share: context and tensor parallelism divide a micro-batch's activations."""
        sharers: int = self.layout.tp_size * self.layout.cp_size
        return Pack(-(-tokens // sharers), self.batches.longest_sample, self.element, self.kernels)

    def _forward_bytes(self, pack: Pack) -> int:
        return max(block_memory(self.model, layer, pack).forward for layer in self.stage.layers)

    def _attention_results(self, pack: Pack) -> list[int]:
        """What selective recomputing keeps of every layer."""
        keeps = self.config.batching.recompute_granularity == "selective" and self.layout.cp_size == 1
        return [attention_results(self.model, layer, pack) if keeps else 0 for layer in self.stage.layers]

    def _stream(self, tokens: int) -> int:
        return tokens * self.model.hidden_size * int(self.element)

    def _logits(self, pack: Pack) -> tuple[int, int]:
        """Forward and backward of the log-probs; every token counts as a prediction."""
        rows, vocabulary = pack.tokens, self.model.vocab_size
        chunk = default_chunk_rows(vocabulary, "cuda" if self.on_gpu else "cpu")
        if self.kernels == "fused":
            chunk = even_chunk_rows(rows, max(MIN_CHUNK_ROWS, FUSED_CHUNK_BYTES // (2 * vocabulary)))
        if self.config.batching.log_probs_chunk_size > 0:
            chunk = self.config.batching.log_probs_chunk_size
        forward, backward = logits_memory(self.model, rows, chunk, pack)
        return forward // self.layout.tp_size, backward // self.layout.tp_size

    def _gradients(self, numbers: int) -> Items:
        return {f"gradients in {'bf16' if self.kept_gradient == 2 else 'fp32'}": self.kept_gradient * numbers}


def _without_zeros(items: Items) -> Items:
    return {name: size for name, size in items.items() if size > 0}
