"""Options: declared once as typed fields, read from recipes and flags, handed out as frozen groups."""

from lockstep.config.args import Args
from lockstep.config.config import Config
from lockstep.config.machine import ClusterOptions, ParallelOptions, SglangOptions, WeightSyncOptions
from lockstep.config.model import CheckpointOptions, ModelOptions
from lockstep.config.observing import DebugOptions, LoggingOptions
from lockstep.config.rollout import DataOptions, EvalOptions, RewardOptions, RolloutOptions
from lockstep.config.training import AlgorithmOptions, BatchingOptions, OptimizerOptions

__all__ = [
    "AlgorithmOptions",
    "Args",
    "BatchingOptions",
    "CheckpointOptions",
    "ClusterOptions",
    "Config",
    "DataOptions",
    "DebugOptions",
    "EvalOptions",
    "LoggingOptions",
    "ModelOptions",
    "OptimizerOptions",
    "ParallelOptions",
    "RewardOptions",
    "RolloutOptions",
    "SglangOptions",
    "WeightSyncOptions",
]
