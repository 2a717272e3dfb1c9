"""What a reply looks like, in OpenAI's protocol and in SGLang's. What training needs stands in extra fields."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from lockstep.data.tokenizer import Tokenizer
from lockstep.rollout.engine import Generation


def completion_choice(index: int, text: str, log_probs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason}


def chat_choice(index: int, text: str, log_probs: dict[str, Any] | None, reason: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"index": index, "message": message, "logprobs": log_probs, "finish_reason": reason}


def chat_delta(
    index: int, delta: dict[str, Any], log_probs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason}


def for_training(token_ids: Sequence[int], log_probs: Sequence[float], versions: Sequence[str]) -> dict[str, Any]:
    """The extra fields of a choice, one entry per new token."""
    return {"token_ids": list(token_ids), "token_logprobs": list(log_probs), "weight_versions": list(versions)}


def completion_log_probs(tokenizer: Tokenizer, token_ids: Sequence[int], log_probs: Sequence[float]) -> dict[str, Any]:
    texts = [tokenizer.decode([token]) for token in token_ids]
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
    return {"tokens": texts, "token_logprobs": list(log_probs), "top_logprobs": None, "text_offset": offsets}


def chat_log_probs(tokenizer: Tokenizer, token_ids: Sequence[int], log_probs: Sequence[float]) -> dict[str, Any]:
    content = []
    for token, log_prob in zip(token_ids, log_probs, strict=True):
        text = tokenizer.decode([token])
        content.append({"token": text, "logprob": log_prob, "bytes": list(text.encode()), "top_logprobs": []})
    return {"content": content, "refusal": None}


def usage(num_prompt: int, generations: Sequence[Generation]) -> dict[str, Any]:
    """Prompt tokens count once for each prompt, however many choices it has."""
    new = sum(len(generation.token_ids) for generation in generations)
    cached = max((generation.cached_tokens for generation in generations), default=0)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": new,
        "total_tokens": num_prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def sglang_reply(
    text: str, num_prompt: int, generation: Generation, version: str, *, with_routes: bool
) -> dict[str, Any]:
    pairs = zip(generation.log_probs, generation.token_ids, strict=True)
    meta: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(generation.token_ids),
        "cached_tokens": generation.cached_tokens,
        "finish_reason": {"type": generation.finish_reason},
        "weight_version": version,
        "weight_versions": generation.weight_versions,
        "output_token_logprobs": [[log_prob, token, None] for log_prob, token in pairs],
    }
    if with_routes and generation.routed_experts is not None:
        flat = np.ascontiguousarray(generation.routed_experts, dtype=np.int32)
        meta["routed_experts"] = base64.b64encode(flat.tobytes()).decode()
    return {"text": text, "output_ids": generation.token_ids, "meta_info": meta}
