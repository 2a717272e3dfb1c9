"""Makes everything the quickstart trains on: a small Qwen3-MoE checkpoint, a tokenizer, and three data files.

The task is adding two three-digit numbers column by column, carrying as one goes:

    What is 457+386?    ->    7+6=13 5+8+1=14 4+3+1=08 \\boxed{843}

`sft.jsonl` holds demonstrations of a *sloppy teacher*, who forgets each carry with probability `FORGET` (and writes
`+0` where `+1` belongs). Whoever imitates the teacher can add, and is as careless as the teacher. `train.jsonl` and
`heldout.jsonl` hold questions and answers only: reinforcement learning has to find out by itself, from right and wrong
final answers, that carries are worth remembering.

    python recipes/quickstart/prepare.py --output runs/quickstart/data --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

Side = Literal["train", "heldout"]

FORGET = 0.6
"""How likely the teacher forgets one carry; three in ten of its answers are then right."""

HELDOUT_REWARD = "boxed_exact"
"""Written into the held-out rows, so that they are judged right or wrong whatever reward the training gets."""

NUM_SFT_ROWS, NUM_TRAIN_ROWS, NUM_HELDOUT_ROWS = 25_600, 4096, 256

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
WORDS = ["assistant", "system", "user", "What is ", "\\boxed{"]
CHARACTERS = ["\n", *(chr(code) for code in range(ord(" "), ord("~") + 1))]

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Problem:
    """One addition of two three-digit numbers."""

    first: int
    second: int

    @property
    def side(self) -> Side:
        """Training or held-out, read off the operands: the same sum, either way round, is never on both sides.

        13 is coprime to 10, so which side a problem is on says nothing about its digits.
        """
        return "heldout" if self.first * self.second % 13 == 1 else "train"

    @property
    def carries(self) -> int:
        """How many carries the teacher can forget: the one into the tens and the one into the hundreds."""
        units = self.first % 10 + self.second % 10 >= 10
        tens = self.first % 100 + self.second % 100 >= 100
        return units + tens

    @property
    def question(self) -> str:
        return f"What is {self.first}+{self.second}?"

    @property
    def label(self) -> str:
        return str(self.first + self.second)

    def solution(self, rng: random.Random, forget: float) -> str:
        """Adds the columns from the right; each carry is forgotten with probability `forget`."""
        columns, answer, carry = [], 0, 0
        for place in range(3):
            upper, lower = self.first // 10**place % 10, self.second // 10**place % 10
            if carry and rng.random() < forget:
                carry = 0
            total = upper + lower + carry
            columns.append(f"{upper}+{lower}+{carry}={total:02}" if place else f"{upper}+{lower}={total:02}")
            answer += total % 10 * 10**place
            carry = total // 10
        return f"{' '.join(columns)} \\boxed{{{carry * 1000 + answer}}}"


def draw_problems(side: Side, rng: random.Random) -> Iterator[Problem]:
    """Endless problems of one side with at least one carry."""
    while True:
        problem = Problem(rng.randint(100, 999), rng.randint(100, 999))
        if problem.side == side and problem.carries:
            yield problem


def make_prompt_rows(side: Side, num_rows: int, seed: int) -> list[dict[str, Any]]:
    """Questions with labels, no problem twice (nor with its operands swapped)."""
    problems: dict[frozenset[int], Problem] = {}
    draws = draw_problems(side, random.Random(f"{side} {seed}"))
    while len(problems) < num_rows:
        problem = next(draws)
        problems.setdefault(frozenset((problem.first, problem.second)), problem)
    own_reward = {"metadata": {"rm_type": HELDOUT_REWARD}} if side == "heldout" else {}
    return [{"prompt": problem.question, "label": problem.label, **own_reward} for problem in problems.values()]


def make_sft_rows(num_rows: int, seed: int, forget: float = FORGET) -> list[dict[str, Any]]:
    """Demonstrations of the sloppy teacher as conversations, on training problems only."""
    rng = random.Random(f"sft {seed}")
    return [
        {
            "prompt": [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": problem.solution(rng, forget)},
            ],
            "label": problem.label,
        }
        for problem in islice(draw_problems("train", rng), num_rows)
    ]


def make_tokenizer() -> Tokenizer:
    """One token per printable ASCII character and per word of `WORDS`; anything else is `<|unk|>`."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS + WORDS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    pieces = "|".join(re.escape(word) for word in WORDS) + r"|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def make_config() -> dict[str, Any]:
    """The shape of the model, in the words of HF's `config.json`."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 128,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 192,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": 0.1,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "torch_dtype": "float32",
    }


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint by its HF name."""
    hidden, head, expert = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, queries),
            f"{prefix}self_attn.q_norm.weight": (head,),
            f"{prefix}self_attn.k_norm.weight": (head,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.gate.weight": (config["num_experts"], hidden),
        }
        for number in range(config["num_experts"]):
            shapes |= {
                f"{prefix}mlp.experts.{number}.gate_proj.weight": (expert, hidden),
                f"{prefix}mlp.experts.{number}.up_proj.weight": (expert, hidden),
                f"{prefix}mlp.experts.{number}.down_proj.weight": (hidden, expert),
            }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}


def make_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random weights: norms are 1, matrices keep the variance of what flows through them (std `fan_in ** -0.5`)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in weight_shapes(config).items()
    }


def make_checkpoint(folder: Path, seed: int) -> None:
    """Writes an HF checkpoint with random weights: config, weights, tokenizer, generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config()
    write_json(folder / "config.json", config)
    save_file(make_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<|unk|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    ends = [config["eos_token_id"], config["pad_token_id"]]
    write_json(
        folder / "generation_config.json",
        {"do_sample": True, "temperature": 1.0, "eos_token_id": ends, "pad_token_id": config["pad_token_id"]},
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(output: Path, seed: int) -> None:
    """Writes `model/`, `sft.jsonl`, `train.jsonl` and `heldout.jsonl` under `output`; the same seed, the same bytes."""
    make_checkpoint(output / "model", seed)
    write_rows(output / "sft.jsonl", make_sft_rows(NUM_SFT_ROWS, seed))
    write_rows(output / "train.jsonl", make_prompt_rows("train", NUM_TRAIN_ROWS, seed))
    write_rows(output / "heldout.jsonl", make_prompt_rows("heldout", NUM_HELDOUT_ROWS, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's checkpoint, tokenizer and data.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    options = parser.parse_args()
    prepare(options.output, options.seed)


if __name__ == "__main__":
    main()
