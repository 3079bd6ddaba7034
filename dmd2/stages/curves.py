"""Stages on the snapshots of a run: metrics over training, and selection of the best."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd2.config import Runtime, Sampler
from dmd2.errors import UserError
from dmd2.files import atomic, read_json, write_json
from dmd2.lineage.records import read_record, write_record
from dmd2.lineage.spec import Spec
from dmd2.metrics import Meter, Reference, tally_range
from dmd2.progress import Counter
from dmd2.report.figures import read_curve
from dmd2.report.table_schema import TRAINING
from dmd2.stages.measure import open_extractor
from dmd2.stages.open_weights import checked_record, open_weights
from dmd2.stages.resumable import ResumableFiles, patience
from dmd2.stages.sample import maker, open_model
from dmd2.training import ranks
from dmd2.training.checkpoint_store import save_weights
from dmd2.training.post_hoc_ema import combination, combined

STUDENT = Sampler(kind="few_step")
OF_THE_FILE = ("artifact", "sha256", "bytes", "provenance")
"""Fields of a record that describe its file and not the model in it."""


def curve(
    spec: Spec,
    snapshots: Path,
    reference: Path,
    extractor_weights: Path,
    state: Path,
    out: Path,
    runtime: Runtime,
    components: Path | None = None,
) -> None:
    """Writes the metrics of a run's snapshots over training as CSV (paper, figure 9); each rank measures its share."""
    evaluation = spec.need("evaluation")
    checked_record(reference, spec.upstream["reference"])
    device = ranks.device_of(runtime.device)
    extractor, real = open_extractor(spec, extractor_weights, runtime, device), Reference.load(reference)
    size, protocols = evaluation.curve_samples, evaluation.protocols
    meter = Meter(real, extractor, size, protocols, detailed=False, device=device, evaluation=evaluation)
    listed = read_json(snapshots)["snapshots"]
    files = [snapshots.parent / item["file"] for item in listed]
    contents = [read_record(path)["sha256"] for path in (reference, extractor_weights, *files)]
    shares = ResumableFiles(state, spec, contents, [f"row-{item['step']:08d}.json" for item in listed])
    count = Counter(f"curve {spec.name}", -(-len(listed) // ranks.world_size()))
    for number, path in shares.mine(read_json):
        model = open_model(spec, files[number], STUDENT, device, components)
        make = maker(spec, model, STUDENT, runtime.sample_batch_size, shares.beat)
        found = meter.measures(tally_range(meter, make, range(evaluation.curve_samples)))
        write_json(path, {**_position(spec, listed[number]["step"]), **found})
        count(1)
    if ranks.rank() > 0:
        return
    shares.wait(patience(runtime), read_json)
    _write_rows(out, [read_json(path) for path in shares.paths])
    write_record(out, spec, num_samples=evaluation.curve_samples, seed=evaluation.seed)
    shares.clear()


def _position(spec: Spec, step: int) -> dict[str, int]:
    """The iteration and generator updates of a snapshot."""
    return {"step": step, "generator_updates": -(-step // spec.need("train").critic_steps_per_generator)}


def _write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    with atomic(out) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def select(spec: Spec, curve: Path | None, snapshots: Path, generator: Path, out: Path) -> None:
    """Copies a run's snapshot: of the sampler's iteration, or the best by FID of `curve`; its record says which.

    With the sampler's `ema_length` it is the average of that width up to the iteration, combined from stored ones.

    `generator` is the run's last one, whose record has facts that the snapshot's lacks.
    """
    listed, sampler = read_json(snapshots), spec.need("sampler")
    files = {item["step"]: snapshots.parent / item["file"] for item in listed["snapshots"]}
    facts = checked_record(generator, spec.upstream["model"])
    step: int = max(files) if sampler.checkpoint == "last" else sampler.checkpoint
    why: dict[str, Any] = {"selection": "snapshot"}
    if curve is not None:
        step, why = _best(curve, checked_record(curve, spec.upstream["curve"]), set(files))
    own = checked_record(files[step], spec.upstream["model"])
    if sampler.ema_length is None:
        with atomic(out) as temporary:
            shutil.copyfile(files[step], temporary)
    else:
        weights, error = _average(listed["averages"], step, sampler.ema_length, snapshots.parent, spec)
        save_weights(out, weights)
        why |= {"ema_length": sampler.ema_length, "ema_fit_error": error}
    of_the_run = {
        name: value for name, value in facts.items() if name not in TRAINING
    }  # the snapshot's own cost is lower
    kept = {name: value for name, value in {**of_the_run, **own}.items() if name not in OF_THE_FILE}
    write_record(out, spec, **{**kept, "iterations": step, **why})


def _average(
    listed: list[dict[str, Any]], step: int, width: float, folder: Path, spec: Spec
) -> tuple[dict[str, Tensor], float]:
    """The average of a width after iteration `step` from those stored up to it, and the error of its profile."""
    items = [item for item in listed if item["step"] <= step]
    stored = [(item["step"], item["ema_length"]) for item in items]  # time in any unit
    weights, error = combination(stored, (step, width))
    states = (open_weights(folder / item["file"], spec.upstream["model"]) for item in items)
    return combined(weights.tolist(), states), error


def _best(curve: Path, record: dict[str, Any], steps: set[int]) -> tuple[int, dict[str, Any]]:
    """The step with the lowest FID on a run's curve (the earliest of equal ones), and facts about the selection."""
    rows = {int(row["step"]): row["fid"] for row in read_curve(curve)}
    if set(rows) != steps:
        raise UserError(f"{curve}: has other steps than the run's snapshots; delete it and run the workflow again")
    best = min(rows, key=lambda step: (rows[step], step))
    chosen = f"by the FID of {record['num_samples']} samples, seed {record['seed']}, over {len(rows)} snapshots"
    return best, {"selection": "best", "chosen": chosen, "curve_fid": rows[best]}
