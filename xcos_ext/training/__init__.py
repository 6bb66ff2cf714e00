"""Training: an engine for any task, and the tasks of this package (docs/training.md)."""

from .engine import TrainResult, train
from .settings import ConfigError, TrainConfig
from .task import BatchIndex, Task, weight_decay_groups

__all__ = ["BatchIndex", "ConfigError", "Task", "TrainConfig", "TrainResult", "train", "weight_decay_groups"]
