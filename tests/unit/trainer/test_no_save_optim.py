"""`--no-save-optim`: what comes back from a checkpoint without optimizer state."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_documents, tiny_dense

from lockstep.algorithms import SftLoss
from lockstep.checkpoint.training import read_state, save_checkpoint
from lockstep.config import BatchingOptions, OptimizerOptions
from lockstep.trainer.batch import TrainSample
from lockstep.trainer.local import LocalTrainer


def trainer(dtype: torch.dtype, *, with_reference: bool = False) -> LocalTrainer:
    return LocalTrainer(
        tiny_dense().to(dtype),
        reference=tiny_dense().to(dtype) if with_reference else None,
        loss=SftLoss(),
        optimizer=OptimizerOptions(lr=0.01, lr_decay_style="constant"),
        batching=BatchingOptions(),
        temperature=1.0,
        needs_entropy=False,
        routing="own",
        num_steps=10,
    )


def step(of: LocalTrainer) -> None:
    tokens = random_documents([12])[0]
    of.step([TrainSample(tokens=tokens, response_length=8, loss_mask=[1] * 8, loss_weight=1 / 8)])


def weights(of: LocalTrainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_starts_afresh_from_the_saved_weights(dtype, tmp_path):
    before, resumed, fresh = trainer(dtype), trainer(dtype), trainer(dtype)
    step(before)
    step(before)
    before.save(tmp_path, with_optimizer=False)
    step(resumed)
    resumed.load(tmp_path, with_optimizer=False)
    assert torch.equal(weights(resumed), weights(before))
    with torch.no_grad():
        for ours, theirs in zip(fresh.model.parameters(), before.model.parameters(), strict=True):
            ours.copy_(theirs)
    fresh.optimizer.restart()
    step(resumed)
    step(fresh)
    assert torch.equal(weights(resumed), weights(fresh))
    moments = dict(resumed.optimizer.named_state())
    assert int(moments["step"]) == 1


def test_a_reference_that_has_moved_is_saved_without_the_optimizer_too(tmp_path):
    before, resumed = trainer(torch.float32, with_reference=True), trainer(torch.float32, with_reference=True)
    step(before)
    before.update_reference()
    step(before)
    before.save(tmp_path, with_optimizer=False)
    resumed.load_state_dict(before.state_dict())
    resumed.load(tmp_path, with_optimizer=False)
    for ours, theirs in zip(resumed.reference.parameters(), before.reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(next(resumed.reference.parameters()), next(resumed.model.parameters()))


def test_the_checkpoint_is_a_third_of_the_size(tmp_path):
    of = trainer(torch.float32)
    step(of)
    sizes = []
    for rollout_id, with_optimizer in enumerate((True, False)):
        folder = save_checkpoint(
            tmp_path,
            rollout_id,
            state={"with_optimizer": with_optimizer},
            config_toml="",
            save_tensors=lambda path, with_optimizer=with_optimizer: of.save(path, with_optimizer=with_optimizer),
        )
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.distcp")))
    assert sizes[1] < 0.45 * sizes[0]
    assert read_state(folder)["with_optimizer"] is False
