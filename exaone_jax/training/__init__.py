"""Training: loss, optimizer, the step."""

from exaone_jax.training.loss import LossConfig, LossMetrics
from exaone_jax.training.optimizer import Optimizer, adamw, cosine, muon, wsd
from exaone_jax.training.step import Evaluation, TrainState, evaluate, init_state, train_step

__all__ = [
    "Evaluation",
    "LossConfig",
    "LossMetrics",
    "Optimizer",
    "TrainState",
    "adamw",
    "cosine",
    "evaluate",
    "init_state",
    "muon",
    "train_step",
    "wsd",
]
