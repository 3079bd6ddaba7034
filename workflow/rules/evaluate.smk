# Samples and their metrics. An entry is a model with a sampler: teacher/ode, dmd2/student.


rule features:
    input:
        images=rules.shards.output.manifest,
    output:
        weights=f"{RESULTS}/features/extractor.weights",
        record=f"{RESULTS}/features/extractor.json",
    log:
        f"{LOGS}/features.log",
    conda:
        "../../environment.yml"
    params:
        spec=spec("features"),
    shell:
        "launch.sh 0 --log {log} --threads {threads} features --spec {params.spec:q}"
        " --images {input.images} --weights {output.weights}"


rule reference:
    input:
        images=rules.shards.output.manifest,
        extractor=rules.features.output.weights,
    output:
        stats=f"{RESULTS}/features/reference.npz",
        record=f"{RESULTS}/features/reference.json",
    log:
        f"{LOGS}/reference.log",
    conda:
        "../../environment.yml"
    params:
        spec=spec("reference"),
    shell:
        "launch.sh 0 --log {log} --threads {threads} reference --spec {params.spec:q}"
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
        spec=lambda wildcards: or_stop(PLAN.sample, entry_of(wildcards)).to_json(),
    shell:
        "launch.sh {resources.gpu} --log {log} --threads {threads} sample --spec {params.spec:q}"
        " --weights {input.weights} --manifest {output.manifest}"


rule metrics:
    input:
        samples=rules.sample.output.manifest,
        reference=rules.reference.output.stats,
        extractor=rules.features.output.weights,
    output:
        f"{RESULTS}/{{model}}/{{sampler}}/metrics.json",
    log:
        f"{LOGS}/metrics/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: or_stop(PLAN.metrics, entry_of(wildcards)).to_json(),
    shell:
        "launch.sh 0 --log {log} --threads {threads} metrics --spec {params.spec:q} --samples {input.samples}"
        " --reference {input.reference} --extractor {input.extractor} --out {output}"


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
    params:
        spec=lambda wildcards: or_stop(PLAN.metrics, "floor").to_json(),
    shell:
        "launch.sh 0 --log {log} --threads {threads} metrics --spec {params.spec:q}"
        " --reference {input.reference} --extractor {input.extractor} --out {output}"


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
    resources:
        gpu=min(PRESET.gpus, 1),
    params:
        spec=lambda wildcards: or_stop(PLAN.curve, wildcards.run).to_json(),
    shell:
        "launch.sh {resources.gpu} --log {log} --threads {threads} curve --spec {params.spec:q}"
        " --snapshots {input.snapshots} --reference {input.reference} --extractor {input.extractor} --out {output}"
