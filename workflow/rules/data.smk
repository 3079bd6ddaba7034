# From the source to shards of images, and from those to shards in the teacher's space.


rule shards:
    output:
        manifest=f"{DATA}/shards/manifest.json",
    log:
        f"{LOGS}/shards.log",
    conda:
        "../../environment.yml"
    params:
        spec=spec("shards"),
    shell:
        "launch.sh 0 --log {log} --threads {threads} shards --spec {params.spec:q} --manifest {output.manifest}"


rule latents:
    input:
        images=rules.shards.output.manifest,
    output:
        manifest=f"{DATA}/latents/manifest.json",
    log:
        f"{LOGS}/latents.log",
    conda:
        "../../environment.yml"
    params:
        spec=spec("latents"),
    shell:
        "launch.sh 0 --log {log} --threads {threads} latents --spec {params.spec:q}"
        " --images {input.images} --manifest {output.manifest}"
