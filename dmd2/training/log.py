"""The training log: interval means over all ranks, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dmd2.files import write_text
from dmd2.training import ranks


class TrainLog:
    """Averages metrics on the device between rows; a context manager.

    `log.jsonl` in `folder` has a row per interval: `step`, `wall_s`, `cpu_s` and the mean of each metric over the
    interval. Rows after step `start`, of an interrupted attempt, are dropped on opening.
    """

    def __init__(self, folder: Path, start: int, *, enabled: bool = True):
        self._path = folder / "log.jsonl"
        self._enabled = enabled
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        if enabled:
            write_text(self._path, "".join(line + "\n" for line in _rows_up_to(self._path, start)))
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._board.close()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Adds the scalars () of one iteration; does not synchronise with the device."""
        for name, value in metrics.items():
            value = value.detach().double() if value.device.type == "cpu" else value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def flush(self, step: int, clock: dict[str, float]) -> dict[str, float]:
        """Ends the interval after iteration `step`: writes its row and returns it. Synchronises with the device.

        Collective: all ranks must have added the same names, and get the same row.
        """
        names = list(self._sums)
        if not names:
            return {}
        stacked = torch.stack([self._sums[name] / self._counts[name] for name in names])
        ranks.average([stacked])
        means = stacked.tolist()
        self._sums, self._counts = {}, {}
        finite = {name: mean for name, mean in zip(names, means, strict=True) if math.isfinite(mean)}
        row = {"step": step, **clock, **finite}
        if "denoising_loss_after_update" in row and "denoising_loss_before_update" in row:
            row["critic_lag"] = row["denoising_loss_after_update"] / row["denoising_loss_before_update"] - 1
        if self._enabled:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, step)
        return row


def _rows_up_to(path: Path, step: int) -> list[str]:
    """The complete rows of an existing log up to iteration `step`, without one truncated by a crash."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > step:
            break
        kept.append(line)
    return kept
