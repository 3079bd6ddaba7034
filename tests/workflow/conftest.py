"""One finished smoke run of everything, shared by all tests here; under xdist they go to one worker, which makes it."""

from pathlib import Path

import pytest
from checkout import Checkout

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the folder into one group of `--dist loadgroup`."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.xdist_group("workflow"))


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout in which nothing was run. A test that runs jobs copies it."""
    return Checkout.of_repository(tmp_path_factory.mktemp("fresh") / "dmd2")


@pytest.fixture(scope="session")
def finished(fresh: Checkout, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout after `snakemake --cores 2` with preset smoke. A test that changes an output copies it."""
    checkout = fresh.copy(tmp_path_factory.mktemp("finished") / "dmd2")
    done = checkout.snakemake("--cores", "2")
    assert done.returncode == 0, done.stdout
    return checkout
