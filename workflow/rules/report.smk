# What people look at: curves, sheets of samples and the configuration, all of them in `snakemake --report`.


rule curves:
    input:
        logs=expand(f"{RESULTS}/{{run}}/train_log.jsonl", run=STUDENTS),
        curves=expand(f"{RESULTS}/{{run}}/curve.csv", run=STUDENTS),
        real=rules.shards.output.manifest,
    output:
        training=report(
            f"{RESULTS}/figures/curves.svg",
            caption="../report/curves.rst",
            category="Training",
            labels={"figure": "losses and diagnostics"},
        ),
        brightness=report(
            f"{RESULTS}/figures/brightness.svg",
            caption="../report/brightness.rst",
            category="Training",
            labels={"figure": "brightness (as the paper's figure 8)"},
        ),
        quality=report(
            f"{RESULTS}/figures/fid_curve.svg",
            caption="../report/fid_curve.rst",
            category="Training",
            labels={"figure": "distance against training (as the paper's figure 9)"},
        ),
    log:
        f"{LOGS}/curves.log",
    conda:
        "../../environment.yml"
    params:
        samples=PRESET.evaluation.curve_samples,
        logs=[f"--log {run}={RESULTS}/{run}/train_log.jsonl" for run in STUDENTS],
        curves=[f"--curve {run}={RESULTS}/{run}/curve.csv" for run in STUDENTS],
        folder=lambda wildcards, output: Path(output.training).parent,
    shell:
        "launch.sh 0 --log {log} curves {params.logs} {params.curves} --real {input.real} --folder {params.folder}"


rule grid:
    input:
        rules.sample.output.manifest,
    output:
        report(
            f"{RESULTS}/{{model}}/{{sampler}}/grid.png",
            caption="../report/grid.rst",
            category="Samples",
            labels={"model": "{model}", "sampler": "{sampler}"},
        ),
    log:
        f"{LOGS}/grid/{{model}}-{{sampler}}.log",
    conda:
        "../../environment.yml"
    shell:
        "launch.sh 0 --log {log} grid --manifest {input} --out {output}"


rule real_grid:
    input:
        rules.shards.output.manifest,
    output:
        report(
            f"{RESULTS}/figures/real.png",
            caption="../report/grid.rst",
            category="Samples",
            labels={"model": "real images", "sampler": ""},
        ),
    log:
        f"{LOGS}/grid/real.log",
    conda:
        "../../environment.yml"
    shell:
        "launch.sh 0 --log {log} grid --manifest {input} --out {output}"


rule compare:
    input:
        real=rules.shards.output.manifest,
        teacher=f"{RESULTS}/teacher/ode/samples/manifest.json",
        student=f"{RESULTS}/dmd2/student/samples/manifest.json",
        collapsed=f"{RESULTS}/noreg/student/samples/manifest.json",
    output:
        report(
            f"{RESULTS}/figures/compare.png",
            caption="../report/compare.rst",
            category="Samples",
            labels={"model": "side by side", "sampler": ""},
        ),
    log:
        f"{LOGS}/compare.log",
    conda:
        "../../environment.yml"
    shell:
        "launch.sh 0 --log {log} compare --out {output} --panel 'real images'={input.real}"
        " --panel 'teacher, ODE'={input.teacher} --panel 'DMD2, one step'={input.student}"
        " --panel 'no regression, 1:1'={input.collapsed}"


rule configuration:
    output:
        report(
            f"{RESULTS}/config.yaml",
            caption="../report/config.rst",
            category="Configuration",
        ),
    log:
        f"{LOGS}/configuration.log",
    conda:
        "../../environment.yml"
    params:
        preset=json.dumps(PRESET.model_dump(mode="json"), sort_keys=True),
        runs=lambda wildcards: json.dumps(
            {run: PLAN.run(run).model_dump(mode="json") for run in STUDENTS},
            sort_keys=True,
        ),
    shell:
        "launch.sh 0 --log {log} configuration {params.preset:q} {params.runs:q} --out {output}"
