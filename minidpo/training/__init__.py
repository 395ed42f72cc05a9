"""What the two scripts train with: run.py (a run's directory, log and signals), step.py (one micro-batch),
and the rest."""

# ruff: noqa: F401  (these names are imported from here)
from minidpo.training.evaluate import SampledEvaluation
from minidpo.training.optim import adamw, learning_rate
from minidpo.training.pairs import load_run_pairs
from minidpo.training.reference import with_reference_logps
from minidpo.training.reference_point import ReferencePoint
from minidpo.training.run import Run
from minidpo.training.step import pair_logps, pair_rewards
