"""`lockstep serve` as a process, asked by OpenAI's own client; and rollouts against the policy in training."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from e2e_runs import Workshop, finish, hook, read_metrics, run, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from lockstep.cli import main

MESSAGES: Any = [{"role": "user", "content": "3 + 4 ="}]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[openai.OpenAI, subprocess.Popen[str]]]:
    process = start("serve", str(folder), "--port", "0", "--device", "cpu", "--params-dtype", "float32")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("serving "), (line, process.stderr and process.stderr.read())
    assert process.stdout.readline().startswith("try: curl http://127.0.0.1:")
    with openai.OpenAI(base_url=line.split()[3] + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        try:
            yield client, process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            done = finish(process)
            assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


@pytest.fixture(scope="module")
def client(workshop: Workshop) -> Iterator[openai.OpenAI]:
    with serving(workshop.model) as (client, _):
        yield client


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (only,) = client.models.list().data
    return only.id


def test_a_chat_is_answered_with_the_log_probs_of_transformers(client, model, workshop):
    """fp32: the same model, another program; 1e-4 is far below what another token or temperature would change."""
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=12, temperature=0.7, seed=1, logprobs=True
    )
    (choice,) = answer.choices
    extra = choice.model_extra
    tokenizer = AutoTokenizer.from_pretrained(workshop.model)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert extra["prompt_token_ids"] == prompt
    assert choice.message.content == tokenizer.decode(extra["token_ids"], skip_special_tokens=True)
    theirs = AutoModelForCausalLM.from_pretrained(workshop.model, dtype=torch.float32)
    with torch.inference_mode():
        logits = theirs(torch.tensor([prompt + extra["token_ids"]])).logits[0, len(prompt) - 1 : -1]
    wanted = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(extra["token_ids"])[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(extra["token_logprobs"]), wanted, atol=1e-4, rtol=0)
    assert [entry.logprob for entry in choice.logprobs.content] == extra["token_logprobs"]
    assert answer.model_extra["weight_version"] == "0"
    assert answer.usage.prompt_tokens == len(prompt)


def test_a_stream_is_the_whole_answer_in_pieces(client, model):
    ask = {"model": model, "messages": MESSAGES, "max_tokens": 20, "seed": 3, "n": 2}
    whole = client.chat.completions.create(**ask)
    texts, tokens = ["", ""], [[], []]
    usage = None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.model_extra.get("token_ids", [])
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.model_extra["token_ids"] for choice in whole.choices]
    assert texts[0] != texts[1]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_a_completion_ends_at_a_stop_string_and_names_its_tokens(client, model):
    ask = {"model": model, "prompt": "3 + 4", "max_tokens": 30, "seed": 5}
    free = client.completions.create(**ask, logprobs=0).choices[0]
    stop = free.logprobs.tokens[4]
    stopped = client.completions.create(**ask, stop=[stop]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text.partition(stop)[0]
    assert free.logprobs.token_logprobs == free.model_extra["token_logprobs"]


def test_errors_are_those_of_openais_client(client, model):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.post("/chat/completions", body={"model": model}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="temperature must be a number") as error:
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "3 " * 200}])
    assert error.value.code == "context_length_exceeded"


def test_a_taken_port_or_a_folder_without_a_model_is_refused_before_anything_is_loaded(
    client, workshop, tmp_path, capsys
):
    assert main(["serve", str(workshop.model), "--port", str(client.base_url.port), "--device", "cpu"]) == 2
    assert f"--port is {client.base_url.port}: it cannot be opened on 127.0.0.1" in capsys.readouterr().err
    assert main(["serve", str(tmp_path)]) == 1
    assert "there is no model" in capsys.readouterr().err


def test_agents_roll_out_over_http_against_the_policy_in_training_whose_checkpoint_is_served_later(workshop, tmp_path):
    """Parity of every step says that the log-probs over HTTP are those of the weights that were trained next."""
    done = run(
        *workshop.train(
            tmp_path / "run",
            custom_generate_function_path=hook("over_http"),
            sglang_router_port=0,
            use_rollout_routing_replay=True,
            logprob_diff_limit=1e-5,
            save=tmp_path / "checkpoints",
            save_hf=tmp_path / "hf",
        ),
        env={"NO_PROXY": "127.0.0.1"},
    )
    assert "the policy answers at http://127.0.0.1:" in done.stderr
    rows = read_metrics(tmp_path / "run")
    assert [row["train/logprob_diff_unexplained"] for row in rows] == [0, 0]
    assert all(0 < row["train/train_rollout_logprob_abs_diff"] < 1e-5 for row in rows)
    ask = {"prompt": "3 + 4", "max_tokens": 30, "temperature": 0}
    with serving(tmp_path / "checkpoints") as (client, process):
        answer = client.completions.create(model="model", **ask)
        stream = client.completions.create(model="model", prompt="3 + 4", max_tokens=100, stream=True)
        next(stream)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, "Ctrl-C ends it in the midst of a stream"
        stream.close()
    assert answer.model_extra["weight_version"] == "2"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    (choice,) = answer.choices
    prompt = torch.tensor([choice.model_extra["prompt_token_ids"]])
    wanted = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    assert choice.model_extra["token_ids"] == wanted[0, prompt.shape[1] :].tolist()
