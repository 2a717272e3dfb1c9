"""The user's functions in these runs. What the options do not say comes from environment variables."""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from lockstep.rollout import current_policy
from lockstep.rollout.generate import generate_rollout
from lockstep.types import DynamicFilterOutput, Sample

MOMENT = os.environ.get("E2E_MOMENT", "")
"""When this process sends itself a signal: `SIGKILL train 3`, `SIGKILL save:state rollout_0000003`."""


@functools.cache
def strike(moment: str, place: object) -> None:
    """Send the signal if this is the moment, once: a second would stop the run at once."""
    name, _, when = MOMENT.partition(" ")
    if when == f"{moment} {place}":
        os.kill(os.getpid(), signal.Signals[name])


# Rewards


async def digits(args: Any, sample: Sample) -> float:
    """Share of digits in the response, after a delay that no seed repeats."""
    await asyncio.sleep(random.SystemRandom().uniform(0, float(os.environ.get("E2E_DELAY", "0"))))
    return sum(c.isdigit() for c in sample.response) / max(1, len(sample.response))


def endless(args: Any, sample: Sample) -> float:
    """Never answers, and blocks its process."""
    Path(os.environ["E2E_MARKER"]).touch()
    while True:
        time.sleep(60)


def ranks(args: Any, samples: list[Sample]) -> list[float]:
    """A reward of the whole group: each sample's place in it."""
    record("ranks", [sample.index for sample in samples])
    return [float(place) for place in range(len(samples))]


async def constant_in_odd_groups(args: Any, sample: Sample) -> float:
    return 0.5 if sample.group_index % 2 else float(sample.index)


def hangs_at_first(args: Any, sample: Sample) -> float:
    """The first of every four samples never gets its reward."""
    if sample.index % 4 == 0:
        time.sleep(60)
    return float(sample.index)


def hangs_in_the_first_group(args: Any, sample: Sample) -> float:
    if sample.group_index == 0:
        time.sleep(60)
    return float(sample.index)


async def fails_at_once_where_deferred(args: Any, sample: Sample) -> float:
    """The groups that a rollout of three needs take their time, the others fail long before."""
    if sample.group_index % 9 >= 3:
        raise RuntimeError("no reward")
    await asyncio.sleep(0.3)
    return float(sample.index)


def as_dict(args: Any, sample: Sample) -> dict[str, float]:
    return {"score": float(sample.index), "other": -1.0}


def by_metadata(args: Any, sample: Sample) -> float:
    """What the sample hook has left."""
    return float(sample.metadata["stamp"])


# What a rollout is made of


