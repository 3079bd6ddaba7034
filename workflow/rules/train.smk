# One student per run, trained here or imported. Checkpoints are no output: they are stored in the state folder,
# named by the spec's digest, so that neither a failed job nor Snakemake removes them, and a changed configuration never
# finds them.


def pairs_of(wildcards):
    """The teacher's pairs, for a run with a regression loss."""
    needs = run_of(wildcards).train.regression_weight > 0
    return (
        f"{DATA}/pairs/manifest.json".format(preset=wildcards.preset) if needs else []
    )


def start_of(wildcards):
    """The networks of the run that this one goes on from."""
    parent = run_of(wildcards).train.init_run
    folder = RESULTS.format(preset=wildcards.preset)
    return f"{folder}/{parent}/networks.safetensors" if parent else []


def run_file(key, get):
    """A function of wildcards: the record of the file from outside that the run's `key` names, if it names one."""

    def record(wildcards):
        file = get(run_of(wildcards))
        output = f"{RESULTS}/{wildcards.run}/generator.safetensors"
        return supplied(
            file and file.path,
            f"run {wildcards.run}: {key}",
            output.format(preset=wildcards.preset),
        )

    return record


released = run_file("weights", lambda run: run.weights)


rule train:
    input:
        teacher=rules.teacher.output.weights,
        latents=rules.latents.output.manifest,
        pairs=pairs_of,
        start=start_of,
        perceptual=ancient(
            run_file("train.vgg_weights", lambda run: run.train.vgg_weights)
        ),
    output:
        generator=f"{RESULTS}/{{run}}/generator.safetensors",
        record=f"{RESULTS}/{{run}}/generator.json",
        networks=f"{RESULTS}/{{run}}/networks.safetensors",
        snapshots=f"{RESULTS}/{{run}}/snapshots.json",
        train_log=f"{RESULTS}/{{run}}/train_log.jsonl",
    log:
        f"{LOGS}/train/{{run}}.log",
    wildcard_constraints:
        run=one_run_of(run for run in TARGETS.runs if run not in TARGETS.imported),
    priority: 10
    conda:
        "../../environment.yml"
    resources:
        gpu=gpus,
        state="state",
    params:
        spec=spec("train", "{run}"),
        pairs=lambda wildcards, input: f"--pairs {input.pairs}" if input.pairs else "",
        start=lambda wildcards, input: f"--start {input.start}" if input.start else "",
    shell:
        "launch.sh {resources.gpu} --preset {wildcards.preset} --log {log} --threads {threads} train --spec {params.spec:q}"
        " --teacher {input.teacher} --latents {input.latents} {params.pairs} {params.start}"
        " --state {resources.state} --generator {output.generator} --networks {output.networks}"
        " --snapshots {output.snapshots} --train-log {output.train_log}"


rule import_student:
    input:
        source=ancient(released),
    output:
        generator=f"{RESULTS}/{{run}}/generator.safetensors",
        record=f"{RESULTS}/{{run}}/generator.json",
    log:
        f"{LOGS}/import/{{run}}.log",
    wildcard_constraints:
        run=one_of(TARGETS.imported),
    conda:
        "../../environment.yml"
    params:
        spec=spec("train", "{run}"),
    shell:
        "launch.sh 0 --log {log} import-student --spec {params.spec:q} --generator {output.generator}"


rule import_networks:
    input:
        source=ancient(released),
    output:
        networks=f"{RESULTS}/{{run}}/networks.safetensors",
    log:
        f"{LOGS}/import/{{run}}-networks.log",
    wildcard_constraints:
        run=one_of(TARGETS.imported),
    conda:
        "../../environment.yml"
    params:
        spec=spec("train", "{run}"),
    shell:
        "launch.sh 0 --log {log} import-student --spec {params.spec:q} --networks {output.networks}"
