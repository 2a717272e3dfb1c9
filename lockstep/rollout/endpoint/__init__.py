"""The policy behind HTTP, in OpenAI's protocol and in the part of SGLang's that slime's functions post to."""

from __future__ import annotations

from lockstep.rollout.endpoint.gate import GatedEngine
from lockstep.rollout.endpoint.server import Endpoint, ServedPolicy, listen

__all__ = ["Endpoint", "GatedEngine", "ServedPolicy", "listen"]
