# What people look at: curves, sheets of samples and the configuration, all of them in `snakemake --report`.


rule curves:
    input:
        logs=of_students("train_log.jsonl"),
        curves=of_students("curve.csv"),
        real=rules.shards.output.manifest,
    output:
        training=report(
            f"{RESULTS}/figures/curves.svg",
            caption="../report/curves.rst",
            category="Training",
            labels={"preset": "{preset}", "figure": "losses and diagnostics"},
        ),
        brightness=report(
            f"{RESULTS}/figures/brightness.svg",
            caption="../report/brightness.rst",
            category="Training",
            labels={
                "preset": "{preset}",
                "figure": "brightness (as the paper's figure 8)",
            },
        ),
        quality=report(
            f"{RESULTS}/figures/fid_curve.svg",
            caption="../report/fid_curve.rst",
            category="Training",
            labels={
                "preset": "{preset}",
                "figure": "distance against training (as the paper's figure 9)",
            },
        ),
    log:
        f"{LOGS}/curves.log",
    conda:
        "../../environment.yml"
    params:
        samples=preset_key(lambda preset: preset.evaluation.curve_samples),
        logs=lambda wildcards, input: named_students("--log", wildcards, input.logs),
        curves=lambda wildcards, input: named_students(
            "--curve", wildcards, input.curves
        ),
        folder=lambda wildcards, output: Path(output.training).parent,
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} curves {params.logs} {params.curves} --real {input.real:q} --folder {params.folder}'


rule grid:
    input:
        rules.sample.output.manifest,
    output:
        report(
            f"{RESULTS}/{{model}}/{{sampler}}/grid.png",
            caption="../report/grid.rst",
            category="Samples",
            labels={"preset": "{preset}", "model": "{model}", "sampler": "{sampler}"},
        ),
    log:
        f"{LOGS}/grid/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} grid --manifest {input:q} --out {output:q}'


rule real_grid:
    input:
        reference_images,
    output:
        report(
            f"{RESULTS}/figures/real.png",
            caption="../report/grid.rst",
            category="Samples",
            labels={"preset": "{preset}", "model": "real images", "sampler": ""},
        ),
    log:
        f"{LOGS}/grid/real.log",
    conda:
        "../../environment.yml"
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} grid --manifest {input:q} --out {output:q}'


rule compare:
    input:
        real=reference_images,
        samples=lambda wildcards: list(panels_of(wildcards).values()),
    output:
        report(
            f"{RESULTS}/figures/compare.png",
            caption="../report/compare.rst",
            category="Samples",
            labels={"preset": "{preset}", "model": "side by side", "sampler": ""},
        ),
    log:
        f"{LOGS}/compare.log",
    conda:
        "../../environment.yml"
    params:
        panels=lambda wildcards, input: [
            f"{title}={file}"
            for title, file in zip(panels_of(wildcards), input.samples)
        ],
    shell:
        "exec bash \"$DMD2_LAUNCH\" 0 --log {log:q} compare --out {output:q} 'real images'={input.real:q} {params.panels:q}"


rule configuration:
    output:
        report(
            f"{RESULTS}/config.yaml",
            caption="../report/config.rst",
            category="Configuration",
            labels={"preset": "{preset}"},
        ),
    log:
        f"{LOGS}/configuration.log",
    conda:
        "../../environment.yml"
    params:
        preset=preset_key(
            lambda preset: json.dumps(preset.model_dump(mode="json"), sort_keys=True)
        ),
        runs=lambda wildcards: json.dumps(
            {
                run: plan_of(wildcards).run(run).model_dump(mode="json")
                for run in TARGETS.students(wildcards.preset)
            },
            sort_keys=True,
        ),
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} configuration {params.preset:q} {params.runs:q} --out {output:q}'
