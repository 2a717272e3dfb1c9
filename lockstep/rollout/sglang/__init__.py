"""Sampling on SGLang's servers, over HTTP. docs/sglang.md explains it."""

from __future__ import annotations

from lockstep.rollout.sglang.api import ServerApi
from lockstep.rollout.sglang.arguments import known_flags, require_known, server_words
from lockstep.rollout.sglang.engine import Fleet, Server, SGLangEngine
from lockstep.rollout.sglang.process import ServerProcess

__all__ = [
    "Fleet",
    "SGLangEngine",
    "Server",
    "ServerApi",
    "ServerProcess",
    "known_flags",
    "require_known",
    "server_words",
]
