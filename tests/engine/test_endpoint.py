"""The endpoint in the process of its engine, over real HTTP: refusals, gates, withdrawals and streams."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from serving import make_engine
from tiny_models import VOCAB, tiny_dense

from lockstep.rollout.embedded import EmbeddedEngine
from lockstep.rollout.endpoint import Endpoint, GatedEngine, ServedPolicy, listen
from lockstep.rollout.endpoint.requests import Limits
from lockstep.rollout.engine import SamplingParams

LONGEST = 600


class Letters:
    """A tokenizer of single letters: 0 is "a"; what lies above "z" has a bracketed number. No chat template."""

    chat_template = None
    eos_token = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("a") + token) if token < 26 else f"[{token}]" for token in token_ids)

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
        raise AssertionError("there is none")


class Desk:
    """An endpoint whose engine runs on a thread of its own, as it would in a run."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.engine: EmbeddedEngine = make_engine(tiny_dense(), num_blocks=1024, decode_text=Letters().decode)
        self.gate = self.do(self._gate())
        limits = Limits(
            model="tiny",
            tokenizer=Letters(),
            defaults={"temperature": 1.0, "top_p": 1.0, "top_k": -1},
            stop_token_ids=(),
            max_context_len=LONGEST,
            vocab_size=VOCAB,
            chat_template_kwargs={},
        )
        policy = ServedPolicy(self.gate, limits, self.loop)
        self.endpoint = Endpoint(policy, listen("127.0.0.1", 0, "--port"))
        self.client = httpx.Client(base_url=self.endpoint.url, timeout=60)

    async def _gate(self) -> GatedEngine:
        return GatedEngine(self.engine)

    def do(self, work: Any) -> Any:
        """Run a coroutine where the engine lives."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        async def there() -> None:
            function(*arguments)

        self.do(there())

    def complete(self, **body: Any) -> dict[str, Any]:
        response = self.client.post("/v1/completions", json={"model": "tiny", "prompt": "abc"} | body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def close(self) -> None:
        self.client.close()
        self.endpoint.close()
        self.do(self.gate.drain())
        self.engine.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def whole_desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


@pytest.fixture
def desk(whole_desk: Desk) -> Iterator[Desk]:
    """Open, under the version 1, and idle again afterwards."""
    whole_desk.call(whole_desk.gate.set_version, 1)
    yield whole_desk
    whole_desk.do(whole_desk.gate.drain())
    assert not whole_desk.engine.has_work
    whole_desk.engine.blocks.check_integrity()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


# What is answered


def test_the_answer_is_the_engines_with_its_tokens_log_probs_and_version(desk: Desk) -> None:
    answer = desk.complete(seed=5, max_tokens=9)
    (choice,) = answer["choices"]
    wanted = desk.do(desk.engine.generate([0, 1, 2], SamplingParams(max_new_tokens=9, sampling_seed=5), (0,)))
    assert choice["token_ids"] == wanted.token_ids
    assert choice["token_logprobs"] == wanted.log_probs
    assert choice["text"] == Letters().decode(wanted.token_ids)
    assert (choice["weight_versions"], answer["weight_version"]) == (["1"] * 9, "1")
    assert (choice["prompt_token_ids"], choice["finish_reason"]) == ([0, 1, 2], "length")
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 9,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompts_and_choices_come_in_order_and_a_seed_names_them_all(desk: Desk) -> None:
    first = desk.complete(prompt=["abc", "xyz"], n=3, seed=7, max_tokens=6)
    again = desk.complete(prompt=[[0, 1, 2], [23, 24, 25]], n=3, seed=7, max_tokens=6)
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["text"] for choice in again["choices"]] == texts
    assert [choice["index"] for choice in first["choices"]] == list(range(6))
    assert [choice["prompt_token_ids"][0] for choice in first["choices"]] == [0, 0, 0, 23, 23, 23]
    assert len(set(texts)) == 6
    unseeded = {desk.complete(max_tokens=12)["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) == 3


def test_a_stop_string_ends_the_text_before_it_and_the_tokens_after_it(desk: Desk) -> None:
    free = desk.complete(seed=3, max_tokens=200)["choices"][0]
    letters = [Letters().decode([token]) for token in free["token_ids"]]
    stop = next(a + b for a, b in pairwise(letters[4:]) if len(a + b) == 2)
    end = next(i for i in range(len(letters)) if stop in "".join(letters[: i + 1]))
    stopped = desk.complete(seed=3, max_tokens=200, stop=[stop])["choices"][0]
    assert stopped["token_ids"] == free["token_ids"][: end + 1]
    assert stopped["text"] == "".join(letters[: end + 1]).partition(stop)[0]
    assert stopped["finish_reason"] == "stop"
    body = {"model": "tiny", "prompt": "abc", "seed": 3, "max_tokens": 200, "stop": stop, "stream": True}
    with desk.client.stream("POST", "/v1/completions", json=body) as response:
        pieces = [event["choices"][0] for event in events(response.iter_lines())]
    assert "".join(piece["text"] for piece in pieces) == stopped["text"]
    assert [token for piece in pieces for token in piece.get("token_ids", [])] == stopped["token_ids"]
    assert [lp for piece in pieces for lp in piece.get("token_logprobs", [])] == stopped["token_logprobs"]
    assert [piece["finish_reason"] for piece in pieces[-2:]] == [None, "stop"]


def test_tokens_arrive_while_the_response_is_still_written(desk: Desk) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 500, "stream": True}
    with desk.client.stream("POST", "/v1/completions", json=body) as response:
        next(events(response.iter_lines()))
        assert desk.engine.has_work


def test_the_route_of_slimes_functions_gives_what_a_sample_needs(desk: Desk) -> None:
    params = {"max_new_tokens": 5, "sampling_seed": 4}
    body = {"input_ids": [0, 1, 2], "sampling_params": params, "return_logprob": True}
    reply = desk.client.post("/generate", json=body).json()
    wanted = desk.complete(seed=4, max_tokens=5)["choices"][0]
    assert reply["output_ids"] == wanted["token_ids"]
    meta = reply["meta_info"]
    assert meta["output_token_logprobs"] == [
        [lp, t, None] for lp, t in zip(wanted["token_logprobs"], wanted["token_ids"], strict=True)
    ]
    assert (meta["finish_reason"], meta["weight_version"]) == ({"type": "length"}, "1")


# What is refused


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt"}, 404, "model", "does not exist"),
    ({"prompt": None}, 400, "prompt", "must be a text"),
    ({"prompt": ""}, 400, "prompt", "no token to continue"),
    ({"prompt": [0, VOCAB]}, 400, "prompt", "neither text nor ids"),
    ({"prompt": "a" * LONGEST}, 400, "messages", "context holds 600"),
    ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
    ({"max_tokens": "many"}, 400, "max_tokens", "whole number"),
    ({"n": 0.5}, 400, "n", "whole number"),
    ({"n": 1000}, 400, "n", "from 1 to 128"),
    ({"temperature": -1}, 400, "temperature", "from 0"),
    ({"temperature": "hot"}, 400, "temperature", "must be a number"),
    ({"top_p": 0}, 400, "top_p", "above 0"),
    ({"top_k": 0}, 400, "top_k", "-1 for all"),
    ({"stop": [""]}, 400, "stop", "none of them empty"),
    ({"stop_token_ids": [VOCAB]}, 400, "stop_token_ids", "ids of tokens"),
    ({"seed": "x"}, 400, "seed", "whole number"),
    ({"logprobs": 5}, 400, "logprobs", "use 0"),
    ({"stream": "yes"}, 400, "stream", "true or false"),
    ({"presence_penalty": 1.0}, 400, "presence_penalty", "leave it out"),
    ({"temprature": 1.0}, 400, "temprature", "is not known here"),
]


@pytest.mark.parametrize(("change", "status", "param", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_refused_in_openais_words(
    desk: Desk, change: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    response = desk.client.post("/v1/completions", json={"model": "tiny", "prompt": "abc"} | change)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert message in error["message"]
    assert desk.complete(max_tokens=1)["choices"], "the next one is served"


def test_whoever_names_no_model_means_the_one_that_there_is(desk: Desk) -> None:
    body = {"prompt": "abc", "max_tokens": 5, "seed": 3}
    answers = [desk.client.post("/v1/completions", json=body | named).json() for named in ({}, {"model": "tiny"})]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["model"] == "tiny"


def test_what_is_no_json_or_no_route_is_refused_in_openais_words(desk: Desk) -> None:
    for response, status in (
        (desk.client.post("/v1/completions", content="{"), 400),
        (desk.client.post("/v1/completions", json=[1]), 400),
        (desk.client.get("/v1/completions"), 405),
        (desk.client.post("/v1/embeddings", json={}), 404),
        (desk.client.post("/v1/chat/completions", json={"model": "tiny", "messages": []}), 400),
        (desk.client.post("/generate", json={"text": "abc", "sampling_params": {"hurry": 1}}), 400),
        (desk.client.post("/generate", json={"text": "abc", "sampling_params": {"temperature": "hot"}}), 400),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_failing_engine_is_a_server_error_and_the_next_request_is_served(desk: Desk) -> None:
    original = desk.engine.runner.run

    def broken(*arguments: Any) -> Any:
        desk.engine.runner.run = original  # type: ignore[method-assign]
        raise RuntimeError("the device is on fire")

    desk.engine.runner.run = broken  # type: ignore[method-assign]
    response = desk.client.post("/v1/completions", json={"model": "tiny", "prompt": "abc"})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "on fire" in response.json()["error"]["message"]
    assert desk.complete(max_tokens=2)["choices"]


# Clients that leave, and weights that change


@pytest.mark.parametrize("streams", [False, True])
def test_a_request_is_withdrawn_when_its_client_goes_away(desk: Desk, streams: bool) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 590, "n": 4, "stream": streams}
    with httpx.Client(base_url=desk.endpoint.url) as client:
        if streams:
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(events(response.iter_lines()))
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.05))
    desk.until(lambda: not desk.engine.has_work)
    assert desk.gate._num_outside == 0


def test_requests_wait_while_weights_change_and_go_on_under_the_new_ones(desk: Desk) -> None:
    """One is in the midst of its response when the gate closes, another comes while it is closed."""
    answers: dict[str, dict[str, Any]] = {}

    def ask(name: str, **body: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: answers.update({name: desk.complete(**body)}))
        thread.start()
        return thread

    early = ask("early", max_tokens=500, seed=1)
    desk.until(lambda: any(s.num_new_tokens > 5 for s in list(desk.engine.scheduler.running)))
    desk.do(desk.gate.drain())
    late = ask("late", max_tokens=5)
    assert desk.client.get("/health").json() == {"status": "ok", "weight_version": "1"}
    time.sleep(0.05)
    assert answers == {}
    desk.call(desk.gate.set_version, 2)
    early.join()
    late.join()
    (choice,) = answers["early"]["choices"]
    versions = choice["weight_versions"]
    assert versions == sorted(versions)
    assert set(versions) == {"1", "2"}
    assert len(choice["token_ids"]) == len(versions) == 500
    assert choice["finish_reason"] == "length"
    whole = desk.do(desk.engine.generate([0, 1, 2], SamplingParams(max_new_tokens=500, sampling_seed=1), (0,)))
    assert choice["token_ids"] == whole.token_ids, "the weights are the same in truth"
    assert set(answers["late"]["choices"][0]["weight_versions"]) == {"2"}


def test_an_interrupted_rollout_gets_what_it_has(desk: Desk) -> None:
    """Requests of agents that belong to it come back, to be continued by whoever sent them."""
    answers: list[dict[str, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(desk.complete(max_tokens=500)))
    asking.start()
    desk.until(lambda: any(s.num_new_tokens > 5 for s in list(desk.engine.scheduler.running)))
    desk.do(desk.gate.abort_all())
    asking.join()
    (choice,) = answers[0]["choices"]
    assert choice["finish_reason"] == "abort"
    assert 5 < len(choice["token_ids"]) < 500


def test_a_session_is_one_place_for_the_router(desk: Desk) -> None:
    streams = [desk.endpoint.stream_of(session) for session in ("x", None, "y", "x", None)]
    assert [stream[:2] for stream in streams] == [(2, 0)] * 5
    assert len({stream[:3] for stream in streams}) == 4
    assert streams[0][:3] == streams[3][:3]
    assert len(set(streams)) == 5
