"""Options whose effect shows only in a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from e2e_runs import Workshop, read_metrics, run

OWN = '''
import json
from pathlib import Path

from lockstep.types import RolloutFnEvalOutput, Sample


class Files:
    """A data source as slime has them: built from args, without ids, with files of its own."""

    def __init__(self, args):
        self.args, self.position, self.buffer = args, 0, []

    def get_samples(self, num_samples):
        groups = []
        for _ in range(num_samples):
            prompt = f"{self.position} + {self.args.addend} ="
            groups.append([Sample(prompt=prompt, label="0") for _ in range(self.args.n_samples_per_prompt)])
            self.position += 1
        return groups

    def add_samples(self, groups):
        raise NotImplementedError

    def file(self, rollout_id):
        return Path(f"{self.args.save}-source-{rollout_id}")

    def save(self, rollout_id):
        self.file(rollout_id).write_text(str(self.position))

    def load(self, rollout_id=None):
        self.position = int(self.file(rollout_id).read_text())


async def generate_rollout(args, rollout_id, data_source, evaluation=False):
    if evaluation:
        return RolloutFnEvalOutput({"own": {"rewards": [0.25, 0.75]}})
    from lockstep.rollout.generate import generate_rollout

    return await generate_rollout(args, rollout_id, data_source)


def random_reward(args, sample):
    return float(sample.index % 2)


def log_seeded(rollout_id, args, samples, extra_metrics, rollout_time):
    import random

    import numpy as np
    import torch

    print("drawn", random.random(), np.random.rand(), torch.rand(()).item(), args.wandb_key)
    return False
'''


def own(tmp_path: Path, name: str) -> str:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return f"{path}:{name}"


def test_evaluation_needs_neither_prompts_nor_a_length(workshop: Workshop, tmp_path: Path):
    options = workshop.train(
        tmp_path, prompt_data=None, num_rollout=None, eval_prompt_data=["held", workshop.heldout], rollout_shuffle=None
    )
    done = run("eval", *options[1:])
    assert "eval/held " in done.stdout


def test_a_run_whose_rewards_teach_nothing_says_so_once_in_ten_steps(workshop: Workshop, tmp_path: Path):
    own_reward = tmp_path / "reward.py"
    own_reward.write_text("def always_one(args, sample):\n    return 1.0\n")
    options = {"custom_rm_path": f"{own_reward}:always_one", "num_rollout": 3}
    done = run(*workshop.train(tmp_path / "silent", **options))
    assert done.stdout.count("every advantage of this step is 0") == 1
    done = run(*workshop.train(tmp_path / "telling", num_rollout=1))
    assert "every advantage" not in done.stdout


def test_stored_rollouts_are_trained_on_without_prompts_or_optimizer_state(workshop: Workshop, tmp_path: Path):
    stored = str(tmp_path / "stored" / "{rollout_id}.pt")
    evaluated = {"eval_prompt_data": ["held", workshop.heldout], "eval_interval": 2}
    run(*workshop.train(tmp_path / "a", save_debug_rollout_data=stored, **evaluated))
    names = sorted(path.name for path in (tmp_path / "stored").iterdir())
    assert names == ["0.pt", "1.pt", "eval_-1.pt", "eval_1.pt"]
    alone = {"prompt_data": None, "load_debug_rollout_data": stored, "save": tmp_path / "ckpt", "save_interval": 1}
    written = str(tmp_path / "written" / "{rollout_id}.pt")
    run(*workshop.train(tmp_path / "b", **alone, no_save_optim=True, save_debug_train_data=written))
    first = tmp_path / "ckpt" / "rollout_0000000"
    assert json.loads((first / "state.json").read_text())["with_optimizer"] is False
    assert len(torch.load(written.format(rollout_id=1), weights_only=False)) == 12
    metrics = [row for row in read_metrics(tmp_path / "a") if "train/loss" in row]
    again = read_metrics(tmp_path / "b")
    assert [row["train/grad_norm"] for row in again] == [row["train/grad_norm"] for row in metrics]
    done = run(*workshop.train(tmp_path / "b", **alone, load=first))
    assert "holds no optimizer state (--no-save-optim): the moments start at zero" in done.stderr


def test_a_data_source_of_slimes_kind_resumes_where_it_was(workshop: Workshop, tmp_path: Path):
    (tmp_path / "values.yaml").write_text("addend: 7")
    options = {
        "prompt_data": None,
        "data_source_path": own(tmp_path, "Files"),
        "custom_rm_path": own(tmp_path, "random_reward"),
        "custom_config_path": tmp_path / "values.yaml",
        "save_interval": 1,
        "rollout_shuffle": None,
    }
    whole = {"save": tmp_path / "whole", "num_rollout": 3}
    parts = {"save": tmp_path / "parts", "load": tmp_path / "parts"}
    run(*workshop.train(tmp_path / "a", **options, **whole))
    run(*workshop.train(tmp_path / "b", **options, **parts, num_rollout=2))
    run(*workshop.train(tmp_path / "b", **options, **parts, num_rollout=3))
    assert len(read_metrics(tmp_path / "b")) == 3
    assert read_metrics(tmp_path / "b") == read_metrics(tmp_path / "a")
    assert Path(f"{tmp_path / 'parts'}-source-2").read_text() == "9"


def test_a_rollout_function_evaluates_too_and_the_seed_is_the_users(workshop: Workshop, tmp_path: Path):
    def drawn(seed: int) -> list[str]:
        options = {
            "rollout_function_path": own(tmp_path, "generate_rollout"),
            "custom_rollout_log_function_path": own(tmp_path, "log_seeded"),
            "eval_prompt_data": ["held", workshop.heldout],
            "num_rollout": 1,
            "wandb_key": "s3cret",
            "seed": seed,
        }
        done = run(*workshop.train(tmp_path / str(seed), **options))
        assert "s3cret" not in done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("drawn")]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert len(first) == 1
    assert first[0].endswith("***")
    assert first == again != other
    assert read_metrics(tmp_path / "1")[-1]["eval/own"] == 0.5
