"""Two GPUs of one machine: what they train together in every layout, and how fast weights reach a sampler.

    python benchmarks/two_gpus.py OUTPUT.json [weights] [4b] [30b-a3b] [--rehearse]

Training is steps of 65,536 tokens in documents of 4,096, micro-batches of up to 16,384 tokens a GPU, nothing
recomputed, AdamW with fp32 moments on the GPU, random weights; one GPU alone is measured in the same run. NCCL's time
is from one more step under the profiler: all of it, and what no computing kernel hides.

Weights are a set of the size and shapes of Qwen3-30B-A3B. They go from the first GPU to the second as `--rollout-engine
sglang` sends them, by HTTP and NCCL, to a stand-in for a server that copies them into a model of its own; then by CUDA
IPC to a process on the same GPU. The link's rate is that of a broadcast of 1 GiB. Of every update there are also the
seconds of the trainer's thread and of the stand-in's by what they do; GPUs work at the same time, so where these are a
small part the GPUs set the pace. `--rehearse` does all of it with tiny models on CPUs over gloo, as many tensors in as
many buckets, and measures only what Python takes.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import os
import pickle
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.profiler import ProfilerActivity, profile

from lockstep.algorithms import make_policy_loss
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.models import LanguageModel, ModelConfig, build_model, read_model_config
from lockstep.models.hf_names import hf_tensors
from lockstep.parallel.mesh import Layout, Meshes
from lockstep.parallel.shard import shard_model
from lockstep.rollout.sglang.api import ServerApi
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer
from lockstep.trainer.parallel import ParallelTrainer
from lockstep.weight_sync import BroadcastTransport, TensorTransport, Transport, WeightSource
from lockstep.weight_sync.source import Bucket, BucketPlan, Posts

DOCUMENT, TOKENS_PER_GPU, STEP = 4096, 16384, 65536
COMMON: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "num_attention_heads": 32}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "4b": COMMON | {
        "model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 12, "num_key_value_heads": 8,
        "intermediate_size": 9728,
    },
    "30b-a3b": COMMON | {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 6, "num_key_value_heads": 4,
        "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}  # fmt: skip
LAYOUTS: dict[str, list[dict[str, int]]] = {
    "4b": [{}, {"tp_size": 2}, {"cp_size": 2}, {"pp_size": 2, "decoder_last_pipeline_num_layers": 4}],
    "30b-a3b": [
        {}, {"ep_size": 2}, {"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"cp_size": 2, "ep_size": 2},
        {"pp_size": 2, "decoder_last_pipeline_num_layers": 1},
    ],
}  # fmt: skip
"""With so few layers the vocabulary is half of the work: a last stage has fewer of them."""
FULL_DEPTH = 48
BUCKETS_MIB = [512, 1024, 2048, 4096]
REHEARSED_SHARE = 1600
"""A rehearsal's weights are so much smaller, and its buckets too."""
TIMED_STEPS, TIMED_COPIES, TIMED_UPDATES = 2, 3, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("parts", nargs="*", default=["weights", *GEOMETRIES], help="weights, 4b, 30b-a3b")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    arguments = (store.port, options.output, options.parts, options.rehearse)
    start_processes(run_rank, args=arguments, nprocs=2, start_method="spawn")


