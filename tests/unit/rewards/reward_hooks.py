"""Custom rewards that behave and misbehave, loaded by path in worker processes."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

at_once = 0


async def length(args, sample):
    return len(sample.response)


def plain_length(args, sample):
    return len(sample.response)


async def annotate(args, sample):
    sample.metadata["seen"] = [args.rm_url, sample.tokens]
    sample.remove_sample = True
    sample.reward = 99.0
    return 0.5


async def by_response(args, sample):
    """Do what the response says."""
    match sample.response:
        case "busy loop":
            while True:
                pass
        case "blocking sleep":
            time.sleep(60)
        case "stuck regex":  # holds the interpreter lock
            re.match(r"(a+)+$", "a" * 40 + "b")
        case "async sleep":
            await asyncio.sleep(60)
        case "child task blocks":
            await asyncio.gather(asyncio.create_task(_block()), asyncio.sleep(60))
        case "refuses cancellation":
            while True:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    continue
        case "exit":
            os._exit(3)
        case "exit in the background":
            threading.Timer(0.05, os._exit, (4,)).start()
            await asyncio.sleep(60)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "sys.exit":
            sys.exit(5)
        case "raise":
            return 1 / 0
        case "nan":
            return math.nan
        case "infinite":
            return math.inf
        case "none":
            return None
        case "text":
            return "1.0"
        case "dict":
            return {"score": 0.25, "why": "because"}
        case "nan in dict":
            return {"score": math.nan}
        case "unpicklable":
            return {"score": 1.0, "lock": threading.Lock()}
        case "local class":
            return {"score": 1.0, "verdict": Verdict()}
        case "wait a little":
            await asyncio.sleep(0.2)
            return 7.0
        case "count the others":
            return await _calls_at_once()
        case "pid":
            return os.getpid()
        case "loud":
            print("loud on stdout")
            subprocess.run(["echo", "loud child"], check=True)
            return 1.0
    return 1.0


async def _calls_at_once():
    global at_once
    at_once += 1
    await asyncio.sleep(0.05)
    seen = at_once
    await asyncio.sleep(0.05)
    at_once -= 1
    return float(seen)


async def _block():
    time.sleep(60)


class Verdict:
    """Known to the worker only, because the controller does not load this file under the worker's name for it."""


async def group_ranks(args, samples):
    for rank, sample in enumerate(samples):
        sample.metadata["rank"] = rank
    return [float(len(sample.response)) for sample in samples]


async def group_one_nan(args, samples):
    return [math.nan if sample.response == "nan" else 1.0 for sample in samples]


async def group_too_short(args, samples):
    return [1.0]
