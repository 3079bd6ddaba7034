"""The schema of presets and runs: keys, types, ranges and defaults. Does not import torch (used by the workflow).

Defaults are the paper's for ImageNet-64 (arXiv 2405.14867, appendix F.2) unless a comment says otherwise.
"""

from __future__ import annotations

from dmd2.config.base import Beta, Model, Precision, Seed, StudentWeights, WeightsFile
from dmd2.config.data import Captions, Data, Prompts
from dmd2.config.evaluation import ClipModel, Evaluation, Features, Latency, Pairs, Sampler
from dmd2.config.preset import Preset, Run, RunFile
from dmd2.config.teacher import (
    AnyTeacher,
    ComponentsTraining,
    DiffusersTeacherConfig,
    DiffusersTraining,
    ModelFolder,
    Network,
    OwnNetwork,
    TeacherConfig,
    TeacherTraining,
)
from dmd2.config.train import LoRA, Runtime, Train, largest_part

__all__ = [
    "AnyTeacher",
    "Beta",
    "Captions",
    "ClipModel",
    "ComponentsTraining",
    "Data",
    "DiffusersTeacherConfig",
    "DiffusersTraining",
    "Evaluation",
    "Features",
    "Latency",
    "LoRA",
    "Model",
    "ModelFolder",
    "Network",
    "OwnNetwork",
    "Pairs",
    "Precision",
    "Preset",
    "Prompts",
    "Run",
    "RunFile",
    "Runtime",
    "Sampler",
    "Seed",
    "StudentWeights",
    "TeacherConfig",
    "TeacherTraining",
    "Train",
    "WeightsFile",
    "largest_part",
]
