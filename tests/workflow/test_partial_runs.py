"""Tables before all of their rows are measured, and machines with fewer devices than a preset asks for."""

import csv
from pathlib import Path

from checkout import Checkout


def test_table_with_pending_rows_is_made_of_what_is_there(fresh: Checkout, tmp_path: Path):
    checkout = fresh.copy(tmp_path / "dmd2")
    assert checkout.planned("results/table1.csv", overlay={"pending": True}) == {"table table1"}
    done = checkout.snakemake("results/table1.csv", "--cores", "1", overlay={"pending": True})
    assert done.returncode == 0, done.stdout
    with (checkout / "results/table1.csv").open(newline="") as file:
        sources = {row["row_id"]: row["source"] for row in csv.DictReader(file)}
    assert sources["t1.dmd2"] == sources["t1.edm_ode"] == "pending"
    assert sources["t1.adm"] == "quoted"
    assert "train dmd2" in checkout.planned("results/table1.csv"), "without the switch the table waits for its rows"


def test_too_few_devices_stop_a_run_before_its_first_job(fresh: Checkout, tmp_path: Path):
    checkout = fresh.copy(tmp_path / "dmd2")
    target = "data/smoke/shards/manifest.json"
    done = checkout.snakemake(target, "--cores", "1", "--resources", "gpu=1", overlay={"gpus": 2})
    assert done.returncode != 0
    assert "gpus is 2, but 1 can be used here; say `--config gpus=1`" in done.stdout
    assert not (checkout / target).exists()