async def two_turns(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """The policy, a tool, the policy again."""
    policy = current_policy()
    policy.start(sample)
    await policy.extend(sample, sampling_params | {"max_new_tokens": 4})
    answer = policy.tokenizer.encode("=42?", add_special_tokens=False)
    sample.append_response_tokens(args, tokens=answer, trainable=False, text="=42?")
    await policy.extend(sample, sampling_params | {"max_new_tokens": 3})
    return sample


async def two_turns_where_ranks_can_meet(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """NCCL makes its connections when two ranks first need them, in the middle of a run; gloo, which CPUs have, at the
    start. So that a run on CPUs notices too: the store at which they meet listens in this process."""
    assert any(c.status == psutil.CONN_LISTEN for c in psutil.Process().net_connections()), "no store listens any more"
    return await two_turns(args, sample, sampling_params)


async def over_http(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    """As slime's functions do: ask the router for everything. The port that was free is known to the policy only."""
    policy = current_policy()
    policy.start(sample)
    body = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_routed_experts": True}
    async with httpx.AsyncClient(timeout=60) as client:
        reply = (await client.post(f"{policy.url}/generate", json=body)).raise_for_status().json()
    meta = reply["meta_info"]
    log_probs = [entry[0] for entry in meta["output_token_logprobs"]]
    sample.append_response_tokens(
        args, tokens=reply["output_ids"], log_probs=log_probs, text=reply["text"], meta_info=meta
    )
    sample.weight_versions = [meta["weight_version"]] * sample.response_length
    layers_and_experts = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype=np.int32)
    sample.rollout_routed_experts = layers_and_experts.reshape(len(sample.tokens) - 1, -1, 2)
    return sample


async def groups_only(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """A rollout function in slime's older form: plain groups."""
    return (await generate_rollout(args, rollout_id, data_source)).samples


async def own_metrics(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """A rollout function with a metric of its own."""
    output = await generate_rollout(args, rollout_id, data_source)
    return replace(output, metrics=output.metrics | {"mine/number": np.float32(2.5)})


def stamp(args: Any, sample: Sample, *, rollout_id: int, evaluation: bool) -> Sample:
    """Hand on another object, marked."""
    return replace(sample, metadata=sample.metadata | {"stamp": -1 if evaluation else sample.index})


def remove_best(args: Any, samples: list[list[Sample]]) -> None:
    for group in samples:
        max(group, key=lambda s: s.reward).remove_sample = True


def newest_first(args: Any, rollout_id: int | None, buffer: list[list[Sample]], num_samples: int) -> list[list[Sample]]:
    """Take from the end of the buffer."""
    record("newest_first", [group[0].group_index for group in buffer])
    picked = buffer[-num_samples:]
    del buffer[-num_samples:]
    return picked


def see_all_samples(args: Any, all_samples: list[list[Sample]], data_source: Any) -> None:
    record("see_all_samples", [group[0].group_index for group in all_samples])


def no_advantages(args: Any, rollout_id: int, rollout_data: Any) -> None:
    for sample in rollout_data.train_samples:
        sample.advantage = 0.0


def negated(args: Any, samples: list[Sample]) -> tuple[list[float], list[float]]:
    return [s.reward for s in samples], [-float(s.index) for s in samples]


def log_rollout(rollout_id: int, args: Any, samples: list[Sample], extra: dict[str, Any], seconds: float) -> bool:
    record("log_rollout", [rollout_id, len(samples), extra["rollout/prompts_trained"], seconds > 0])
    return rollout_id == 0


def log_eval(rollout_id: int, args: Any, data: dict[str, Any], extra_metrics: dict[str, Any] | None) -> bool:
    record("log_eval", [rollout_id, len(data["heldout"]["rewards"])])
    return rollout_id == -1


def raises(*arguments: Any, **named: Any) -> Any:
    raise KeyError("missing piece")


def raises_in_evaluation(args: Any, sample: Sample, *, rollout_id: int, evaluation: bool) -> None:
    if evaluation:
        raise ZeroDivisionError("by a held-out prompt")


def nonsense(*arguments: Any, **named: Any) -> Any:
    return "nonsense"


async def nonsense_later(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Any:
    return "nonsense"


def record(name: str, values: Any) -> None:
    """Append what a hook has seen to the file of this run's calls."""
    with Path(os.environ["E2E_CALLS"]).open("a") as file:
        file.write(json.dumps([name, values]) + "\n")


# Moments of a step


def at_sample(args: Any, sample: Sample, *, rollout_id: int, evaluation: bool) -> None:
    strike("eval" if evaluation else "rollout", rollout_id)


def another_bit(args: Any, sample: Sample, *, rollout_id: int, evaluation: bool) -> None:
    """The third log-prob moves to the next number that fp32 has."""
    assert sample.rollout_log_probs is not None
    sample.rollout_log_probs[2] = float(np.nextafter(np.float32(sample.rollout_log_probs[2]), np.float32(-100.0)))


def at_train(args: Any, rollout_id: int, rollout_data: Any) -> None:
    strike("train", rollout_id)


def two_of_three(args: Any, samples: list[Sample]) -> DynamicFilterOutput:
    """Drop every third group; draw from the global generator, as a user's filter may."""
    random.random()
    strike("filter", samples[0].group_index)
    keep = samples[0].group_index % 3 != 1
    return DynamicFilterOutput(keep=keep, reason=None if keep else "third")


def better_than_nothing(args: Any, samples: list[Sample]) -> DynamicFilterOutput:
    """Keeps no group for its own sake."""
    return DynamicFilterOutput(keep=False, reason="never", keep_when_insufficient=True)


def shake_advantages(args: Any, rollout_id: int, rollout_data: Any) -> None:
    """Make the result depend on both global generators."""
    for sample in rollout_data.train_samples:
        sample.advantage *= 1 + 0.1 * random.random() + 0.1 * float(np.random.rand())
    threading.Timer(0.01, strike, ("train", rollout_id)).start()


def endless_postprocess(args: Any, rollout_id: int, rollout_data: Any) -> None:
    """Blocks the loop itself, where nothing can be cancelled."""
    Path(os.environ["E2E_MARKER"]).touch()
    while True:
        time.sleep(60)


# Moments of a save, seen through the interpreter's audit events: just before the event happens

RENAMED: list[Path] = []
"""Checkpoints whose last rename has begun."""


def at_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("os.mkdir", "open", "os.rename") or not isinstance(arguments[0], str | os.PathLike):
        return
    path = Path(arguments[0])
    if event == "open" and RENAMED and path == RENAMED[-1].parent:  # to flush it after the rename
        strike("save:renamed", RENAMED[-1].name)
    elif event == "open" and path.parent.suffix == ".incomplete":
        strike(f"save:{path.suffix.removeprefix('.')}", path.parent.stem)
    elif event == "os.mkdir" and path.suffix == ".incomplete":
        strike("save:mkdir", path.stem)
    elif event == "os.rename" and path.suffix == ".incomplete":
        strike("save:rename", path.stem)
        RENAMED.append(path.with_suffix(""))
    elif event == "os.rename" and path.name.startswith("rollout_"):
        strike("save:delete", path.name)


if " save:" in MOMENT:
    sys.addaudithook(at_event)
