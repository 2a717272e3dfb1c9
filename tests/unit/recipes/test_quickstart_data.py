from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PREPARE = Path(__file__).parents[3] / "recipes" / "quickstart" / "prepare.py"


def load_prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_prepare", PREPARE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


prepare = load_prepare()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    prepare.prepare(folder, seed=0)
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def operands(question: str) -> tuple[int, ...]:
    """The two numbers of a question, smaller first."""
    return tuple(sorted(int(number) for number in re.findall(r"\d+", question)))


def every_problem() -> tuple[np.ndarray, np.ndarray]:
    """Operand grids of the whole task, as a reference that shares no code with `prepare`."""
    first, second = np.meshgrid(np.arange(100, 1000), np.arange(100, 1000), indexing="ij")
    carries = (first % 10 + second % 10 >= 10) | (first % 100 + second % 100 >= 100)
    return first[carries], second[carries]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_teacher_carries_when_careful_and_drops_every_carry_when_careless():
    problem, rng = prepare.Problem(457, 386), random.Random(0)
    assert problem.solution(rng, forget=0.0) == "7+6=13 5+8+1=14 4+3+1=08 \\boxed{843}"
    assert problem.solution(rng, forget=1.0) == "7+6=13 5+8+0=13 4+3+0=07 \\boxed{733}"
    assert prepare.Problem(999, 999).solution(rng, forget=0.0) == "9+9=18 9+9+1=19 9+9+1=19 \\boxed{1998}"


def test_a_careful_teacher_is_always_right():
    for problem in islice(prepare.draw_problems("train", random.Random(1)), 2000):
        total = problem.first + problem.second
        assert problem.label == str(total)
        assert problem.solution(random.Random(0), forget=0.0).endswith(f" \\boxed{{{total}}}")


def test_forgetting_is_drawn_for_each_carry_and_only_there():
    """457+386 carries twice, 457+312 never, so the four and the one outcomes below are all there are."""
    rng = random.Random(0)
    counts = Counter(prepare.Problem(457, 386).solution(rng, forget=0.25)[-5:-1] for _ in range(4000))
    expected = {"{843": 0.75 * 0.75, "{743": 0.75 * 0.25, "{833": 0.25 * 0.75, "{733": 0.25 * 0.25}
    assert counts.keys() == expected.keys()
    for answer, share in expected.items():
        assert counts[answer] / 4000 == pytest.approx(share, abs=5 * (share * (1 - share) / 4000) ** 0.5)
    assert {prepare.Problem(457, 312).solution(rng, forget=0.5)[-5:-1] for _ in range(50)} == {"{769"}


def test_imitating_the_teacher_is_right_in_three_of_ten(output: Path):
    rows = read_rows(output / "sft.jsonl")
    assert len(rows) == 25_600
    right = [row["prompt"][1]["content"].endswith(f"\\boxed{{{row['label']}}}") for row in rows]
    assert sum(right) / len(right) == pytest.approx(0.30, abs=0.02)
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["user", "assistant"]


def test_labels_are_the_sums_of_their_questions(output: Path):
    for name, own_reward in (("train.jsonl", None), ("heldout.jsonl", {"rm_type": "boxed_exact"})):
        for row in read_rows(output / name):
            assert row.keys() - {"metadata"} == {"prompt", "label"}
            assert row.get("metadata") == own_reward
            assert row["label"] == str(sum(operands(row["prompt"])))


def test_a_problem_is_on_one_side_whichever_way_round_it_is_asked():
    first, second = every_problem()
    chosen = first * second % 13 == 1
    heldout = set(zip(first[chosen].tolist(), second[chosen].tolist(), strict=True))
    assert heldout == {(b, a) for a, b in heldout}
    for side in ("train", "heldout"):
        for problem in islice(prepare.draw_problems(side, random.Random(2)), 1000):
            assert ((problem.first, problem.second) in heldout) == (side == "heldout")
            assert prepare.Problem(problem.second, problem.first).side == problem.side == side


