"""One finished smoke run of everything, made once in a session and shared by all workers of pytest-xdist."""

import os
from pathlib import Path

import pytest
from checkout import Checkout
from filelock import FileLock


def pytest_itemcollected(item: pytest.Item) -> None:
    """Gives the test that makes the finished run, or waits for it, time for it on a busy machine too."""
    item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout of this worker's own in which nothing was run. A test that runs jobs copies it."""
    return Checkout.of_repository(tmp_path_factory.mktemp("fresh") / "dmd2")


@pytest.fixture(scope="session")
def finished(fresh: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """This worker's own checkout after `snakemake --cores 2` with preset smoke.

    A test may edit the workflow's files and put them back; one that runs jobs or changes outputs copies it.
    """
    shared = folder_of_all_workers(tmp_path_factory) / "finished"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            run = fresh.copy(tmp_path_factory.mktemp("run") / "dmd2")
            done = run.snakemake_started_anew("--cores", "2")
            assert done.returncode == 0, done.stdout
            run.folder.rename(shared)
    return Checkout(shared).copy(tmp_path_factory.mktemp("finished") / "dmd2")


def folder_of_all_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of the session, of which each worker of pytest-xdist has a folder."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
