"""A damaged file stops the stage that reads it, which names the file and the remedy; the remedy mends it."""

import json
import shutil
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
    mended_by: str  # the one job that writes it again


SHARD = Damage(
    "data/smoke/shards/shard-00002.tar",
    reader="results/smoke/figures/real.png",
    log="grid/real",
    complaint=" was altered: its SHA-256 is not the manifest's; delete data/smoke/shards/manifest.json",
    delete="data/smoke/shards/manifest.json",
    mended_by="shards",
)
LATENT = Damage(
    "data/smoke/latents/shard-00001.tar",
    reader="results/smoke/gan/generator.safetensors",
    log="train/gan",
    complaint=" was altered: its SHA-256 is not the manifest's; delete data/smoke/latents/manifest.json",
    delete="data/smoke/latents/manifest.json",
    mended_by="latents",
)
TEACHER = Damage(
    "results/smoke/teacher/teacher.safetensors",
    reader="results/smoke/teacher/sde/samples/manifest.json",
    log="sample/teacher-sde",
    complaint=": its SHA-256 differs from the record's: the file was damaged or replaced; delete it",
    delete="results/smoke/teacher/teacher.safetensors",
    mended_by="teacher",
)
RECORD = Damage(
    "results/smoke/gan_ttur/generator.json",
    reader="results/smoke/gan_ttur/student/samples/manifest.json",
    log="sample/gan_ttur-student",
    complaint=": damaged JSON (",
    delete="results/smoke/gan_ttur/generator.json",
    mended_by="train gan_ttur",
)
METRICS = Damage(
    "results/smoke/noreg/student/metrics.json",
    reader="results/table3.csv",
    log="tables/table3",
    complaint=": made with configuration ",
    delete="results/smoke/noreg/student/metrics.json",
    mended_by="metrics noreg/student",
)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


def replace_by_anothers(path: Path) -> None:
    shutil.copy(path.parents[2] / "noreg_ttur/student" / path.name, path)


def same(found: Path, finished: Path) -> bool:
    """Whether two files have the same content; JSON but for who made it when, at which cost."""
    if found.suffix != ".json":
        return found.read_bytes() == finished.read_bytes()
    volatile = {"provenance", "train_cpu_s", "train_wall_s"}
    one, other = ({k: v for k, v in json.loads(p.read_text()).items() if k not in volatile} for p in (found, finished))
    return one == other


@pytest.mark.parametrize(
    ("damage", "inflict"),
    [
        pytest.param(SHARD, flip_a_byte, id="image shard"),
        pytest.param(LATENT, flip_a_byte, id="latent shard"),
        pytest.param(TEACHER, flip_a_byte, id="weights"),
        pytest.param(RECORD, cut_in_half, id="record"),
        pytest.param(METRICS, replace_by_anothers, id="metrics"),
    ],
)
def test_damage_stops_its_reader_and_the_remedy_mends_it(finished: Checkout, tmp_path: Path, damage: Damage, inflict):
    checkout = finished.copy(tmp_path / "dmd2")
    inflict(checkout / damage.path)
    (checkout / damage.reader).unlink()
    stopped = checkout.snakemake(damage.reader, "--cores", "2")
    assert stopped.returncode == 1, stopped.stdout
    assert not (checkout / damage.reader).exists()
    log = (checkout / f"logs/smoke/{damage.log}.log").read_text()
    errors = [line for line in log.splitlines() if "error: " in line]
    assert len(errors) == 1, log
    assert damage.path + damage.complaint in errors[0]
    assert "delete" in errors[0]
    assert "Traceback" not in log

    (checkout / damage.delete).unlink()
    mended = checkout.snakemake(damage.delete, "--cores", "2")
    assert mended.returncode == 0, mended.stdout
    assert jobs_in(mended.stdout) == {damage.mended_by}
    assert same(checkout / damage.path, finished / damage.path)


@pytest.mark.parametrize("damage", [SHARD, LATENT], ids=["image", "latent"])
def test_a_mended_shard_leaves_alone_what_was_made_from_it(finished: Checkout, tmp_path: Path, damage: Damage):
    checkout = finished.copy(tmp_path / "dmd2")
    flip_a_byte(checkout / damage.path)
    (checkout / damage.delete).unlink()
    mended = checkout.snakemake(damage.delete, "--cores", "2")
    assert jobs_in(mended.stdout) == {damage.mended_by}
    assert same(checkout / damage.path, finished / damage.path)
    assert (checkout / damage.delete).read_bytes() == (finished / damage.delete).read_bytes()
    assert checkout.planned() == set()
