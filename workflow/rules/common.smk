# What the other files use: the plan of the chosen preset, its paths, and how a stage is started.
import json
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from dmd2.downloads.catalogue import FOLDER as DOWNLOADS
from dmd2.downloads.catalogue import load_catalogue, requirement
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.config.reading import overrides, read_chain
from dmd2.lineage.spec import files_in
from dmd2.report.tables import check_presets, load_table, measured_entries

FOLDER = Path(workflow.basedir) / "workflow"
# Stages are started by launch.sh with this Python, also where the environment is not activated.
SEARCH = [str(FOLDER), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
os.environ.update(PATH=os.pathsep.join(SEARCH))


def user_errors_stop_planning(function, *arguments):
    """The function's value; an error the user can mend stops the planning in one line."""
    try:
        return function(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


OVERRIDES = overrides(config)
# With `--config pending=true` a table is made of what is measured already; its other rows say `pending`.
MEASURED_ALREADY = str(config.get("pending", False)).lower() == "true"
PLAN = user_errors_stop_planning(Plan, FOLDER, config.get("preset", "digits"), OVERRIDES)
PRESET = PLAN.preset
RUNS = sorted(path.stem for path in (FOLDER / "runs").glob("*.yaml"))
TABLES = {
    path.stem: user_errors_stop_planning(load_table, path)
    for path in sorted((FOLDER / "tables").glob("*.yaml"))
}
for name, table in TABLES.items():
    presets = [path.stem for path in (FOLDER / "presets").glob("*.yaml")]
    user_errors_stop_planning(check_presets, table, presets, f"{FOLDER}/tables/{name}.yaml")
ENTRIES = {name: measured_entries(table, PRESET.name) for name, table in TABLES.items()}
SAMPLED = sorted(
    {entry for entries in ENTRIES.values() for entry in entries} - {"floor"}
)
for (
    entry
) in (
    SAMPLED
):  # a mistake in a row or its run is told here, in one line, and not by the job that needs it
    user_errors_stop_planning(PLAN.split, entry)
# Runs that were trained elsewhere, and those that are trained here and measured in a table.
IMPORTED = [
    run for run in RUNS if user_errors_stop_planning(read_chain, FOLDER / "runs", run).get("weights")
]
STUDENTS = [
    run
    for run in RUNS
    if run not in IMPORTED and any(entry.startswith(f"{run}/") for entry in SAMPLED)
]

DATA = f"data/{PRESET.name}"
RESULTS = f"results/{PRESET.name}"
LOGS = f"logs/{PRESET.name}"
# Settings of execution change no result. They go by the environment: as a parameter they would start jobs again.
# So do the places of files that are known by their SHA-256: a file that was moved starts nothing.
FILES = files_in(PRESET.model_dump())
for run in RUNS:
    FILES.update(files_in(read_chain(FOLDER / "runs", run)))
os.environ.update(
    DMD2_RUNTIME=PRESET.runtime.model_dump_json(), DMD2_FILES=json.dumps(FILES)
)
CATALOGUE = user_errors_stop_planning(load_catalogue, FOLDER / "downloads.yaml")
if "mirror" in config:
    os.environ.update(DMD2_MIRROR=str(config["mirror"]))


wildcard_constraints:
    run="|".join(RUNS),
    model="|".join(["teacher", *RUNS]),
    sampler="|".join(PRESET.samplers),
    table="|".join(TABLES),


def spec(name):
    """The spec of a stage without wildcards, as the canonical string that triggers it."""
    return lambda wildcards: user_errors_stop_planning(lambda: getattr(PLAN, name).to_json())


def supplied(path, key, output):
    """What a job waits for that reads `path` from outside and makes `output`: the record of a listed file, or nothing.

    `key` names the setting. A path where nothing lies stops the planning, unless `output` is there already. Records are
    for `ancient`: one that is written again starts nothing.
    """
    done = Path(output).exists()
    record = user_errors_stop_planning(lambda: requirement(path, key, CATALOGUE, done=done))
    return [] if record is None else str(record)


def released(wildcards):
    """What the import of a released student waits for."""
    path = user_errors_stop_planning(PLAN.run, wildcards.run).weights.path
    output = f"{RESULTS}/{wildcards.run}/generator.safetensors"
    return supplied(path, f"run {wildcards.run}: weights", output)


def perceptual(wildcards):
    """What a run with LPIPS waits for: the network behind it."""
    weights = user_errors_stop_planning(PLAN.run, wildcards.run).train.vgg_weights
    output = f"{RESULTS}/{wildcards.run}/generator.safetensors"
    return supplied(
        weights and weights.path, f"run {wildcards.run}: train.vgg_weights", output
    )


def one_of(names):
    """A wildcard's pattern: one of the names, or nothing at all."""
    return "|".join(names) or "(?!)"


def entry_of(wildcards):
    return f"{wildcards.model}/{wildcards.sampler}"


def weights_of(wildcards):
    """The weights behind an entry."""
    if wildcards.model == "teacher":
        return f"{RESULTS}/teacher/teacher.safetensors"
    last = PRESET.samplers[wildcards.sampler].checkpoint == "last"
    file = "generator" if last else f"{wildcards.sampler}/snapshot"
    return f"{RESULTS}/{wildcards.model}/{file}.safetensors"


def curve_of(wildcards):
    """What the best snapshot is chosen by; that of an iteration needs nothing."""
    best = PRESET.samplers[wildcards.sampler].checkpoint == "best"
    return f"{RESULTS}/{wildcards.run}/curve.csv" if best else []


def pairs_of(wildcards):
    """The teacher's pairs, for a run with a regression loss."""
    needs = user_errors_stop_planning(PLAN.run, wildcards.run).train.regression_weight > 0
    return f"{DATA}/pairs/manifest.json" if needs else []


def start_of(wildcards):
    """The networks of the run that this one goes on from."""
    parent = user_errors_stop_planning(PLAN.run, wildcards.run).train.init_run
    return f"{RESULTS}/{parent}/networks.safetensors" if parent else []


def metrics_file(entry):
    """The metrics record of an entry, or of the floor."""
    return f"{RESULTS}/{entry}/metrics.json"


def metrics_files(wildcards):
    """The records that a table reads."""
    return [metrics_file(entry) for entry in entries_of(wildcards)]


def entries_of(wildcards):
    """The entries that a table measures: all of it, or those that are there."""
    entries = ENTRIES[wildcards.table]
    if MEASURED_ALREADY:
        return [entry for entry in entries if Path(metrics_file(entry)).exists()]
    return entries
