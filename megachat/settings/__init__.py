"""The settings of a run by section, frozen and strict, each with its default, bounds and meaning."""

from megachat.settings.execution import ParallelConfig, PrecisionConfig, ReliabilityConfig
from megachat.settings.model import LookupConfig, ModelConfig, NgramConfig
from megachat.settings.results import CheckpointConfig, EvaluateConfig, LogConfig, RunConfig
from megachat.settings.training import BatchConfig, DataConfig, HorizonConfig, OptimizerConfig

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvaluateConfig",
    "HorizonConfig",
    "LogConfig",
    "LookupConfig",
    "ModelConfig",
    "NgramConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "ReliabilityConfig",
    "RunConfig",
]