def test_heldout_prompts_are_many_unique_and_never_trained_on(output: Path):
    heldout = [operands(row["prompt"]) for row in read_rows(output / "heldout.jsonl")]
    trained = {operands(row["prompt"]) for row in read_rows(output / "train.jsonl")}
    shown = {operands(row["prompt"][0]["content"]) for row in read_rows(output / "sft.jsonl")}
    assert len(set(heldout)) == len(heldout) == 256
    assert len(trained) == 4096
    assert not set(heldout) & (trained | shown)


def test_no_constant_answer_scores_a_tenth(output: Path):
    sums = Counter(row["label"] for row in read_rows(output / "heldout.jsonl"))
    assert sums.most_common(1)[0][1] / 256 <= 0.1
    first, second = every_problem()
    for on_side in (first * second % 13 == 1, first * second % 13 != 1):
        assert np.bincount((first + second)[on_side]).max() / on_side.sum() <= 0.01


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(output: Path, tmp_path: Path):
    for folder, seed in (("again", 0), ("other", 1)):
        prepare.make_checkpoint(tmp_path / folder, seed)
    again, other, first = digests(tmp_path / "again"), digests(tmp_path / "other"), digests(output / "model")
    assert again == first
    assert {name for name in first if other[name] != first[name]} == {"model.safetensors"}
    assert prepare.make_sft_rows(300, seed=0) == read_rows(output / "sft.jsonl")[:300]
    assert prepare.make_prompt_rows("heldout", 256, seed=0) == read_rows(output / "heldout.jsonl")
    assert prepare.make_sft_rows(300, seed=1) != prepare.make_sft_rows(300, seed=0)
    assert prepare.make_prompt_rows("train", 300, seed=1) != prepare.make_prompt_rows("train", 300, seed=0)


def test_the_tokenizer_gives_back_all_printable_text(output: Path):
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    printable = "".join(chr(code) for code in range(32, 127)) + "\n"
    for text in (printable, "a  b ,c 's\n\n", "7+6=13 5+8+1=14 4+3+1=08 \\boxed{843}<|im_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("\u00e9")["input_ids"] == [tokenizer.unk_token_id]
    assert max(tokenizer.get_vocab().values()) < prepare.make_config()["vocab_size"]


def test_the_chat_template_renders_chatml(output: Path):
    tokenizer = AutoTokenizer.from_pretrained(output / "model")
    conversation = read_rows(output / "sft.jsonl")[0]["prompt"]
    question, answer = (turn["content"] for turn in conversation)
    prompt = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == f"{prompt}{answer}<|im_end|>\n"
    assert len(tokenizer(prompt)["input_ids"]) == 17
    assert len(tokenizer(answer + "<|im_end|>")["input_ids"]) <= 32
    assert tokenizer.eos_token_id == tokenizer("<|im_end|>")["input_ids"][0]


def test_transformers_loads_the_checkpoint_and_finds_every_tensor_in_its_place(output: Path):
    model, report = AutoModelForCausalLM.from_pretrained(output / "model", output_loading_info=True)
    assert not any(report.values())
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    written = prepare.make_weights(prepare.make_config(), seed=0)
    gate = written["model.layers.1.mlp.experts.5.gate_proj.weight"]
    up = written["model.layers.1.mlp.experts.5.up_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.experts.gate_up_proj[5], torch.cat([gate, up]))
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(w.numel() for w in written.values())
    assert model.generation_config.eos_token_id == [2, 0]


def test_random_matrices_keep_the_size_of_what_flows_through_them():
    """A vector of unit variance comes out with unit variance, whatever the shape; norms start at 1."""
    for name, weight in prepare.make_weights(prepare.make_config(), seed=0).items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert weight.std().item() * weight.shape[1] ** 0.5 == pytest.approx(
                1, abs=5 / (2 * weight.numel()) ** 0.5
            ), name
