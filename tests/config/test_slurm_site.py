"""What jobs request from Slurm, and site files that do not fit the cluster; its answers are written here."""

from pathlib import Path

import pytest

from dmd2.errors import UserError
from dmd2.slurm import Site, check_site, check_status_command, minutes_of, read_site

PROFILE = Path(__file__).parents[2] / "profiles/slurm"
SINFO = """cpu*|up|12:00:00|(null)|32|128000
gpu|up|1-00:00:00|gpu:a100:4(S:0-1)|64|512000
gpu|up|1-00:00:00|gpu:h100:8(S:0-1)|112|2000000
old|down|infinite|gpu:2|16|64000+
"""
SITE = {"account": "mine", "cpu": {"partition": "cpu"}, "gpu": {"partition": "gpu", "model": "h100"}}


def answers(*command: str) -> str | None:
    return SINFO if command[0] == "sinfo" else "mine\nother\n"


@pytest.mark.parametrize("path", sorted(PROFILE.glob("**/[!p]*.yaml")), ids=lambda path: path.stem)
def test_site_file_and_examples_are_valid(path: Path):
    read_site(path)


def test_training_requests_the_gpus_of_each_node_and_a_task_on_each():
    site = Site.model_validate(SITE)
    alone, together = site.request("train", 8, 1, 1), site.request("train", 16, 2, 1)
    assert alone == {
        "slurm_account": "mine",
        "slurm_partition": "gpu",
        "slurm_extra": "--signal=TERM@120",
        "gpu_model": "h100",
        "cpus_per_gpu": 8,
        "mem_mb": 480_000,
        "runtime": 1440,
    }
    tasks = {"mpi": "srun", "tasks": 2, "tasks_per_gpu": 0, "cpus_per_task": 64}
    tasks |= {"slurm_extra": "--signal=TERM@120 --gpus-per-node=h100:8"}
    assert together == {name: value for name, value in alone.items() if name != "cpus_per_gpu"} | tasks


def test_without_gpus_no_job_requests_one():
    site = Site.model_validate(SITE)
    for rule, threads, wanted in (("shards", 16, (240, 32_000)), ("train", 1, (240, 8_000)), ("grid", 1, (30, 4_000))):
        request = site.request(rule, 0, 1, threads)
        names = {"slurm_account": "mine", "slurm_partition": "cpu"}
        assert request == {**names, "runtime": wanted[0], "mem_mb": wanted[1]}


def test_site_file_that_fits_passes():
    check_site(Site.model_validate(SITE), "site.yaml", 8, answers)
    check_site(Site(), "site.yaml", 0, answers)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"account": "mein"}, "account is 'mein', which is not yours; did you mean 'mine'?"),
        (
            {"cpu": {"partition": "cpus"}},
            "cpu.partition is 'cpus', which this cluster does not have; did you mean 'cpu'?",
        ),
        ({"cpu": {"partition": "old"}}, "cpu.partition old is down; wait, or name another"),
        ({"cpu": {"partition": "cpu", "minutes": 900}}, "cpu.minutes is 900, but partition cpu allows 720"),
        ({"cpu": {"minutes": 900}}, "cpu.minutes is 900, but partition cpu allows 720"),
        ({"cpu": {"partition": "cpu,odl"}}, "is 'cpu,odl', which this cluster does not have; did you mean 'old'?"),
        ({"gpu": {"partition": None, "minutes": 60}}, "gpu.partition is None, whose nodes have no GPU"),
        ({"gpu": {"partition": "cpu", "minutes": 60}}, "gpu.partition is 'cpu', whose nodes have no GPU"),
        ({"gpu": {"model": "h200"}}, "gpu.model is 'h200', which the partition does not have; did you mean 'h100'?"),
        ({"gpu": {"per_node": 4}}, "gpu.per_node is 4, but a job requests 8 GPUs on a node"),
        ({"gpu": {"model": "a100"}}, "gpu.per_node: a job of 8 GPUs requests 8, but a node has 4; use at most 4"),
        ({"gpu": {"cpus": 16}}, "gpu.cpus: a job of 8 GPUs requests 128, but a node has 112; use at most 14"),
        ({"gpu": {"mem_mb": 300_000}}, "gpu.mem_mb: a job of 8 GPUs requests 2400000, but a node has 2000000"),
    ],
)
def test_site_file_that_does_not_fit_names_the_key(keys: dict, message: str):
    gpu = {"partition": "gpu", **keys.get("gpu", {})}
    site = Site.model_validate({"account": "mine", **keys, "gpu": gpu})
    with pytest.raises(UserError, match=r"site\.yaml: ") as error:
        check_site(site, "site.yaml", 8, answers)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_several_partitions_may_be_named():
    site = Site.model_validate({"cpu": {"partition": "old,cpu", "minutes": 900}})
    check_site(site, "site.yaml", 0, answers)


def test_a_cluster_without_a_default_partition_needs_one_in_the_site_file():
    def none_is_default(*command: str) -> str:
        return SINFO.replace("*", "") if command[0] == "sinfo" else ""

    with pytest.raises(UserError, match=r"cpu\.partition is null, .* use one of cpu, gpu, old"):
        check_site(Site(), "site.yaml", 0, none_is_default)


def test_slurm_that_is_down_is_said_so():
    with pytest.raises(UserError, match="Slurm does not answer"):
        check_site(Site(), "site.yaml", 0, lambda *command: None)


def test_question_about_jobs_that_fails_names_the_option():
    def no_accounting(*command: str) -> str | None:
        return None if command[0] == "sacct" else ""

    for command in ("sacct", None):
        check_status_command(command, answers)
        with pytest.raises(UserError, match="slurm-status-command: squeue"):
            check_status_command(command, no_accounting)
    check_status_command("squeue", no_accounting)


def test_unknown_key_is_refused(tmp_path: Path):
    (tmp_path / "site.yaml").write_text("gpu: {partitoin: gpu}\n")
    with pytest.raises(UserError, match=r"site\.yaml: .*partitoin"):
        read_site(tmp_path / "site.yaml")


def test_limits_in_minutes():
    limits = {"30": 30, "30:00": 30, "12:00:00": 720, "2-12": 3600, "2-12:30:00": 3630}
    assert {limit: minutes_of(limit) for limit in limits} == limits
    assert minutes_of("infinite") == minutes_of("n/a") == float("inf")
