# One student per run, trained here or imported. Checkpoints are no output: they are stored in the state folder,
# named by the spec's digest, so that neither a failed job nor Snakemake removes them, and a changed configuration never
# finds them.


rule train:
    input:
        teacher=rules.teacher.output.weights,
        components=components_of,
        latents=rules.latents.output.manifest,
        prompts=ancient(
            supplied_key("prompts.path", f"{RESULTS}/{{run}}/generator.safetensors")
        ),
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
        gpu=gpus_of_all_nodes,
        nodes=nodes,
        processes=gpus,  # on each
        state="state",
    params:
        spec=spec("train", "{run}"),
        components=components_option,
        pairs=lambda wildcards, input: f"--pairs {input.pairs}" if input.pairs else "",
        start=lambda wildcards, input: f"--start {input.start}" if input.start else "",
    shell:
        'DMD2_NODES={resources.nodes} exec bash "$DMD2_LAUNCH" {resources.processes:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} train --spec {params.spec:q}'
        " --teacher {input.teacher:q} --latents {input.latents:q} {params.components} {params.pairs} {params.start}"
        " --state {resources.state:q} --generator {output.generator:q} --networks {output.networks:q}"
        " --snapshots {output.snapshots:q} --train-log {output.train_log:q}"


rule import_student:
    input:
        source=ancient(released),
        teacher=base_of,
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
        teacher=lambda wildcards, input: (
            f"--teacher {input.teacher}" if input.teacher else ""
        ),
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} import-student --spec {params.spec:q} {params.teacher} --generator {output.generator:q}'


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
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} import-student --spec {params.spec:q} --networks {output.networks:q}'
