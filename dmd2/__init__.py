"""DMD2 (Improved Distribution Matching Distillation, arXiv 2405.14867): training, sampling and evaluation."""

__version__ = "0.1.0"
