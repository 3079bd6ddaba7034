# What the other files use: the tables' presets and their plans, the paths of a preset, and how a stage is started.
import json
import os
import re
import sys
from pathlib import Path

from snakemake.logging import logger

FOLDER = Path(workflow.basedir) / "workflow"
# A file that a user has put beside the Snakefile, or where it runs, is no module of Python's, whatever its name.
THEIRS = {Path(workflow.basedir).resolve(), Path.cwd().resolve()}
sys.path[:] = [
    str(FOLDER / "python"),
    *(path for path in sys.path if Path(path).resolve() not in THEIRS),
]

from dmd2.downloads.catalogue import FOLDER as DOWNLOADS
from dmd2.downloads.catalogue import load_catalogue, requirement
from dmd2.errors import UserError
from dmd2.report.targets import Targets

# What starts a stage, with this Python also where the environment is not activated. Rules say `exec`: a shell in between
# would end at SIGTERM at once, Snakemake with it, and Slurm would then kill the stage before it has saved.
SEARCH = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
os.environ.update(DMD2_LAUNCH=str(FOLDER / "launch.sh"), PATH=os.pathsep.join(SEARCH))

DATA = "data/{preset}"
RESULTS = "results/{preset}"
LOGS = "logs/{preset}"


def stop(message):
    """Ends Snakemake with one line; of an exception it would print the class, the place and a traceback after it."""
    logger.error(f"error: {message}")
    raise SystemExit(1)


def user_errors_stop_planning(function, *arguments):
    """The function's value; an error that the user can fix stops the planning in one line."""
    try:
        return function(*arguments)
    except UserError as error:
        stop(error)


TARGETS = user_errors_stop_planning(Targets, FOLDER, config)
# With `--config pending=true` a table is made of what is measured already; its other rows say `pending`.
MEASURED_ALREADY = str(config.get("pending", False)).lower() == "true"
CATALOGUE = user_errors_stop_planning(load_catalogue, FOLDER / "downloads.yaml")
if "mirror" in config:
    os.environ.update(DMD2_MIRROR=str(config["mirror"]))

PLANNED = set()
RUNTIMES, FILES = {}, {}


def plan_of(wildcards):
    """The plan of the preset in the wildcards.

    Settings of execution change no result and go by the environment: as a parameter they would start jobs again. So do
    the places of files that are known by their SHA-256: a file that was moved starts nothing.
    """
    plan = user_errors_stop_planning(TARGETS.plan, wildcards.preset)
    if wildcards.preset not in PLANNED:
        PLANNED.add(wildcards.preset)
        RUNTIMES[wildcards.preset] = plan.preset.runtime.model_dump(mode="json")
        FILES.update(user_errors_stop_planning(TARGETS.files, wildcards.preset))
        os.environ.update(
            DMD2_RUNTIMES=json.dumps(RUNTIMES), DMD2_FILES=json.dumps(FILES)
        )
    return plan


def one_of(names):
    """A wildcard's pattern: one of the names, or nothing at all."""
    return "|".join(map(re.escape, names)) or "(?!)"


def one_run_of(names):
    """A wildcard's pattern: one of the runs, or NAME_seedN, the run NAME with another training seed."""
    return f"(?:{one_of(names)})(?:_seed[0-9]+)?"


wildcard_constraints:
    preset=one_of(TARGETS.presets),
    run=one_run_of(TARGETS.runs),
    model=f"teacher|{one_run_of(TARGETS.runs)}",
    sampler="[A-Za-z0-9_-]+",
    table=one_of(TARGETS.tables),


def preset_key(get):
    """A function of wildcards: what `get` reads from the preset in them."""
    return lambda wildcards: get(plan_of(wildcards).preset)


gpus = preset_key(lambda preset: preset.gpus)
# A training may run on several machines.
nodes = preset_key(lambda preset: preset.nodes)
gpus_of_all_nodes = preset_key(lambda preset: preset.gpus * preset.nodes)
one_gpu = preset_key(lambda preset: min(preset.gpus, 1))
# Processor threads beside a device, for the statistics.
statistics_threads = preset_key(lambda preset: 8 if preset.gpus else 1)


def all_cores(wildcards):
    """All that Snakemake may use here; on a cluster, where there is no such number, those of the statistics."""
    return workflow.global_resources["_cores"].value or statistics_threads(wildcards)


# Metrics of streamed samples are made from the weights; only the samples of a sheet are stored.
is_streamed = preset_key(lambda preset: preset.evaluation.streamed)


def spec(name, thing=None):
    """A function of wildcards: the spec of a stage, as the canonical string that triggers it.

    `thing` is what the plan's method is called with, a text with wildcards in braces; a stage without one has none.
    """

    def canonical(wildcards):
        plan = plan_of(wildcards)
        if thing is None:
            return user_errors_stop_planning(lambda: getattr(plan, name).to_json())
        filled = thing.format(**dict(wildcards.items()))
        return user_errors_stop_planning(getattr(plan, name), filled).to_json()

    return canonical


ENTRY = "{model}/{sampler}"
