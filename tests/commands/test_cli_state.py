"""Which state folder a training resumes from, and whether its disk has room."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import PLAN, dmd2, random_model, train_options

from dmd2.datasets.reader import ShardReader
from dmd2.datasets.shards import write_shards
from dmd2.errors import UserError
from dmd2.method.distillation import Distillation
from dmd2.stages import state

RUN = "noreg_ttur"
OFTEN = '{"log_every": 1, "checkpoint_every": 1, "device": "cpu"}'


class Training:
    """A student's training in a folder of its own, of which inputs may be exchanged."""

    def __init__(self, made: Path, folder: Path):
        self.folder = folder
        for name in ("teacher", "latents"):
            shutil.copytree(made / name, folder / name)

    def run(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> int:
        """The exit status; with `stop_at` it ends before that iteration, its checkpoints kept."""
        step = Distillation.step

        def stopping(self: Distillation, index: int) -> Any:
            if index == stop_at:
                raise UserError("stopped by the test")
            return step(self, index)

        arguments = train_options(self.folder, RUN, "student")
        arguments[arguments.index("--runtime") + 1] = OFTEN
        with monkeypatch.context() as patch:
            patch.setattr(Distillation, "step", stopping)
            return dmd2(*arguments)

    def states(self) -> set[str]:
        return {path.name for path in (self.folder / "state").iterdir()}


def tensor_bytes(path: Path) -> int:
    """The size of a safetensors file without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.fixture
def training(folder: Path, tmp_path: Path) -> Training:
    return Training(folder, tmp_path)


@pytest.fixture
def resumed(caplog: pytest.LogCaptureFixture) -> Any:
    """Whether the last training went on from a checkpoint."""
    caplog.set_level(logging.INFO, logger="dmd2")

    def found() -> bool:
        said = any("resuming after iteration" in message for message in caplog.messages)
        caplog.clear()
        return said

    return found


def brighten(training: Training) -> None:
    """Other images under the same configuration."""
    manifest = training.folder / "latents/manifest.json"
    reader = ShardReader(manifest)
    values = reader.read(range(len(reader)))
    values["latent"] = np.minimum(values["latent"] + 1, 16)
    fields = {field: values[field.rpartition(".")[0] or field] for field in reader.manifest["fields"]}

    def make(ids: range) -> dict[str, np.ndarray]:
        return {field: value[list(ids)] for field, value in fields.items()}

    write_shards(manifest, len(reader), reader.manifest["shard_size"], make, PLAN.latents, inputs="other images")


def replace_teacher(training: Training) -> None:
    """Other weights under the same configuration."""
    random_model(training.folder, "teacher").rename(training.folder / "teacher/teacher.safetensors")
    (training.folder / "generator.json").rename(training.folder / "teacher/teacher.json")


@pytest.mark.parametrize("change", [brighten, replace_teacher])
def test_training_on_other_inputs_under_the_same_configuration_starts_anew(
    change: Any, training: Training, resumed: Any, monkeypatch: pytest.MonkeyPatch, reported: list[str]
):
    assert training.run(monkeypatch, stop_at=2) == 2
    (first,) = training.states()
    assert not resumed()
    kept = {name: (training.folder / name).read_bytes() for name in ("latents/manifest.json", "teacher/teacher.json")}

    change(training)
    assert {name: (training.folder / name).read_bytes() for name in kept} != kept
    assert training.run(monkeypatch, stop_at=1) == 2
    assert reported == ["error: stopped by the test"] * 2, "and not that a checkpoint is foreign"
    assert not resumed()
    assert len(training.states()) == 2
    assert (training.folder / "state" / first / "newest.json").exists()

    assert training.run(monkeypatch) == 0
    assert resumed()
    assert training.states() == {first}, "the other inputs' checkpoints are kept"


def test_inputs_that_moved_with_their_content_are_resumed_on(
    training: Training, resumed: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    assert training.run(monkeypatch, stop_at=2) == 2
    moved = Training(training.folder, tmp_path_factory.mktemp("moved"))
    shutil.copytree(training.folder / "state", moved.folder / "state")
    resumed()
    assert moved.run(monkeypatch) == 0
    assert resumed()


def test_a_disk_too_small_stops_a_training_before_its_first_iteration(
    training: Training, monkeypatch: pytest.MonkeyPatch, reported: list[str]
):
    usage = shutil.disk_usage(training.folder)._replace(free=2**18)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage)
    assert training.run(monkeypatch, stop_at=0) == 2
    (message,) = reported
    assert "GiB will be written and 0.00 GiB are free; free space, or lower runtime.keep_checkpoints" in message
    assert not list((training.folder / "state").glob("*/step-*"))


def test_room_that_is_requested_covers_what_a_training_wrote(training: Training, monkeypatch: pytest.MonkeyPatch):
    requested: list[dict[Path, int]] = []
    monkeypatch.setattr("dmd2.stages.state.check_room", requested.append)
    assert training.run(monkeypatch, stop_at=3) == 2
    ((state, needed), (out, results)) = requested[0].items()
    checkpoints = len(list(state.glob("step-*.json")))
    assert checkpoints == 2
    checkpoint = sum(map(tensor_bytes, state.glob("step-*.safetensors"))) / checkpoints
    (snapshot,) = map(tensor_bytes, state.glob("snapshot-*.safetensors"))
    assert needed == pytest.approx(3 * checkpoint + 2 * snapshot, rel=0.01)
    assert training.run(monkeypatch) == 0
    assert results == sum(map(tensor_bytes, out.rglob("*.safetensors")))


def test_what_an_earlier_attempt_left_is_not_asked_for_again(training: Training, monkeypatch: pytest.MonkeyPatch):
    requested: list[dict[Path, int]] = []
    monkeypatch.setattr("dmd2.stages.state.check_room", requested.append)
    assert training.run(monkeypatch, stop_at=3) == 2
    ((state, first), results) = requested[0].items()
    left = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    assert left > first / 3
    assert training.run(monkeypatch, stop_at=3) == 2
    ((same, again), results_again) = requested[1].items()
    assert same == state
    assert again == pytest.approx(first - left, abs=1000), "but for what names the folder's owner"
    assert results_again == results, "results are written beside old ones before they take their place"


def test_folders_on_one_disk_share_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage)
    folder, other = tmp_path / "state", tmp_path / "out/deep"
    state.check_room({folder: 600, other: 400})
    with pytest.raises(UserError, match=r"state and .*deep: 0\.00 GiB will be written and 0\.00 GiB are free"):
        state.check_room({folder: 600, other: 401})
