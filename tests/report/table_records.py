"""The table files of the repository, and a metrics record as a measured row needs it."""

from pathlib import Path
from typing import Any

from dmd2.config.reading import load_preset
from dmd2.report.tables import load_table

ROOT = Path(__file__).parents[2]
PRESET = load_preset(ROOT / "workflow", "digits")
NUMBERS = range(1, 7)


def load(number: int):
    return load_table(ROOT / "workflow" / "tables" / f"table{number}.yaml")


def record(fid: float, **model: Any) -> dict[str, Any]:
    return {
        "metrics": {
            "fid": {"mean": fid, "sd": 0.0061, "blocks": [fid - 0.0061, fid, fid + 0.0061]},
            "pixel_fd": {"mean": 0.16, "sd": 0.01, "blocks": [0.15, 0.16, 0.17]},
            "accuracy": {"mean": 0.98, "sd": 0.001, "blocks": [0.98]},
            "nearest_distance": {"mean": 2.2701, "sd": 0.01, "blocks": [2.27]},
            "diversity": {"mean": 0.97, "sd": 0.01, "blocks": [0.97]},
        },
        "nfe": 1,
        "num_samples": 5391,
        "num_blocks": 3,
        "seed": 0,
        "protocols": {"edm": {"rounding": "round", "covariance_start": "zeros"}},
        "features": {"name": "classifier", "sha256": "ab" * 32, "reference": "data"},
        "model": {"run": "dmd2", "iterations": 2500, "generator_updates": 500, "checkpoint_step": 2500, **model},
        "provenance": {"digest": "0123456789abcdef", "commit": "feedbeef", "stage": "metrics"},
    }
