# Samples and their metrics. An entry is a model with a sampler: teacher/ode, dmd2/student.


rule features:
    input:
        images=extractor_data,
        source=ancient(
            supplied_key(
                "features.weights.path", f"{RESULTS}/features/extractor.weights"
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
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} --threads {threads} features --spec {params.spec:q}'
        " {params.images} --weights {output.weights:q}"


rule reference:
    input:
        images=reference_images,
        extractor=rules.features.output.weights,
        published=ancient(
            supplied_key(
                "features.reference.path", f"{RESULTS}/features/reference.npz"
            )
        ),
    output:
        stats=f"{RESULTS}/features/reference.npz",
        record=f"{RESULTS}/features/reference.json",
    log:
        f"{LOGS}/reference.log",
    conda:
        "../../environment.yml"
    threads: statistics_threads
    resources:
        gpu=one_gpu,
    params:
        spec=spec("reference"),
    shell:
        'exec bash "$DMD2_LAUNCH" {resources.gpu:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} reference --spec {params.spec:q}'
        " --images {input.images:q} --extractor {input.extractor:q} --out {output.stats:q}"


rule sample:
    input:
        weights=weights_of,
        components=components_of,
        prompts=ancient(
            supplied_key(
                "evaluation.prompts.path",
                f"{RESULTS}/{{model}}/{{sampler}}/samples/manifest.json",
            )
        ),
    output:
        manifest=f"{RESULTS}/{{model}}/{{sampler}}/samples/manifest.json",
    log:
        f"{LOGS}/sample/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    resources:
        gpu=gpus,
    params:
        spec=spec("sample", ENTRY),
        components=components_option,
    shell:
        'exec bash "$DMD2_LAUNCH" {resources.gpu:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} sample --spec {params.spec:q}'
        " --weights {input.weights:q} {params.components} --manifest {output.manifest:q}"


rule metrics:
    input:
        source=metrics_source,
        components=lambda wildcards: (
            components_of(wildcards) if is_streamed(wildcards) else []
        ),
        prompts=ancient(
            supplied_key(
                "evaluation.prompts.path",
                f"{RESULTS}/{{model}}/{{sampler}}/metrics.json",
            )
        ),
        clip=ancient(
            supplied_key(
                "evaluation.clip.weights.path",
                f"{RESULTS}/{{model}}/{{sampler}}/metrics.json",
            )
        ),
        perceptual=ancient(
            supplied_key(
                "evaluation.vgg_weights.path",
                f"{RESULTS}/{{model}}/{{sampler}}/metrics.json",
            )
        ),
        reference=rules.reference.output.stats,
        extractor=rules.features.output.weights,
    output:
        f"{RESULTS}/{{model}}/{{sampler}}/metrics.json",
    log:
        f"{LOGS}/metrics/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    threads: statistics_threads
    resources:
        gpu=lambda wildcards: (gpus if is_streamed(wildcards) else one_gpu)(wildcards),
        state="state",
    params:
        spec=spec("metrics", ENTRY),
        components=components_option,
        source=lambda wildcards, input: (
            f"--{'weights' if is_streamed(wildcards) else 'samples'} {input.source}"
        ),
    shell:
        'exec bash "$DMD2_LAUNCH" {resources.gpu:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} metrics --spec {params.spec:q} {params.source} {params.components}'
        " --reference {input.reference:q} --extractor {input.extractor:q} --state {resources.state:q} --out {output:q}"


# It takes all cores, so that nothing else runs here while it measures.
rule latency:
    input:
        weights=weights_of,
        components=components_of,
        prompts=ancient(
            supplied_key(
                "evaluation.prompts.path",
                f"{RESULTS}/{{model}}/{{sampler}}/latency.json",
            )
        ),
    output:
        f"{RESULTS}/{{model}}/{{sampler}}/latency.json",
    log:
        f"{LOGS}/latency/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    threads: all_cores
    resources:
        gpu=one_gpu,
    params:
        spec=spec("latency", ENTRY),
        components=components_option,
    shell:
        'exec bash "$DMD2_LAUNCH" {resources.gpu:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} latency --spec {params.spec:q}'
        " --weights {input.weights:q} {params.components} --out {output:q}"


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
    threads: statistics_threads
    params:
        spec=spec("metrics", "floor"),
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} --threads {threads} metrics --spec {params.spec:q}'
        " --reference {input.reference:q} --extractor {input.extractor:q} --state state --out {output:q}"


rule curve:
    input:
        snapshots=rules.train.output.snapshots,
        components=components_of,
        reference=rules.reference.output.stats,
        extractor=rules.features.output.weights,
    output:
        f"{RESULTS}/{{run}}/curve.csv",
    log:
        f"{LOGS}/curve/{{run}}.log",
    conda:
        "../../environment.yml"
    threads: statistics_threads
    resources:
        gpu=gpus,
        state="state",
    params:
        spec=spec("curve", "{run}"),
        components=components_option,
    shell:
        'exec bash "$DMD2_LAUNCH" {resources.gpu:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} curve --spec {params.spec:q}'
        " --snapshots {input.snapshots:q} {params.components} --reference {input.reference:q} --extractor {input.extractor:q}"
        " --state {resources.state:q} --out {output:q}"


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
        spec=spec("select", "{run}/{sampler}"),
        curve=lambda wildcards, input: f"--curve {input.curve}" if input.curve else "",
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} select --spec {params.spec:q} {params.curve} --snapshots {input.snapshots:q}'
        " --generator {input.generator:q} --weights {output.weights:q}"
