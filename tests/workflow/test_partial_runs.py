"""Tables before all of their rows are measured."""

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
