"""The original DMD's regression in LPIPS, whose network the user supplies, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import OVERRIDES, ROOT, dmd2, train_options
from torch import Tensor

from dmd2.lineage.plan import Plan

WIDTHS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
WIDTHS |= {17: (256, 512), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512))}


def vgg16() -> dict[str, Tensor]:
    """The convolutions of torchvision's VGG-16, with random weights."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for place, (num_in, num_out) in WIDTHS.items():
        scale = (2 / (9 * num_in)) ** 0.5
        state[f"features.{place}.weight"] = scale * torch.randn(num_out, num_in, 3, 3, generator=rng)
        state[f"features.{place}.bias"] = torch.zeros(num_out)
    return state


def arguments(folder: Path, tmp_path: Path, run: dict[str, Any]) -> list[str]:
    small = {"iterations": 1, "batch_size": 2, "num_snapshots": 1, "regression_loss": "lpips", **run}
    spec = Plan(ROOT / "workflow", "smoke", {**OVERRIDES, "runs": {"dmd": small}}).train("dmd")
    found = train_options(folder, "dmd", str(tmp_path / "out"), str(tmp_path / "state"))
    found[found.index("--spec") + 1] = spec.to_json()
    return [*found, "--pairs", str(folder / "pairs/manifest.json")]


def test_a_run_regresses_in_lpips_by_the_users_network(folder: Path, tmp_path: Path):
    path = tmp_path / "vgg16.pth"
    torch.save(vgg16(), path)
    assert dmd2(*arguments(folder, tmp_path, {"vgg_weights": {"path": str(path)}})) == 0
    row = json.loads((tmp_path / "out/train_log.jsonl").read_text())
    assert row["regression_loss"] > 0


@pytest.mark.parametrize("damage", ["missing", "truncated", "exchanged"])
def test_a_network_that_is_not_the_one_is_refused_before_training(
    damage: str, folder: Path, tmp_path: Path, reported: list[str], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "vgg16.pth"
    torch.save(vgg16(), path)
    named = {"path": str(path)}
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    else:
        named["sha256"] = "0" * 64
        monkeypatch.setenv("DMD2_FILES", json.dumps({named["sha256"]: str(path)}))  # as the workflow tells places
    assert dmd2(*arguments(folder, tmp_path, {"vgg_weights": named})) == 2
    (message,) = reported
    assert message.startswith(f"error: {path}: ")
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "out").exists()