class Bench:
    """One of the two processes, and the results so far, which the first one keeps on disk."""

    def __init__(self, rank: int, store: dist.Store, output: Path, *, rehearses: bool) -> None:
        self.rank, self.store, self.output, self.rehearses = rank, store, output, rehearses
        self._meetings = 0
        self.device = torch.device("cpu") if rehearses else torch.device("cuda", rank)
        self.result: dict[str, Any] = {"torch": torch.__version__}
        if not rehearses:
            torch.cuda.set_device(self.device)
            self.result |= {"device": torch.cuda.get_device_name(), "nccl": list(torch.cuda.nccl.version())}

    def note(self, name: str, value: Any) -> None:
        if self.rank == 0:
            self.result[name] = value
            print(name, json.dumps(value), flush=True)
            self.output.write_text(json.dumps(self.result, indent=2) + "\n")

    def config(self, name: str, layers: int | None = None) -> ModelConfig:
        shape = GEOMETRIES[name] | ({"num_hidden_layers": layers} if layers else {})
        if self.rehearses:
            tiny = {"vocab_size": 128, "hidden_size": 64, "head_dim": 8}
            if "a3b" in name:
                tiny |= {"intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 128 if layers else 16}
            shape |= tiny | {"num_hidden_layers": layers or min(shape["num_hidden_layers"], 8)}
        return read_model_config(shape)

    def bucket_bytes(self, mib: int) -> int:
        return mib * 2**20 // (REHEARSED_SHARE if self.rehearses else 1)

    def empty_model(self, config: ModelConfig, device: torch.device) -> LanguageModel:
        with torch.device("meta"):
            model = build_model(config).to(torch.bfloat16)
        return model.to_empty(device=device)

    def synchronize(self) -> None:
        if not self.rehearses:
            torch.cuda.synchronize()

    def meet(self, value: Any = None) -> list[Any]:
        """Both processes' values, when both are here and their GPUs are idle."""
        self.synchronize()
        self._meetings += 1
        self.store.set(f"{self._meetings} {self.rank}", pickle.dumps(value))
        return [pickle.loads(self.store.get(f"{self._meetings} {rank}")) for rank in range(2)]

    def seconds(self, work: Callable[[], Any]) -> float:
        self.meet()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def reset_peak_bytes(self) -> int:
        """Bytes in use now; `peak_bytes` is of the time since."""
        if self.rehearses:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        return 0 if self.rehearses else torch.cuda.max_memory_allocated()

    def free(self) -> None:
        gc.collect()
        if not self.rehearses:
            torch.cuda.empty_cache()


def run_rank(rank: int, port: int, output: Path, parts: list[str], rehearses: bool) -> None:
    torch.set_num_threads(1 if rehearses else 8)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False)
    bench = Bench(rank, store, output, rehearses=rehearses)
    if "weights" in parts:
        measure_weights(bench)
    backend = "gloo" if rehearses else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("training", store), rank=rank, world_size=2)
    for name in GEOMETRIES:
        if name in parts:
            measure_training(bench, name)
    bench.meet()
    os._exit(0)  # taking process groups down aborts now and then, in their own threads


