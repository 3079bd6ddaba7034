# What every rule file uses: the plan of the chosen preset, its paths, and how a stage is started.
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from dmd2.errors import UserError
from dmd2.plan import Plan
from dmd2.tables import load_table, needed

FOLDER = Path(workflow.basedir) / "workflow"
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def or_stop(function, *arguments):
    """The function's value; an error the user can mend stops the planning in one line."""
    try:
        return function(*arguments)
    except UserError as error:
        raise WorkflowError(str(error)) from None


OVERRIDES = {key: value for key, value in config.items() if key != "preset"}
PLAN = or_stop(Plan, FOLDER, config.get("preset", "digits"), OVERRIDES)
PRESET = PLAN.preset
RUNS = sorted(path.stem for path in (FOLDER / "runs").glob("*.yaml"))
TABLES = {path.stem: or_stop(load_table, path) for path in sorted((FOLDER / "tables").glob("*.yaml"))}

DATA = f"data/{PRESET.name}"
RESULTS = f"results/{PRESET.name}"
LOGS = f"logs/{PRESET.name}"
# Execution settings are no parameters: changing them runs nothing again.
RUNTIME = PRESET.runtime.model_dump_json()
STAGE = f"bash {FOLDER}/launch.sh"


wildcard_constraints:
    run="|".join(RUNS),
    model="|".join(["teacher", *RUNS]),
    sampler="|".join(PRESET.samplers),
    table="|".join(TABLES),


def spec(name):
    """The spec of a stage without wildcards, as the canonical string that triggers it."""
    return lambda wildcards: or_stop(lambda: getattr(PLAN, name).to_json())


def entry_of(wildcards):
    return f"{wildcards.model}/{wildcards.sampler}"


def weights_of(wildcards):
    """The weights behind an entry."""
    if wildcards.model == "teacher":
        return f"{RESULTS}/teacher/teacher.safetensors"
    return f"{RESULTS}/{wildcards.model}/generator.safetensors"
