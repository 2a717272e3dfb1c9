"""Lockstep: reinforcement-learning post-training where sampler and trainer share one set of weights."""

__version__ = "0.1.0"
