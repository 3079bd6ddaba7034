# The teacher's weights, and its noise-image pairs for the original DMD.


rule teacher:
    input:
        latents=teacher_data,
        components=components_of,
        source=ancient(
            supplied_key("teacher.weights", f"{RESULTS}/teacher/teacher.safetensors")
        ),
    output:
        weights=f"{RESULTS}/teacher/teacher.safetensors",
        record=f"{RESULTS}/teacher/teacher.json",
        train_log=f"{RESULTS}/teacher/train_log.jsonl",
    log:
        f"{LOGS}/teacher.log",
    conda:
        "../../environment.yml"
    threads: preset_key(teacher_processes)
    resources:
        gpu=lambda wildcards: teacher_gpus(wildcards) * teacher_nodes(wildcards),
        nodes=teacher_nodes,
        # On each machine one process for each GPU, or several on CPU: as many as this call has cores for, with equal results.
        processes=lambda wildcards, threads: (
            teacher_gpus(wildcards) if threads == 1 else f"cpu:{threads}"
        ),
        state="state",
    params:
        spec=spec("teacher"),
        latents=lambda wildcards, input: (
            f"--latents {input.latents}" if input.latents else ""
        ),
        components=components_option,
    shell:
        'DMD2_NODES={resources.nodes} exec bash "$DMD2_LAUNCH" {resources.processes:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} teacher'
        " --spec {params.spec:q} {params.latents} {params.components} --state {resources.state:q} --weights {output.weights:q} --train-log {output.train_log:q}"


rule pairs:
    input:
        weights=rules.teacher.output.weights,
        record=rules.teacher.output.record,
        components=components_of,
        # No GPU hour before the images are known to be good. The path anew: `ancient` marks the very object it is given,
        # and with the shards rule's own output every job that reads the shards would be left alone when they change.
        images=ancient(f"{DATA}/shards/manifest.json"),
    output:
        manifest=f"{DATA}/pairs/manifest.json",
    log:
        f"{LOGS}/pairs.log",
    priority: 20  # the run that waits for them takes longest
    conda:
        "../../environment.yml"
    resources:
        gpu=gpus,
    params:
        spec=spec("pairs"),
        components=components_option,
    shell:
        'exec bash "$DMD2_LAUNCH" {resources.gpu:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} pairs --spec {params.spec:q}'
        " --teacher {input.weights:q} {params.components} --manifest {output.manifest:q}"
