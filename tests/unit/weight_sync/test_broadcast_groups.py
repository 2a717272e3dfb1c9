"""A broadcast's process group ends with its membership: nothing of it is left when servers come and go."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from tiny_models import dense_config, hf_model, twin_of

from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync import BroadcastTransport, WeightSource

TIMEOUT_S = 120
_dist: Any = dist  # stores are not among its declared names


class Receiver(BaseHTTPRequestHandler):
    """SGLang's end of a broadcast: joins groups by the call that SGLang uses, and adds up the bytes that it gets."""

    group: Any = None
    num_bytes = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/init_weights_update_group":
            Receiver.group = joined(body)
        elif self.path == "/destroy_weights_update_group":
            dist.destroy_process_group(Receiver.group)
        elif self.path == "/update_weights_from_distributed":
            sizes = [
                math.prod(shape) * getattr(torch, dtype).itemsize
                for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
            ]
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
            Receiver.group.broadcast(flat, 0).wait()
            Receiver.num_bytes += len(flat)
        answer = json.dumps({"num_bytes": Receiver.num_bytes}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Not printed."""


def joined(body: dict[str, Any]) -> Any:
    timeout = timedelta(seconds=TIMEOUT_S)
    store = _dist.TCPStore(body["master_address"], body["master_port"], is_master=False, timeout=timeout)
    name, rank, size = body["group_name"], body["rank_offset"], body["world_size"]
    store = _dist.PrefixStore(name, store)
    backend: Any = c10d.Backend(body["backend"])
    group: Any
    group, _ = c10d._new_process_group_helper(size, rank, [], backend, store, group_name=name, timeout=timeout)
    c10d._world.pg_group_ranks[group] = {other: other for other in range(size)}
    return group


def receive(port: Connection) -> None:
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    port.send(server.server_port)
    server.serve_forever()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerApi]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=receive, args=(there,), daemon=True)
    process.start()
    yield ServerApi(f"http://127.0.0.1:{here.recv()}")
    process.kill()
    process.join()


@pytest.mark.parametrize("is_lost", [False, True])
def test_ten_more_groups_leave_no_group_thread_or_file_open(server: ServerApi, is_lost: bool) -> None:
    """A server that is lost is told nothing: the group ends without it."""
    model = twin_of(hf_model(dense_config(1)))
    source = WeightSource(export=None, model=lambda: nullcontext(model))
    transport = BroadcastTransport(backend="gloo", bucket_bytes=2**14, tp_size=1, timeout_s=TIMEOUT_S, host="127.0.0.1")
    process, num_bytes = psutil.Process(), sum(parameter.nbytes for parameter in model.parameters())
    left = []
    for version in range(11):
        before = server.post("/num_bytes")["num_bytes"]
        transport.send([server], source, str(version))
        assert server.post("/num_bytes")["num_bytes"] - before == num_bytes
        if is_lost:
            transport.forget()
        else:
            transport.close([server])
        gc.collect()
        left.append((len(c10d._world.pg_map), process.num_threads(), process.num_fds()))
    assert left[0] == left[-1], left
