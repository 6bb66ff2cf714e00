"""Training: an engine for any task, and the tasks of this package (docs/training.md)."""

from .config import TrainConfig
from .engine import TrainResult, train
from .seeds import BatchIndex
from .settings import ConfigError
from .task import Task, weight_decay_groups

__all__ = ["BatchIndex", "ConfigError", "Task", "TrainConfig", "TrainResult", "train", "weight_decay_groups"]
