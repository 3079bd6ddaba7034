# Samples and their metrics. An entry is a model with a sampler: teacher/ode, dmd2/student.
# Metrics of streamed samples are made from the weights; only the samples of a sheet are stored.
STREAMED = PRESET.evaluation.streamed
# Of each process beside a device, for the statistics.
THREADS = 8 if PRESET.gpus else 1


rule features:
    input:
        images=[] if PRESET.features.weights else rules.shards.output.manifest,
        source=ancient(
            supplied(
                PRESET.features.weights and PRESET.features.weights.path,
                "features.weights.path",
                f"{RESULTS}/features/extractor.weights",
            )
        ),
    output:
        weights=f"{RESULTS}/features/extractor.weights",
        record=f"{RESULTS}/features/extractor.json",
    log:
        f"{LOGS}/features.log",
    conda:
        "../../environment.yml"
    params:
        spec=spec("features"),
        images=lambda wildcards, input: (
            f"--images {input.images}" if input.images else ""
        ),
    shell:
        "launch.sh 0 --log {log} --threads {threads} features --spec {params.spec:q}"
        " {params.images} --weights {output.weights}"


rule reference:
    input:
        images=rules.shards.output.manifest,
        extractor=rules.features.output.weights,
        published=ancient(
            supplied(
                PRESET.features.reference and PRESET.features.reference.path,
                "features.reference.path",
                f"{RESULTS}/features/reference.npz",
            )
        ),
    output:
        stats=f"{RESULTS}/features/reference.npz",
        record=f"{RESULTS}/features/reference.json",
    log:
        f"{LOGS}/reference.log",
    conda:
        "../../environment.yml"
    threads: THREADS
    resources:
        gpu=min(PRESET.gpus, 1),
    params:
        spec=spec("reference"),
    shell:
        "launch.sh {resources.gpu} --log {log} --threads {threads} reference --spec {params.spec:q}"
        " --images {input.images} --extractor {input.extractor} --out {output.stats}"


rule sample:
    input:
        weights=weights_of,
    output:
        manifest=f"{RESULTS}/{{model}}/{{sampler}}/samples/manifest.json",
    log:
        f"{LOGS}/sample/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    resources:
        gpu=PRESET.gpus,
    params:
        spec=lambda wildcards: user_errors_stop_planning(PLAN.sample, entry_of(wildcards)).to_json(),
    shell:
        "launch.sh {resources.gpu} --log {log} --threads {threads} sample --spec {params.spec:q}"
        " --weights {input.weights} --manifest {output.manifest}"


rule metrics:
    input:
        samples=[] if STREAMED else rules.sample.output.manifest,
        weights=weights_of if STREAMED else [],
        reference=rules.reference.output.stats,
        extractor=rules.features.output.weights,
    output:
        f"{RESULTS}/{{model}}/{{sampler}}/metrics.json",
    log:
        f"{LOGS}/metrics/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    threads: THREADS
    resources:
        gpu=PRESET.gpus if STREAMED else min(PRESET.gpus, 1),
        state="state",
    params:
        spec=lambda wildcards: user_errors_stop_planning(PLAN.metrics, entry_of(wildcards)).to_json(),
        source=lambda wildcards, input: (
            f"--weights {input.weights}" if STREAMED else f"--samples {input.samples}"
        ),
    shell:
        "launch.sh {resources.gpu} --log {log} --threads {threads} metrics --spec {params.spec:q} {params.source}"
        " --reference {input.reference} --extractor {input.extractor} --state {resources.state} --out {output}"


rule floor:
    input:
        reference=rules.reference.output.stats,
        extractor=rules.features.output.weights,
    output:
        f"{RESULTS}/floor/metrics.json",
    log:
        f"{LOGS}/metrics/floor.log",
    conda:
        "../../environment.yml"
    threads: THREADS
    params:
        spec=lambda wildcards: user_errors_stop_planning(PLAN.metrics, "floor").to_json(),
    shell:
        "launch.sh 0 --log {log} --threads {threads} metrics --spec {params.spec:q}"
        " --reference {input.reference} --extractor {input.extractor} --state state --out {output}"


rule curve:
    input:
        snapshots=rules.train.output.snapshots,
        reference=rules.reference.output.stats,
        extractor=rules.features.output.weights,
    output:
        f"{RESULTS}/{{run}}/curve.csv",
    log:
        f"{LOGS}/curve/{{run}}.log",
    conda:
        "../../environment.yml"
    threads: THREADS
    resources:
        gpu=PRESET.gpus,
        state="state",
    params:
        spec=lambda wildcards: user_errors_stop_planning(PLAN.curve, wildcards.run).to_json(),
    shell:
        "launch.sh {resources.gpu} --log {log} --threads {threads} curve --spec {params.spec:q}"
        " --snapshots {input.snapshots} --reference {input.reference} --extractor {input.extractor}"
        " --state {resources.state} --out {output}"


rule select:
    input:
        curve=curve_of,
        snapshots=rules.train.output.snapshots,
        generator=rules.train.output.generator,
    output:
        weights=f"{RESULTS}/{{run}}/{{sampler}}/snapshot.safetensors",
        record=f"{RESULTS}/{{run}}/{{sampler}}/snapshot.json",
    log:
        f"{LOGS}/select/{{run}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: user_errors_stop_planning(
            PLAN.select, f"{wildcards.run}/{wildcards.sampler}"
        ).to_json(),
        curve=lambda wildcards, input: f"--curve {input.curve}" if input.curve else "",
    shell:
        "launch.sh 0 --log {log} select --spec {params.spec:q} {params.curve} --snapshots {input.snapshots}"
        " --generator {input.generator} --weights {output.weights}"
