"""Two ranks under the launcher: what is killed, stopped or interrupted ends in time, and goes on where it was."""

import json
import os
import random
import re
import signal
from pathlib import Path

from launched import ITERATIONS, Job, ended, ranks_of
from safetensors.numpy import load

LOST = r"error: rank {} of 2, in [\w ]+: another rank ended or was silent for longer than runtime\.collective_timeout"


def test_killed_rank_ends_the_job_and_the_next_start_ends_like_an_uninterrupted_run(
    inputs: Path, straight: Job, tmp_path: Path
):
    """The uninterrupted run had two launchers, this one has one: that makes no difference either."""
    job, chance = Job(inputs, tmp_path), random.Random(7)
    process = job.start(collective_timeout_minutes=600)  # that it ends shows that it does not wait for this
    job.wait_for(chance.randrange(8, 14), process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    status, reported = ended(process)
    assert status == 128 + signal.SIGKILL, reported
    assert "error: rank 1 was ended by SIGKILL" in reported  # rank 0 may be ended before it sees that it is alone
    assert "Traceback" not in reported
    saved = job.saved()
    assert saved >= 7
    status, reported = ended(job.start())
    assert status == 0, reported
    assert f"dmd2: resuming after iteration {saved} of {ITERATIONS}" in reported
    record = json.loads((straight.folder / "out/generator.json").read_text())
    assert record["num_processes"] == 2
    for name in ("networks", "generator"):
        assert job.result(name) == straight.result(name), f"{name} differs"


def test_hung_rank_ends_the_job_within_the_time_limit(inputs: Path, tmp_path: Path):
    job = Job(inputs, tmp_path)
    process = job.start(collective_timeout_minutes=0.1)
    job.wait_for(8, process)
    os.kill(ranks_of(process)[0], signal.SIGSTOP)
    status, reported = ended(process)
    assert status == 2, reported
    assert re.search(LOST.format(1), reported), reported
    assert re.search("Timed out|timeout caused", reported), reported
    assert "error: rank 0 did not end within 2 s and is killed" in reported
    assert "Traceback" not in reported


def test_interrupted_ranks_save_and_one_process_goes_on_with_their_parts(inputs: Path, straight: Job, tmp_path: Path):
    job = Job(inputs, tmp_path)
    process = job.start(layout="shard")
    job.wait_for(8, process)
    process.send_signal(signal.SIGTERM)
    status, reported = ended(process)
    assert status == 143, reported
    stopped = re.findall(r"error: SIGTERM: saved after iteration (\d+); run the same command to resume", reported)
    assert stopped == [str(job.saved())], reported
    assert job.saved() == job.rows()[-1]["step"], "nothing that was done is lost"

    status, reported = ended(job.start(gpus=1, micro_batch_size=4))
    assert status == 0, reported
    assert f"resuming after iteration {stopped[0]} of {ITERATIONS}" in reported
    log = [json.loads(line) for line in (job.folder / "out/train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, ITERATIONS + 1)), "no iteration is lost or made twice"
    # The same parts of the same batches: one process differs from two by rounding, which many updates let grow.
    ours, theirs = load(job.result("generator")), load(straight.result("generator"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert abs(value - theirs[name]).max() < 5e-3, name
