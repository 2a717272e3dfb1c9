"""What a run will take of GPU and host memory, before anything starts; and what it took."""

from lockstep.plan.hardware import Hardware
from lockstep.plan.predict import Prediction, predict

__all__ = ["Hardware", "Prediction", "predict"]
