"""What the launched trainings start from, and the one that nothing happens to."""

from pathlib import Path

import pytest
from launched import Job, ended, make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run on two ranks from its beginning to its end."""
    job = Job(inputs, tmp_path_factory.mktemp("straight"))
    status, told = ended(job.start())
    assert status == 0, told
    return job