def join(backend: str, store: dist.Store, name: str, rank: int, world_size: int) -> Any:
    """A process group as SGLang's servers make it, beside torch's own."""
    internals: Any = c10d
    group, _ = internals._new_process_group_helper(
        world_size, rank, [], internals.Backend(backend), internals.PrefixStore(name, store), group_name=name,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    internals._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def measure_training(bench: Bench, name: str) -> None:
    config = bench.config(name)
    samples = random_samples(config.vocab_size, DOCUMENT if not bench.rehearses else 32)
    options = trainer_options(TOKENS_PER_GPU if not bench.rehearses else 128)
    model = filled(bench.empty_model(config, bench.device))
    alone = measure(bench, LocalTrainer(model, **options), samples)
    del model
    bench.free()
    bench.note(f"{name} one GPU", alone | {"billion_parameters": num_parameters(config) / 1e9})
    for sizes in LAYOUTS[name]:
        meshes = Meshes(Layout(world_size=2, **sizes), bench.device.type)
        meshes.layout.check(config)
        with torch.device("meta"):
            divided = build_model(config).to(torch.bfloat16)
        shard_model(divided, meshes, reduce_dtype=torch.float32)
        divided.to_empty(device=bench.device)
        trainer = ParallelTrainer(filled(divided), meshes, device=bench.device, **options)
        found = measure(bench, trainer, samples)
        bench.note(f"{name} {meshes.layout}", found | {"speed_up": alone["step_s"] / found["step_s"]})
        del divided, trainer
        bench.free()


def measure(bench: Bench, trainer: LocalTrainer | ParallelTrainer, samples: list[TrainSample]) -> dict[str, Any]:
    """One step to warm up, some timed ones, and one under the profiler."""
    config = trainer.model.config
    if not bench.rehearses:
        torch.cuda.reset_peak_memory_stats()
    warm_up_s = bench.seconds(lambda: trainer.step(samples))
    steps_s = [bench.seconds(lambda: trainer.step(samples)) for _ in range(TIMED_STEPS)]
    step_s = max(bench.meet(median(steps_s)))
    found = {
        "step_s": step_s,
        "tokens_per_s": STEP / step_s,
        "model_tflops_per_gpu": flops_per_token(config) * STEP / step_s / 1e12 / trainer_size(trainer),
        "peak_gib": 0.0 if bench.rehearses else torch.cuda.max_memory_allocated() / 2**30,
        "warm_up_s": warm_up_s,
    }
    bench.meet()
    activities = [ProfilerActivity.CPU if bench.rehearses else ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        profiled_s = bench.seconds(lambda: trainer.step(samples))
    return found | {"profiled_s": profiled_s} | nccl_shares(profiler, profiled_s)


def nccl_shares(profiler: Any, step_s: float) -> dict[str, float]:
    """Of a step: in NCCL's kernels, in those while nothing else computes, and in computing kernels."""
    spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and "Mem" not in event.name():
            spans["nccl" in event.name().lower()].append((event.start_ns(), event.end_ns()))
    nccl_s, compute_s, both_s = (
        covered(found) / 1e9 for found in (spans[True], spans[False], spans[True] + spans[False])
    )
    return {
        "nccl_share": nccl_s / step_s,
        "nccl_not_hidden_share": (both_s - compute_s) / step_s,
        "compute_share": compute_s / step_s,
    }


def covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union."""
    total, reached = 0, 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def trainer_size(trainer: LocalTrainer | ParallelTrainer) -> int:
    return trainer.meshes.layout.world_size if isinstance(trainer, ParallelTrainer) else 1


def trainer_options(max_tokens: int) -> dict[str, Any]:
    return {
        "reference": None, "loss": make_policy_loss(), "temperature": 1.0, "needs_entropy": False, "routing": "own",
        "num_steps": 100, "optimizer": OptimizerOptions(lr=1e-6, lr_decay_style="constant"),
        "batching": BatchingOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=max_tokens),
    }  # fmt: skip


def filled(model: LanguageModel) -> LanguageModel:
    """Random weights, alike in every part of a divided tensor: only its shape matters here."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            local: Any = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.normal_(std=0.02) if parameter.dim() > 1 else local.fill_(1.0)
    return model


def random_samples(vocab: int, length: int) -> list[TrainSample]:
    draw = torch.Generator().manual_seed(0)
    count, response = STEP // DOCUMENT, length - length // 16
    return [
        TrainSample(
            tokens=torch.randint(0, vocab, (length,), generator=draw).tolist(),
            response_length=response,
            loss_mask=[1] * response,
            loss_weight=1.0 / (response * count),
            advantage=float(torch.randn((), generator=draw)),
        )
        for _ in range(count)
    ]


def flops_per_token(c: ModelConfig) -> float:
    """Forward and backward: matrix products, and causal attention over documents."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    scores = DOCUMENT * c.num_attention_heads * c.head_dim
    feed_forward = 3 * c.hidden_size * (c.num_experts_per_tok * c.moe_intermediate_size or c.intermediate_size)
    layer = attention + scores + feed_forward + c.hidden_size * c.num_experts
    return 6.0 * (c.num_hidden_layers * layer + c.vocab_size * c.hidden_size)


def num_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


def measure_weights(bench: Bench) -> None:
    config = bench.config("30b-a3b", FULL_DEPTH)
    model = bench.empty_model(config, bench.device)
    if bench.rank == 0:
        filled(model)
    num_bytes = sum(p.nbytes for p in model.parameters())
    group = join("gloo" if bench.rehearses else "nccl", bench.store, "link", bench.rank, 2)
    link = link_rate(bench, group)
    bench.note("weights", {"bytes": num_bytes, "tensors": len(hf_views(model)), "link_gb_per_s": link / 1e9})

    def rates(seconds: list[float]) -> dict[str, Any]:
        rate = num_bytes / median(seconds)
        return {"seconds": seconds, "gb_per_s": rate / 1e9, "of_link": rate / link}

    naive = [bench.seconds(lambda: broadcast_one_by_one(group, model)) for _ in range(TIMED_COPIES)]
    bench.note("weights, tensor by tensor, no requests", rates(naive[1:]))
    for mib in BUCKETS_MIB:
        plan = BucketPlan(bench.bucket_bytes(mib))
        flat = [bench.seconds(lambda plan=plan: broadcast_flat(bench, group, model, plan)) for _ in range(TIMED_COPIES)]
        bench.note(f"weights, buckets of {mib} MiB, no requests", rates(flat[1:]))
    server = StandIn(model, bench.device) if bench.rank == 1 else None
    url = bench.meet(server.url if server else None)[1]
    for mib in BUCKETS_MIB:
        broadcast = BroadcastTransport(
            backend="gloo" if bench.rehearses else "nccl", bucket_bytes=bench.bucket_bytes(mib), tp_size=1,
            host="127.0.0.1", timeout_s=60.0,
        )  # fmt: skip
        first_s, *seconds, split = send_updates(bench, broadcast, server, url, model)
        bench.note(f"weights, buckets of {mib} MiB, a whole update", rates(seconds) | {"first_s": first_s} | split)
    per_tensor = BroadcastTransport(
        backend="gloo" if bench.rehearses else "nccl", bucket_bytes=1, tp_size=1, host="127.0.0.1", timeout_s=60.0
    )
    one_layer = bench.config("30b-a3b", 1)
    small = filled(bench.empty_model(one_layer, bench.device)) if bench.rank == 0 else model
    _, *seconds, split = send_updates(bench, per_tensor, server, url, small, checks=False)
    ms_per_tensor = 1e3 * median(seconds) / len(hf_views(small))
    bench.note("weights, a request for every tensor", {"ms_per_tensor": ms_per_tensor} | split)
    if server:
        server.close()
        model = None
    server = None
    bench.free()
    measure_ipc(bench, config, model, rates)


def measure_ipc(bench: Bench, config: ModelConfig, model: LanguageModel, rates: Callable[..., dict[str, Any]]) -> None:
    """Both processes use the first GPU."""
    server = None
    if bench.rank == 1:
        if not bench.rehearses:
            torch.cuda.set_device(0)
        first = bench.device if bench.rehearses else torch.device("cuda", 0)
        model = bench.empty_model(config, first)
        server = StandIn(model, first)
    url = bench.meet(server.url if server else None)[1]
    for mib in BUCKETS_MIB:
        shared = TensorTransport(bucket_bytes=bench.bucket_bytes(mib), tp_size=1, timeout_s=60.0)
        first_s, *seconds, split = send_updates(bench, shared, server, url, model)
        bench.note(f"weights by IPC, buckets of {mib} MiB", rates(seconds) | {"first_s": first_s} | split)
    if server:
        server.close()
        if not bench.rehearses:
            torch.cuda.set_device(bench.device)


def link_rate(bench: Bench, group: Any) -> float:
    """Bytes per second of a broadcast of 1 GiB."""
    block = torch.zeros(2**30 if not bench.rehearses else 2**20, dtype=torch.uint8, device=bench.device)
    return block.nbytes / median([bench.seconds(lambda: group.broadcast(block, 0).wait()) for _ in range(9)][2:])


def hf_views(model: LanguageModel) -> dict[str, Tensor]:
    return {
        tensor.name: parameter.detach()[tensor.index]
        for name, parameter in model.named_parameters()
        for tensor in hf_tensors(name, parameter.shape)
    }


def broadcast_one_by_one(group: Any, model: LanguageModel) -> None:
    for view in hf_views(model).values():
        group.broadcast(view, 0).wait()


def broadcast_flat(bench: Bench, group: Any, model: LanguageModel, plan: BucketPlan) -> None:
    """As `BroadcastTransport` sends, without telling anybody."""
    buckets = plan.of(model)
    flat = buckets[0].flattened() if bench.rank == 0 else None
    for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
        if flat is not None:
            work = group.broadcast(flat, 0)
            flat = flat if following is None else following.flattened()
            work.wait()
        else:
            arrived = torch.empty(bucket.ends[-1], dtype=torch.uint8, device=bench.device)
            group.broadcast(arrived, 0).wait()
            parts = [p.detach().view(-1)[first:end].view(torch.uint8) for p, first, end in bucket.stretches]
            torch._foreach_copy_(parts, list(arrived.split([len(part) for part in parts])))


def send_updates(
    bench: Bench, transport: Transport, server: StandIn | None, url: str, model: LanguageModel, *, checks: bool = True
) -> list[Any]:
    """Seconds of updates as the trainer sees them; the first one makes connections and plans. At the end what they went
    to, on both sides. With a digest: the stand-in's weights are the trainer's."""
    if checks and bench.rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    source = WeightSource(export=lambda folder: None, model=lambda: nullcontext(model))
    seconds = []
    clock = Clock() if server is None else server.clock
    before = bench.reset_peak_bytes()
    with clock.around_updates():
        for number in range(1 + TIMED_UPDATES):
            bench.meet()
            if number == 1:
                clock.seconds.clear()
                bench.meet()
            if bench.rank == 0:
                started = time.perf_counter()
                transport.send([ServerApi(url)], source, str(number))
                with clock.adding("synchronizing"):
                    bench.synchronize()
                seconds.append(time.perf_counter() - started)
    bench.meet()
    if bench.rank == 0:
        transport.close([ServerApi(url)])
    extra_gib = (bench.peak_bytes() - before) / 2**30
    trainer_s, server_s = bench.meet({name: total / TIMED_UPDATES for name, total in clock.seconds.items()})
    if checks:
        ours, theirs = bench.meet(
            [int(p.detach().view(torch.int16).sum(dtype=torch.int64)) for p in model.parameters()]
        )
        assert ours == theirs, "the weights did not arrive"
        assert any(ours), "there was nothing to send"
    seconds, extra_gib = bench.meet((seconds, extra_gib))[0]
    trainer_s["broadcasting and the rest"] = sum(seconds[1:]) / TIMED_UPDATES - sum(trainer_s.values())
    return [*seconds, {"trainer_s": trainer_s, "server_s": server_s, "extra_gib": extra_gib}]


class Clock:
    """Seconds by what they went to."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def adding(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    @contextmanager
    def around_updates(self) -> Iterator[None]:
        """Where the thread is that sends an update."""
        flattened, call = Bucket.flattened, Posts.__call__

        def timed_flattened(bucket: Bucket) -> Tensor:
            with self.adding("gathering"):
                return flattened(bucket)

        def timed_call(post: Posts, path: str, bodies: Sequence[dict[str, Any] | bytes]) -> Callable[[], None]:
            with self.adding("posting"):
                finish = call(post, path, bodies)

            def timed_finish() -> None:
                with self.adding("waiting for answers"):
                    finish()

            return timed_finish

        with patch.object(Bucket, "flattened", timed_flattened), patch.object(Posts, "__call__", timed_call):
            yield


class StandIn:
    """Takes weights as SGLang's server does, and copies them into a model.

    As SGLang does, it answers when its GPU has been told what to do. Only the answer to the last bucket comes when all
    weights are there, so that an update is not over before.
    """

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        gc.collect()
        gc.freeze()  # to look through all that torch is made of takes longer than an update
        self.views, self.device = hf_views(model), device
        self.group: Any = None
        self.clock = Clock()
        self._known: dict[tuple[str, int], list[Tensor]] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet for all of an answer

            def log_message(self, *words: Any) -> None: ...

            def do_POST(self) -> None:
                with server.clock.adding("reading"):
                    body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if server.device.type == "cuda":
                    torch.cuda.set_device(server.device)
                getattr(server, self.path.strip("/"))(body)
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        gc.unfreeze()
        self.views = {}
        self._known = {}

    def init_weights_update_group(self, body: dict[str, Any]) -> None:
        timeout = timedelta(seconds=60)
        store = dist.TCPStore(body["master_address"], body["master_port"], None, is_master=False, timeout=timeout)
        place = body["rank_offset"], body["world_size"]
        self.group = join(body["backend"], store, body["group_name"], *place)

    def destroy_weights_update_group(self, body: dict[str, Any]) -> None:
        self.group = None

    def update_weights_from_distributed(self, body: dict[str, Any]) -> None:
        with self.clock.adding("receiving"):
            targets = self._targets(body["names"])
            flat = torch.empty(sum(map(len, targets)), dtype=torch.uint8, device=self.device)
            self.group.broadcast(flat, 0).wait()
        self._place(targets, flat)
        if "weight_version" in body:
            self._synchronize()

    def update_weights_from_tensor(self, body: dict[str, Any]) -> None:
        (text,) = body["serialized_named_tensors"]
        with self.clock.adding("opening"):
            sent = pickle.loads(base64.b64decode(text))
        self._place(self._targets([part.name for part in sent["metadata"]]), sent["flattened_tensor"])
        self._synchronize()  # torch does it when a server drops memory of another process

    def _targets(self, names: list[str]) -> list[Tensor]:
        """The bytes that a bucket goes to. Looked up once: how long a server takes to place weights is its own."""
        key = names[0], len(names)
        if key not in self._known:
            self._known[key] = [self.views[name].view(-1).view(torch.uint8) for name in names]
        return self._known[key]

    def _place(self, targets: list[Tensor], flat: Tensor) -> None:
        with self.clock.adding("placing"):
            torch._foreach_copy_(targets, list(flat.split([len(target) for target in targets])))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            with self.clock.adding("synchronizing"):
                torch.cuda.synchronize(self.device)


if __name__ == "__main__":
    main()
