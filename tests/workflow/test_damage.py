"""A damaged file stops the stage that reads it, which names the file and the remedy; the remedy repairs it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkout import Checkout, jobs_in


@dataclass(frozen=True)
class Damage:
    """A file to damage, an output that is made from it, and what its reader says."""

    path: str
    reader: str
    log: str
    complaint: str
    delete: str  # what the complaint says to delete
    repaired_by: str  # the one job that writes it again


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


SHARD = Damage(
    "data/smoke/shards/shard-00002.tar",
    reader="results/smoke/figures/real.png",
    log="logs/smoke/grid/real.log",
    complaint=" was altered: its SHA-256 is not the manifest's; delete data/smoke/shards/manifest.json",
    delete="data/smoke/shards/manifest.json",
    repaired_by="shards",
)
LATENT = Damage(
    "data/smoke/latents/shard-00001.tar",
    reader="results/smoke/gan/generator.safetensors",
    log="logs/smoke/train/gan.log",
    complaint=" was altered: its SHA-256 is not the manifest's; delete data/smoke/latents/manifest.json",
    delete="data/smoke/latents/manifest.json",
    repaired_by="latents",
)
TEACHER = Damage(
    "results/smoke/teacher/teacher.safetensors",
    reader="results/smoke/teacher/sde/samples/manifest.json",
    log="logs/smoke/sample/teacher-sde.log",
    complaint=": its SHA-256 differs from the record's: the file was damaged or replaced; delete it",
    delete="results/smoke/teacher/teacher.safetensors",
    repaired_by="teacher",
)
RECORD = Damage(
    "results/smoke/gan_ttur/generator.json",
    reader="results/smoke/gan_ttur/student/samples/manifest.json",
    log="logs/smoke/sample/gan_ttur-student.log",
    complaint=": damaged JSON (",
    delete="results/smoke/gan_ttur/generator.json",
    repaired_by="train gan_ttur",
)
METRICS = Damage(
    "results/smoke/dmd/student/metrics.json",
    reader="results/table1.csv",
    log="logs/tables/table1.log",
    complaint=": damaged JSON (",
    delete="results/smoke/dmd/student/metrics.json",
    repaired_by="metrics dmd/student",
)
INFLICTED = {
    "data": {SHARD: flip_a_byte, LATENT: flip_a_byte},
    "a record and metrics": {RECORD: cut_in_half, METRICS: cut_in_half},
    "weights": {TEACHER: flip_a_byte},
}
"""What is damaged at once: no reader of the one waits for a reader of another."""


def same(found: Path, finished: Path) -> bool:
    """Whether two files have the same content; JSON but for who made it when, at which cost."""
    if found.suffix != ".json":
        return found.read_bytes() == finished.read_bytes()
    volatile = {"provenance", "train_cpu_s", "train_wall_s"}
    one, other = ({k: v for k, v in json.loads(p.read_text()).items() if k not in volatile} for p in (found, finished))
    return one == other


@pytest.mark.parametrize("inflicted", INFLICTED.values(), ids=INFLICTED.keys())
def test_damage_stops_its_reader_and_the_remedy_repairs_it(
    finished: Checkout, tmp_path: Path, inflicted: dict[Damage, Callable[[Path], None]]
):
    checkout = finished.copy(tmp_path / "dmd2")
    for damage in inflicted:
        (checkout / damage.reader).unlink()
    without_readers = checkout.planned()
    for damage, inflict in inflicted.items():
        inflict(checkout / damage.path)
    stopped = checkout.snakemake(*(damage.reader for damage in inflicted), "--cores", "2")
    assert stopped.returncode == 1, stopped.stdout
    for damage in inflicted:
        assert not (checkout / damage.reader).exists()
        log = (checkout / damage.log).read_text()
        errors = [line for line in log.splitlines() if "error: " in line]
        assert len(errors) == 1, log
        assert damage.path + damage.complaint in errors[0]
        assert "delete" in errors[0]
        assert "Traceback" not in log

    for damage in inflicted:
        (checkout / damage.delete).unlink()
    repaired = checkout.snakemake(*(damage.delete for damage in inflicted), "--cores", "2")
    assert repaired.returncode == 0, repaired.stdout
    assert jobs_in(repaired.stdout) == {damage.repaired_by for damage in inflicted}
    for damage in inflicted:
        assert same(checkout / damage.path, finished / damage.path)
        assert same(checkout / damage.delete, finished / damage.delete)
    if inflicted.keys() <= {SHARD, LATENT}:
        assert checkout.planned() == without_readers, "a repaired shard leaves alone what was made from it"
