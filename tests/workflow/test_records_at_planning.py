"""Planning without Snakemake's memory: the records say what is there, in both directions."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkout import Checkout
from PIL import Image
from test_replanning import EVERYTHING, KEYS, MEASURED, tables_with, trained

RECORDED = [
    "data/smoke/shards/manifest.json",
    "results/smoke/teacher/teacher.json",
    "results/smoke/gan/generator.json",
    "results/smoke/features/reference.json",
    "results/smoke/dmd2/student/metrics.json",
    "results/smoke/dmd2/curve.json",
    "results/table1.json",
]


@pytest.fixture(scope="module")
def copied(finished: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A finished tree that was copied without `.snakemake`, with time stamps in no order."""
    checkout = finished.copy(tmp_path_factory.mktemp("copied") / "dmd2")
    forget(checkout)
    files = [path for path in checkout.folder.rglob("*") if path.is_file() and ".git/" not in str(path)]
    order = random.Random(1)
    for path in files:
        os.utime(path, times=(stamp := 1.5e9 + order.randrange(10**6), stamp))
    return checkout


def forget(checkout: Checkout) -> None:
    shutil.rmtree(checkout / ".snakemake")


@pytest.fixture(autouse=True)
def without_memory(request: pytest.FixtureRequest) -> None:
    """A dry run leaves `.snakemake` behind, but no memory of a job."""
    if "copied" in request.fixturenames:
        shutil.rmtree(request.getfixturevalue("copied") / ".snakemake", ignore_errors=True)


def test_a_finished_tree_without_snakemakes_memory_has_nothing_to_do(copied: Checkout) -> None:
    assert copied.planned() == set()
    assert copied.planned("results/smoke/gan/generator.safetensors") == set()


@pytest.mark.parametrize(("overlay", "expected"), KEYS.values(), ids=KEYS.keys())
def test_a_key_plans_the_same_jobs_without_snakemakes_memory(
    copied: Checkout, overlay: dict, expected: set[str]
) -> None:
    assert copied.planned(overlay=overlay) == expected | {"configuration"}


def test_another_seed_trains_again_without_snakemakes_memory(copied: Checkout) -> None:
    target = "results/smoke/gan/generator.safetensors"
    assert copied.planned(target, overlay={"train": {"seed": 5}}) == {"train gan"}


def test_an_edited_table_is_made_again_without_snakemakes_memory(copied: Checkout) -> None:
    with copied.edited("workflow/tables/table1.yaml", "method: BigGAN-deep", "method: BigGAN deep"):
        assert copied.planned() == {"table table1"}


@pytest.mark.parametrize("path", RECORDED)
def test_a_record_of_another_configuration_plans_its_job_whatever_snakemake_remembers(
    finished: Checkout, path: str
) -> None:
    content = (finished / path).read_text()
    digest = json.loads(content)["provenance"]["digest"]
    with finished.edited(path, digest, "0" * 16):
        jobs = finished.planned()
    after = {
        "data/smoke/shards/manifest.json": EVERYTHING - {"configuration"},
        "results/smoke/gan/generator.json": trained("gan"),
        "results/smoke/features/reference.json": {"reference"} | MEASURED | tables_with("teacher/ode", "gan/student"),
        "results/smoke/dmd2/student/metrics.json": {"metrics dmd2/student", "table table1"},
        "results/table1.json": {"table table1"},
    }
    first = {"teacher": {"teacher"}, "curve": {"curve dmd2", "curves"}}
    expected = after.get(path, first.get(Path(path).stem, set()))
    assert expected
    assert jobs >= expected
    if path in after:
        assert jobs == expected


def test_a_record_of_another_job_plans_its_own(finished: Checkout) -> None:
    path = "results/smoke/dmd/student/metrics.json"
    with finished.edited(path, (finished / path).read_text(), (finished / path.replace("dmd", "gan")).read_text()):
        assert finished.planned() == {"metrics dmd/student", "table table1", "table table3"}


def test_a_configuration_that_is_not_shown_is_shown_anew_without_snakemakes_memory(copied: Checkout) -> None:
    assert copied.planned(overlay={"description": "Other words."}) == {"configuration"}


def test_what_is_missing_is_made_without_snakemakes_memory(copied: Checkout, tmp_path: Path) -> None:
    checkout = copied.copy(tmp_path / "dmd2")
    (checkout / "results/smoke/gan/student/grid.png").unlink()
    (checkout / "results/table3.csv").unlink()
    assert checkout.planned() == {"grid gan/student", "table table3"}


def test_an_input_that_was_made_after_the_memory_was_lost_counts_as_newer(copied: Checkout, tmp_path: Path) -> None:
    checkout = copied.copy(tmp_path / "dmd2")
    (checkout / "results/smoke/features/reference.npz").unlink()
    done = checkout.snakemake("results/smoke/features/reference.npz", "--cores", "2")
    assert done.returncode == 0, done.stdout
    assert checkout.planned() == MEASURED | tables_with("teacher/ode", "gan/student")


def images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / f"c{label}").mkdir(parents=True)
        for number in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / f"c{label}" / f"{number}.png")
    return folder


def test_other_images_plan_the_shards_and_a_moved_folder_nothing(fresh: Checkout, tmp_path: Path) -> None:
    checkout, target = fresh.copy(tmp_path / "dmd2"), "data/smoke/shards/manifest.json"
    source = images(tmp_path / "images")

    def planned(path: Path) -> set[str]:
        data = {"source": "image_folder", "path": str(path), "levels": 256, "image_format": "png"}
        return checkout.planned(target, overlay={"data": data})

    assert planned(source) == {"shards"}
    done = checkout.snakemake(target, "--cores", "1", "--configfile", "overlay.yaml")
    assert done.returncode == 0, done.stdout
    assert planned(source) == set()
    moved = Path(shutil.copytree(source, tmp_path / "moved"))
    assert planned(moved) == set()
    assert planned(tmp_path / "nowhere") == set()  # shards do not need the images any more
    added = moved / "c3" / "4.png"
    shutil.copy(moved / "c3" / "1.png", added)
    assert planned(moved) == {"shards"}
    forget(checkout)
    assert planned(moved) == {"shards"}
    added.unlink()
    assert planned(moved) == set()
    with (moved / "c3" / "1.png").open("ab") as file:
        file.write(b"more")
    assert planned(moved) == {"shards"}
    assert planned(source) == set()
