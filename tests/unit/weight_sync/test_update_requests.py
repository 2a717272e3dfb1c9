"""The requests of an update: what they say, in what order, over which connections, and what becomes of a refusal."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from tiny_models import dense_config, hf_model, twin_of

from lockstep.errors import RolloutError
from lockstep.parallel.mesh import Layout, Meshes
from lockstep.parallel.shard import shard_model
from lockstep.rollout.sglang.api import ServerApi
from lockstep.weight_sync import TensorTransport, WeightSource, tensor
from lockstep.weight_sync.source import BucketPlan

BUCKET_BYTES = 2**14


class Receiver(BaseHTTPRequestHandler):
    """Answers like a server that takes its time, and refuses the request with the number `refused`."""

    protocol_version = "HTTP/1.1"
    bodies: ClassVar[list[dict[str, Any]]] = []
    loaded: ClassVar[list[tuple[list[Any], torch.Tensor]]] = []
    spans: ClassVar[list[tuple[float, float]]] = []
    connections: ClassVar[set[Any]] = set()
    refused: int | None = None
    hangs_up = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        began = time.monotonic()
        time.sleep(0.01)
        Receiver.connections.add(self.client_address)
        Receiver.bodies.append(body)
        if tensors := body.get("serialized_named_tensors"):
            sent = pickle.loads(base64.b64decode(tensors[0]))
            Receiver.loaded.append((sent["metadata"], sent["flattened_tensor"].clone()))
        Receiver.spans.append((began, time.monotonic()))
        is_refused = len(Receiver.bodies) - 1 == Receiver.refused
        answer = json.dumps({"success": not is_refused, "message": "no room" if is_refused else ""}).encode()
        self.send_response(400 if is_refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        self.close_connection = Receiver.hangs_up

    def log_message(self, format: str, *args: Any) -> None:
        """Not printed."""


@pytest.fixture
def server() -> Iterator[ServerApi]:
    Receiver.bodies, Receiver.loaded, Receiver.spans, Receiver.connections = [], [], [], set()
    Receiver.refused, Receiver.hangs_up = None, False
    http = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield ServerApi(f"http://127.0.0.1:{http.server_port}")
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(scope="module")
def source() -> WeightSource:
    model = twin_of(hf_model(dense_config(1)))
    return WeightSource(export=None, model=lambda: nullcontext(model))


def updated(server: ServerApi, source: WeightSource) -> None:
    TensorTransport(bucket_bytes=BUCKET_BYTES, tp_size=1, timeout_s=60).send([server], source, "7")


def test_a_request_waits_for_the_answer_before_and_only_the_last_names_the_version(
    server: ServerApi, source: WeightSource
) -> None:
    updated(server, source)
    assert source.model is not None
    with source.model() as model:
        buckets = BucketPlan(BUCKET_BYTES).of(model)
        assert len(buckets) > 2
        for (metadata, flat), bucket in zip(Receiver.loaded, buckets, strict=True):
            places = [(part.name, part.shape, part.dtype, part.start_idx, part.end_idx) for part in metadata]
            begins = [0, *bucket.ends[:-1]]
            assert places == list(zip(bucket.names, bucket.shapes, bucket.dtypes, begins, bucket.ends, strict=True))
            assert torch.equal(flat, bucket.flattened())
    assert [body.get("weight_version") for body in Receiver.bodies] == [None] * (len(buckets) - 1) + ["7"]
    for (_, ended), (began, _) in zip(Receiver.spans, Receiver.spans[1:], strict=False):
        assert began > ended


def test_the_requests_of_an_update_share_a_connection(server: ServerApi, source: WeightSource) -> None:
    updated(server, source)
    assert len(Receiver.bodies) > 2
    assert len(Receiver.connections) == 1


def test_a_connection_that_the_server_has_closed_is_not_used_again(server: ServerApi) -> None:
    Receiver.hangs_up = True
    for _ in range(3):
        server.post("/any")
        time.sleep(0.1)  # for the news of its end
    assert len(Receiver.connections) == 3


def test_after_a_refusal_nothing_more_is_sent_or_shared(
    server: ServerApi, source: WeightSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle that no server opens keeps its memory on a GPU for good. One more is there when the refusal comes."""
    shared: list[torch.Tensor] = []
    serialized = tensor._serialized

    def counted(bucket: Any, flat: torch.Tensor, pickler: Any) -> str:
        shared.append(flat)
        return serialized(bucket, flat, pickler)

    monkeypatch.setattr(tensor, "_serialized", counted)
    Receiver.refused = 1
    with pytest.raises(RolloutError, match=rf"{server.url}/update_weights_from_tensor.*400.*no room"):
        updated(server, source)
    assert len(Receiver.bodies) == 2
    assert len(shared) == 3


def send_with_a_peer(rank: int, folder: str, url: str) -> None:
    """What became of an update by a trainer of two ranks goes to a file."""
    root = Path(folder)
    dist.init_process_group("gloo", None, timedelta(minutes=1), 2, rank, dist.FileStore(str(root / "store"), 2))
    model = twin_of(hf_model(dense_config(1)))
    shard_model(model, Meshes(Layout(world_size=2), "cpu"), reduce_dtype=None)
    source = WeightSource(export=None, model=lambda: nullcontext(model))
    try:
        TensorTransport(bucket_bytes=BUCKET_BYTES, tp_size=1, timeout_s=60).send([ServerApi(url)], source, "7")
        outcome = "returned"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    (root / f"rank_{rank}").write_text(outcome)
    os._exit(0)  # taking process groups down aborts now and then, in their own threads


def test_ranks_stop_together_after_a_refusal_and_the_first_says_why(server: ServerApi, tmp_path: Path) -> None:
    Receiver.refused = 1
    code = f"import sys; sys.path[:] = {sys.path}; from {__name__} import send_with_a_peer as send; send"
    ranks = [
        subprocess.Popen([sys.executable, "-c", f"{code}({rank}, {str(tmp_path)!r}, {server.url!r})"])
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert re.match("RolloutError: .*no room", (tmp_path / "rank_0").read_text())
    assert (tmp_path / "rank_1").read_text() == "returned"
    assert len(Receiver.bodies) == 2


def test_a_bucket_lists_in_json_what_is_in_it(source: WeightSource) -> None:
    assert source.model is not None
    with source.model() as model:
        for bucket in BucketPlan(BUCKET_BYTES).of(model):
            listing = json.loads(bucket.request({"a": 1}))
            dtypes = [getattr(torch, name) for name in listing.pop("dtypes")]
            assert dtypes == bucket.dtypes
            assert listing.pop("a") == 1
            assert listing == {"names": bucket.names, "shapes": [list(shape) for shape in bucket.shapes]}
