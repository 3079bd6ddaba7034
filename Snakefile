# DMD2 (arXiv 2405.14867), every table of the paper in one call: snakemake --cores all
# One table: snakemake --cores all results/table1.csv. Each names its preset; choose another with --config preset=NAME
# (workflow/presets), override any of its keys with --configfile.
import os

from snakemake.utils import min_version

min_version("9.0")


# The report opens on the page of results, which a finished call writes; without one, on a description.
LANDING = "landing/results" if os.path.exists("results/index.html") else "workflow"


report: "workflow/report/{}.rst".format(LANDING)


include: "workflow/rules/common.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/teacher.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/records.smk"
include: "workflow/rules/storage.smk"
include: "workflow/rules/cluster.smk"


# Snakemake gives a job fewer devices where there are fewer; a batch that was checked for `gpus` might not divide then.
onstart:
    devices = workflow.global_resources.get("gpu").value
    for preset in sorted(PLANNED):
        wanted = TARGETS.plan(preset).preset.gpus
        if devices is not None and devices < wanted:
            stop(
                f"preset {preset}: gpus is {wanted}, but {devices} can be used here;"
                f" say `--config gpus={devices}`, or `--resources gpu={wanted}` if there are more"
            )
    check_cluster(
        max((TARGETS.plan(preset).preset.gpus for preset in PLANNED), default=0)
    )


# What finished jobs took, and the page of results: about all that is there, so they are no job's outputs.
onsuccess:
    try:
        from dmd2.commands.results import write_page

        write_page(Path(), FOLDER)
    except Exception as error:  # a page makes no finished call fail
        logger.warning(f"results/index.html was not written: {error}")


rule all:
    default_target: True
    input:
        expand("results/{table}.csv", table=TARGETS.built),
        [
            f"results/{preset}/{entry}/grid.png"
            for preset in TARGETS.in_use
            for entry in TARGETS.sampled(preset)
        ],
        expand(
            [
                *map(in_workflow, rules.curves.output),
                *map(in_workflow, rules.real_grid.output),
                *map(in_workflow, rules.compare.output),
                *map(in_workflow, rules.configuration.output),
            ],
            preset=TARGETS.in_use,
        ),
