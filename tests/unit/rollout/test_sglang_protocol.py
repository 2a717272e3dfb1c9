"""What is sent to SGLang's servers, and what of their answers is believed. Real servers: tests/sglang."""

from __future__ import annotations

import base64
import copy
from typing import Any

import numpy as np
import pytest

from lockstep.config.parsing import parse_options
from lockstep.errors import OptionError
from lockstep.rollout.engine import SamplingParams
from lockstep.rollout.sglang import require_known, server_words
from lockstep.rollout.sglang.protocol import GarbageAnswer, generate_payload, read_generation, sampling_seed

SEED_30B_ON_24_GPUS = """
    --sglang-mem-fraction-static 0.7 --sglang-enable-dp-attention --sglang-dp-size 3 --sglang-ep-size 24
    --sglang-enable-dp-lm-head --sglang-moe-dense-tp-size 1 --sglang-ep-num-redundant-experts 16
    --sglang-cuda-graph-bs 1 2 4 8 16 24
"""
SEED_NEXT = """
    --sglang-ep-size 8 --sglang-max-running-requests 256 --sglang-speculative-algorithm EAGLE
    --sglang-speculative-num-steps 3 --sglang-speculative-eagle-topk 1 --sglang-speculative-num-draft-tokens 4
"""


def words_of(options: str, tp_size: int = 8) -> list[str]:
    config = parse_options("train", ["--hf-checkpoint", "model", *options.split()]).config
    return server_words(config.sglang.server_args, tp_size=tp_size)


@pytest.mark.parametrize("options", [SEED_30B_ON_24_GPUS, SEED_NEXT], ids=["30b", "next"])
def test_options_of_the_seed_recipes_reach_the_server_word_for_word(options: str) -> None:
    assert words_of(options) == options.replace("--sglang-", "--").split()


def test_a_switch_that_is_off_is_left_out() -> None:
    assert words_of("--sglang-enable-metrics false --sglang-log-level info") == ["--log-level", "info"]


def test_an_option_that_sglang_has_renamed_is_translated_and_said(caplog: pytest.LogCaptureFixture) -> None:
    assert words_of("--sglang-enable-ep-moe") == ["--ep-size", "8"]
    assert words_of("--sglang-enable-ep-moe --sglang-ep-size 4") == ["--ep-size", "4"]
    assert "--sglang-enable-ep-moe is gone from SGLang; it is read as --sglang-ep-size 8." in caplog.text


def test_arguments_that_lockstep_gives_are_refused() -> None:
    with pytest.raises(OptionError, match="Use --rollout-num-gpus-per-engine"):
        words_of("--sglang-tp-size 2")


def test_an_argument_that_the_installed_server_has_not_got_is_refused_before_it_starts() -> None:
    flags = frozenset({"--ep-size", "--dp-size", "--model-path"})
    require_known(["--ep-size", "8"], flags)
    with pytest.raises(OptionError, match="Did you mean --sglang-dp-size"):
        require_known(["--ep-size", "8", "--dp-sise", "2"], flags)


def test_a_request_says_all_that_is_asked_for() -> None:
    params = SamplingParams(
        max_new_tokens=7, temperature=0.5, stop=("x",), stop_token_ids=(2, 3), min_new_tokens=1, top_k=5, top_p=0.9
    )
    body = generate_payload([1, 2], params, rid="r", seed=9, routed_experts=True)
    assert body["input_ids"] == [1, 2]
    assert (body["rid"], body["return_logprob"], body["return_routed_experts"]) == ("r", True, True)
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "max_new_tokens": 7, "min_new_tokens": 1}
    wanted |= {"stop": ["x"], "stop_token_ids": [2, 3], "sampling_seed": 9, "no_stop_trim": True}
    assert body["sampling_params"].items() >= wanted.items()


def test_seeds_depend_on_the_stream_and_the_run() -> None:
    seeds = {sampling_seed(run, (0, 0, group, index)) for run in (1, 2) for group in range(9) for index in range(9)}
    assert len(seeds) == 2 * 81
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sampling_seed(1, (0, 3)) == sampling_seed(1, (0, 3))


ROUTES = np.arange(4 * 2 * 2, dtype=np.int32).reshape(4, 2, 2)
REPLY: dict[str, Any] = {
    "text": "ab",
    "output_ids": [5, 6],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 6},
        "weight_version": "3",
        "cached_tokens": 1,
        "output_token_logprobs": [[-0.5, 5, None], [-1.5, 6, None]],
        "routed_experts": base64.b64encode(ROUTES.tobytes()).decode(),
    },
}


def read(reply: Any) -> Any:
    return read_generation(reply, num_prompt=3, max_new_tokens=4, routes_shape=(2, 2))


def test_an_answer_is_read_token_by_token() -> None:
    generation = read(REPLY)
    assert (generation.token_ids, generation.log_probs) == ([5, 6], [-0.5, -1.5])
    assert (generation.weight_versions, generation.finish_reason, generation.cached_tokens) == (["3", "3"], "stop", 1)
    assert generation.routed_experts.tolist() == ROUTES.tolist()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["meta_info"], None),
        (["output_ids"], [5]),
        (["output_ids"], [5, 7]),
        (["meta_info", "finish_reason"], None),
        (["meta_info", "finish_reason", "type"], "bored"),
        (["meta_info", "weight_version"], ...),
        (["meta_info", "output_token_logprobs"], None),
        (["meta_info", "output_token_logprobs", 0, 0], float("nan")),
        (["meta_info", "output_token_logprobs", 0, 0], 0.5),
        (["meta_info", "output_token_logprobs", 0, 0], None),
        (["meta_info", "routed_experts"], None),
        (["meta_info", "routed_experts"], base64.b64encode(ROUTES[:3].tobytes()).decode()),
    ],
)
def test_an_answer_that_lacks_something_or_contradicts_itself_is_garbage(path: list[Any], value: Any) -> None:
    reply = copy.deepcopy(REPLY)
    place = reply
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(GarbageAnswer):
        read(reply)


@pytest.mark.parametrize("reply", [None, [], "text", {}, {"error": {"message": "no"}}])
def test_what_is_no_answer_at_all_is_garbage(reply: Any) -> None:
    with pytest.raises(GarbageAnswer):
        read(reply)
