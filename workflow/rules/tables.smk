# One table of the paper per file of workflow/tables: the paper's figures and what was measured here, side by side.
from hashlib import sha256


rule table:
    input:
        metrics=metrics_files,
        source=os.path.relpath(FOLDER / "tables/{table}.yaml"),  # so that a moved checkout has nothing to do
    output:
        csv=report(
            "results/{table}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}", "form": "CSV"},
        ),
        markdown="results/{table}.md",
    log:
        f"{LOGS}/tables/{{table}}.log",
    conda:
        "../../environment.yml"
    params:
        spec=lambda wildcards: user_errors_stop_planning(PLAN.table, ENTRIES[wildcards.table]).to_json(),
        content=lambda wildcards, input: sha256(
            Path(input.source).read_bytes()
        ).hexdigest()[:16],
        metrics=lambda wildcards: [
            f"--metrics {entry}={metrics_file(entry)}"
            for entry in entries_of(wildcards)
        ],
    shell:
        "launch.sh 0 --log {log} table --spec {params.spec:q} --source {input.source} {params.metrics}"
        " --csv {output.csv} --markdown {output.markdown}"
