"""Where the ranks of a run live.

The controller runs the loop and decides; ranks hold weights and caches, and do the same at the same time. One rank
lives in the controller's own process, with nothing in between; several are processes of this machine (`WorkerGroup`).
Either way the loop sees a `TrainingEngine` and a `RolloutEngine`.

Nothing is imported here: a rank's process reads this first.
"""
