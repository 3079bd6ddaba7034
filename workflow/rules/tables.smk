# One table of the paper per file of workflow/tables: the paper's figures and what was measured here, side by side.
from hashlib import sha256


rule table:
    input:
        metrics=lambda wildcards: list(table_metrics(wildcards).values()),
        latency=lambda wildcards: list(table_latencies(wildcards).values()),
        source=local(os.path.relpath(FOLDER / "tables/{table}.yaml")),  # so that a moved checkout has nothing to do
    output:
        csv=report(
            "results/{table}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "form": "CSV"},
        ),
        markdown="results/{table}.md",
    log:
        "logs/tables/{table}.log",
    conda:
        "../../environment.yml"
    params:
        preset=lambda wildcards: TARGETS.preset_of(wildcards.table) or "",  # for the caption
        spec=lambda wildcards: user_errors_stop_planning(
            TARGETS.table_spec, wildcards.table
        ).to_json(),
        content=lambda wildcards, input: sha256(
            Path(input.source).read_bytes()
            + " ".join(table_metrics(wildcards)).encode()
            + "".join(f" {entry}" for entry in table_latencies(wildcards)).encode()
        ).hexdigest()[:16],
        metrics=lambda wildcards, input: [
            f"--metrics {entry}={file}"
            for entry, file in zip(table_metrics(wildcards), input.metrics)
        ],
        latency=lambda wildcards, input: [
            f"--latency {entry}={file}"
            for entry, file in zip(table_latencies(wildcards), input.latency)
        ],
    shell:
        'exec bash "$DMD2_LAUNCH" 0 --log {log:q} table --spec {params.spec:q} --source {input.source:q} {params.metrics} {params.latency}'
        " --content {params.content} --csv {output.csv:q} --markdown {output.markdown:q}"
