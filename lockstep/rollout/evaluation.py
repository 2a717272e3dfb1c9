"""Held-out sets: what `--eval-prompt-data` or `--eval-config` describe, with the rollout's options as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.config import Config
from lockstep.data import load_eval_samples
from lockstep.data.prompts import PromptFormat
from lockstep.data.tokenizer import Tokenizer
from lockstep.errors import OptionError
from lockstep.types import Sample

_SETTINGS = {
    "rm_type", "custom_rm_path", "input_key", "label_key", "tool_key", "metadata_key", "n_samples_per_eval_prompt",
    "temperature", "top_p", "top_k", "max_response_len", "stop", "metadata_overrides",
}  # fmt: skip


@dataclass(frozen=True)
class EvalSet:
    """One held-out set, ready to sample."""

    name: str
    samples: list[Sample]
    sampling_params: dict[str, Any]
    max_context_len: int


def load_eval_sets(config: Config, tokenizer: Tokenizer, max_context_len: int) -> list[EvalSet]:
    """Every held-out set of the options, its prompts rendered.

    Args:
        max_context_len: what the model can hold. Training's own shorter limit does not cut evaluation, whose responses
            may be longer.

    Raises:
        OptionError: the list of names and paths, or the YAML file, is not as it should be.
        DataError: a file cannot be used.
    """
    return [_load(config, tokenizer, max_context_len, **described) for described in _described(config)]


def _described(config: Config) -> list[dict[str, Any]]:
    if config.eval.eval_config is None:
        pairs = config.eval.eval_prompt_data
        return [{"name": name, "path": path} for name, path in zip(pairs[::2], pairs[1::2], strict=True)]
    import yaml

    path = Path(config.eval.eval_config)
    if not path.is_file():
        raise OptionError("--eval-config", str(path), "there is no such file.", "Give a YAML file with eval.datasets.")
    try:
        content = yaml.safe_load(path.read_text())
        described = content["eval"]["datasets"]
        defaults = content["eval"].get("defaults") or {}
        merged = [{**defaults, **entry} for entry in described]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            "--eval-config", str(path), f"it has no list eval.datasets ({error}).", "Write eval: {datasets: [...]}."
        ) from error
    for entry in merged:
        unknown = sorted(set(entry) - _SETTINGS - {"name", "path"})
        missing = sorted({"name", "path"} - set(entry))
        if unknown or missing:
            raise OptionError(
                f"--eval-config {path}",
                (unknown or missing)[0],
                "a data set has this unknown setting." if unknown else "a data set lacks this setting.",
                f"Settings are name, path, {', '.join(sorted(_SETTINGS))}.",
            )
    return merged


def _load(config: Config, tokenizer: Tokenizer, max_context_len: int, *, name: str, path: str, **own: Any) -> EvalSet:
    rollout, data, options = config.rollout, config.data, config.eval

    def first(key: str, *fallbacks: Any) -> Any:
        return next((value for value in (own.get(key), *fallbacks) if value is not None), None)

    prompt_format = PromptFormat(
        input_key=first("input_key", options.eval_input_key, data.input_key),
        label_key=first("label_key", options.eval_label_key, data.label_key),
        metadata_key=first("metadata_key", data.metadata_key),
        tool_key=first("tool_key", options.eval_tool_key, data.tool_key),
        apply_chat_template=data.apply_chat_template,
        apply_chat_template_kwargs=data.apply_chat_template_kwargs,
    )
    overrides = dict(own.get("metadata_overrides") or {})
    if own.get("rm_type"):
        overrides["rm_type"] = own["rm_type"]
    samples = load_eval_samples(
        path,
        tokenizer,
        prompt_format,
        n_samples_per_eval_prompt=first("n_samples_per_eval_prompt", options.n_samples_per_eval_prompt),
        eval_max_prompt_len=options.eval_max_prompt_len or rollout.rollout_max_prompt_len,
        skip_malformed_rows=data.skip_malformed_rows,
        metadata_overrides=overrides,
    )
    for sample in samples:
        sample.custom_rm_path = own.get("custom_rm_path")
    sampling_params = {
        "temperature": first("temperature", options.eval_temperature, rollout.rollout_temperature),
        "top_p": first("top_p", options.eval_top_p, rollout.rollout_top_p),
        "top_k": first("top_k", options.eval_top_k, rollout.rollout_top_k),
        "max_new_tokens": first("max_response_len", options.eval_max_response_len, rollout.rollout_max_response_len),
        "min_new_tokens": options.eval_min_new_tokens or 0,
        "stop": first("stop", rollout.rollout_stop),
        "stop_token_ids": rollout.rollout_stop_token_ids,
    }
    limit = options.eval_max_context_len or rollout.rollout_max_context_len or max_context_len
    return EvalSet(name, samples, sampling_params, min(limit, max_context_len))
