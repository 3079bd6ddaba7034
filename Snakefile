# DMD2 (arXiv 2405.14867), every table of the paper in one call: snakemake --cores all
# One table: snakemake --cores all results/table1.csv. Each names its preset; choose another with --config preset=NAME
# (workflow/presets), override any of its keys with --configfile.
from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/teacher.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/records.smk"
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
                *rules.curves.output,
                *rules.real_grid.output,
                *rules.compare.output,
                *rules.configuration.output,
            ],
            preset=TARGETS.in_use,
        ),
