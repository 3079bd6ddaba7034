# From outside to shards of images, and from those to shards in the teacher's space.


rule download:
    output:
        # Not the file itself: Snakemake deletes outputs before a job, and it may be one that the user has put there.
        record=local(f"{DOWNLOADS}/{{name}}.json"),  # stays here, beside the file
    log:
        "logs/downloads/{name}.log",
    wildcard_constraints:
        name=one_of(CATALOGUE),
    priority: 30
    localrule: True  # a cluster's nodes may have no connection
    conda:
        "../../environment.yml"
    params:
        entry=lambda wildcards: CATALOGUE[wildcards.name].model_dump_json(
            exclude_none=True
        ),
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} download {wildcards.name:q} --entry {params.entry:q} --record {output.record:q}'


rule shards:
    input:
        source=ancient(supplied_key("data.path", f"{DATA}/shards/manifest.json")),
        annotations=ancient(
            supplied_key("data.annotations", f"{DATA}/shards/manifest.json")
        ),
    output:
        manifest=f"{DATA}/shards/manifest.json",
    log:
        f"{LOGS}/shards.log",
    conda:
        "../../environment.yml"
    threads: preset_key(lambda preset: 16 if preset.data.path else 1)
    # Where the data are and how many images may be left out starts nothing again, so they are no parameters.
    resources:
        source=preset_key(lambda preset: preset.data.path or ""),
        max_unreadable=preset_key(lambda preset: preset.data.max_unreadable),
        max_passed_over=preset_key(lambda preset: preset.data.max_passed_over),
    params:
        spec=spec("shards"),
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} shards --spec {params.spec:q} --source={resources.source:q}'
        " --max-unreadable {resources.max_unreadable:q} --max-passed-over {resources.max_passed_over:q}"
        " --workers {threads} --manifest {output.manifest:q}"


use rule shards as reference_shards with:
    input:
        source=ancient(
            supplied_key(
                "reference_data.path", f"{DATA}/reference_shards/manifest.json"
            )
        ),
        annotations=ancient(
            supplied_key(
                "reference_data.annotations", f"{DATA}/reference_shards/manifest.json"
            )
        ),
    output:
        manifest=f"{DATA}/reference_shards/manifest.json",
    log:
        f"{LOGS}/reference_shards.log",
    resources:
        source=preset_key(lambda preset: preset.reference_data.path or ""),
        max_unreadable=preset_key(lambda preset: preset.reference_data.max_unreadable),
        max_passed_over=preset_key(lambda preset: preset.reference_data.max_passed_over),
    params:
        spec=spec("reference_shards"),


rule components:
    input:
        images=component_data,
        source=ancient(
            supplied_key("teacher.weights", f"{RESULTS}/components/components.json")
        ),
    output:
        record=f"{RESULTS}/components/components.json",
    log:
        f"{LOGS}/components.log",
    priority: 30
    conda:
        "../../environment.yml"
    params:
        spec=spec("components"),
        images=lambda wildcards, input: (
            f"--images {input.images}" if input.images else ""
        ),
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} --threads {threads} components --spec {params.spec:q} {params.images} --record {output.record:q}'


rule latents:
    input:
        images=rules.shards.output.manifest,
        components=components_of,
    output:
        manifest=f"{DATA}/latents/manifest.json",
    log:
        f"{LOGS}/latents.log",
    conda:
        "../../environment.yml"
    resources:
        gpu=latents_gpus,
    params:
        spec=spec("latents"),
        components=components_option,
    shell:
        'exec bash "$DMD2_LAUNCH" {resources.gpu:q} --preset {wildcards.preset:q} --log {log:q} --threads {threads} latents --spec {params.spec:q}'
        " --images {input.images:q} {params.components} --manifest {output.manifest:q}"
