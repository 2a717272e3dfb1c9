"""AdamW with compact, offloadable state, and Megatron's learning-rate schedules."""

from lockstep.trainer.optimizer.optimizer import Optimizer
from lockstep.trainer.optimizer.schedule import learning_rate

__all__ = ["Optimizer", "learning_rate"]
