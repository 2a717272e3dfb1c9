from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from lockstep.rewards import Outcome, RewardPool
from lockstep.types import Sample


class Service:
    """A reward service on a free port that answers from a list, its last answer for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.released = threading.Event()


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients that have hung up are part of these tests."""


@contextlib.contextmanager
def serving(*answers):
    service = Service(*answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            service.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
            if answer == "hang":
                service.released.wait()
                answer = (200, "0")
            status, body = answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args):
            pass

    server = QuietServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}/score"
    try:
        yield service
    finally:
        service.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def pool_asking(url, **kwargs):
    args = SimpleNamespace(
        rm_type="remote_rm", rm_url=url, custom_rm_path=None, group_rm=False, reward_key=None, eval_reward_key=None
    )
    return RewardPool(args, num_workers=1, **kwargs)


def score(url, num_samples=1, **kwargs):
    async def run():
        async with pool_asking(url, **kwargs) as pool:
            samples = [Sample(index=i, prompt="1+1", response=str(i), label="2") for i in range(num_samples)]
            return await asyncio.gather(*(pool.score(sample) for sample in samples))

    return asyncio.run(run())


def test_the_service_gets_prompt_response_and_label_and_its_number_is_the_reward():
    with serving((200, "0.75")) as service:
        (outcome,) = score(service.url)
    assert service.requests == [{"prompt": "1+1", "response": "0", "label": "2"}]
    assert (outcome.outcome, outcome.reward) == (Outcome.OK, 0.75)


def test_an_object_is_a_reward_too():
    with serving((200, '{"score": 1, "why": "so"}')) as service:
        assert score(service.url)[0].reward == {"score": 1, "why": "so"}


def test_server_errors_are_retried_until_an_answer_comes():
    with serving((500, "oops"), (429, "later"), (200, "1")) as service:
        (outcome,) = score(service.url)
    assert outcome.reward == 1.0
    assert len(service.requests) == 3


def test_errors_until_the_deadline_are_a_timeout_that_quotes_the_last_one():
    with serving((500, "out of memory")) as service:
        (outcome,) = score(service.url, timeout_s=0.5)
    assert outcome.outcome is Outcome.TIMEOUT
    assert "500 'out of memory'" in outcome.detail


def test_a_refused_request_is_not_repeated():
    with serving((404, "no such path")) as service:
        (outcome,) = score(service.url)
    assert outcome.outcome is Outcome.EXCEPTION
    assert "refused with 404 'no such path'" in outcome.detail
    assert len(service.requests) == 1


def test_an_answer_that_is_not_json_is_quoted():
    with serving((200, "<html>")) as service:
        (outcome,) = score(service.url)
    assert outcome.outcome is Outcome.EXCEPTION
    assert "200 '<html>', which is not JSON" in outcome.detail


def test_a_service_that_says_nan_gives_no_reward():
    with serving((200, "NaN")) as service:
        assert score(service.url)[0].outcome is Outcome.INVALID


def test_a_hanging_service_costs_one_deadline_for_all_calls_together():
    with serving("hang") as service:
        start = time.monotonic()
        outcomes = score(service.url, num_samples=20, timeout_s=0.8)
        took_s = time.monotonic() - start
    assert [outcome.outcome for outcome in outcomes] == [Outcome.TIMEOUT] * 20
    assert took_s < 20 * 0.8 / 2  # not one after the other


def test_a_service_that_is_not_there_is_named():
    with serving((200, "1")) as service:
        url = service.url
    (outcome,) = score(url, timeout_s=0.4)
    assert outcome.outcome is Outcome.TIMEOUT
    assert url in outcome.detail
    assert "ConnectError" in outcome.detail
