"""SGLang's /generate: what a request says, and what a reply has to hold."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lockstep.rollout.engine import FinishReason, Generation, SamplingParams


class GarbageAnswer(ValueError):
    """A reply that does not hold what was asked for: its server cannot be trusted."""


def generate_payload(
    input_ids: Sequence[int], params: SamplingParams, *, rid: str, seed: int, routed_experts: bool
) -> dict[str, Any]:
    """The body of a request; log-probs are always asked for."""
    return {
        "rid": rid,
        "input_ids": list(input_ids),
        "sampling_params": {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_new_tokens": params.max_new_tokens,
            "min_new_tokens": params.min_new_tokens,
            "stop": list(params.stop),
            "stop_token_ids": list(params.stop_token_ids),
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
            "sampling_seed": seed if params.sampling_seed is None else params.sampling_seed,
        },
        "return_logprob": True,
        "return_routed_experts": routed_experts,
    }


def sampling_seed(seed: int, stream: tuple[int, ...]) -> int:
    """31 bits that depend on the run's seed and the request's stream alone."""
    digest = hashlib.blake2b(repr((seed, stream)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def read_generation(
    reply: Any, *, num_prompt: int, max_new_tokens: int, routes_shape: tuple[int, int] | None
) -> Generation:
    """What the reply says was sampled.

    Args:
        routes_shape: sparse layers and experts per token, where routed experts were asked for.
    Raises:
        GarbageAnswer: something is missing, or contradicts something else.
    """
    try:
        meta = reply["meta_info"]
        reason: FinishReason = meta["finish_reason"]["type"]
        pairs = [(float(entry[0]), int(entry[1])) for entry in meta.get("output_token_logprobs") or []]
        output_ids = [int(token) for token in reply.get("output_ids") or []]
        version = str(meta["weight_version"])
        cached_tokens = int(meta.get("cached_tokens") or 0)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise GarbageAnswer(f"it lacks what every answer holds ({type(error).__name__}: {error})") from error
    log_probs, token_ids = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if reason not in ("stop", "length", "abort"):
        raise GarbageAnswer(f"it ended for the reason {reason!r}")
    if output_ids != token_ids:
        raise GarbageAnswer(f"its {len(output_ids)} tokens are not those of its {len(token_ids)} log-probs")
    if len(token_ids) > max_new_tokens or (reason != "abort" and not token_ids):
        raise GarbageAnswer(f"it holds {len(token_ids)} tokens where up to {max_new_tokens} were asked for")
    if not all(math.isfinite(value) and value <= 1e-3 for value in log_probs):
        raise GarbageAnswer("it holds log-probs that are none")
    routes = None
    if routes_shape is not None and token_ids:
        routes = _routes(meta.get("routed_experts"), num_prompt + len(token_ids) - 1, routes_shape)
    return Generation(
        token_ids=token_ids,
        log_probs=log_probs,
        finish_reason=reason,
        weight_versions=[version] * len(token_ids),
        routed_experts=routes,
        cached_tokens=cached_tokens,
    )


def _routes(encoded: Any, num_tokens: int, routes_shape: tuple[int, int]) -> np.ndarray:
    """[tokens, sparse layers, top_k] expert ids."""
    try:
        flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.int32)
        return flat.reshape(num_tokens, *routes_shape).astype(np.int16)
    except (TypeError, ValueError) as error:
        raise GarbageAnswer(f"its routed experts are not {num_tokens} tokens of {routes_shape}: {error}") from error
