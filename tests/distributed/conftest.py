"""What the launched trainings start from, and the one that nothing happens to."""

from pathlib import Path

import pytest
from forked import free_port
from launched import Job, ended, make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and a teacher."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="session")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A run on two ranks from its beginning to its end, under two launchers, as on two machines."""
    job = Job(inputs, tmp_path_factory.mktemp("straight"))
    common = {"DMD2_NODES": "2", "DMD2_MASTER_ADDR": "127.0.0.1", "DMD2_MASTER_PORT": str(free_port())}
    machines = [job.start(1, {**common, "DMD2_NODE": str(node), "GLOO_SOCKET_IFNAME": "lo"}) for node in range(2)]
    for machine in machines:
        status, reported = ended(machine)
        assert status == 0, reported
    return job
