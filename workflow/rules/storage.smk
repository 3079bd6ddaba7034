# Results in a store (`--default-storage-provider s3`): everything that a rule writes is declared.
#
# On a mounted disk a rule's output is the file that is written last, a manifest or a record, and what lies beside it
# stays when a job is started again: finished shards of an interrupted job, for one. A store only gets what is declared,
# so with one the companions of outputs become outputs, and those of inputs inputs. Local files are left as they were.
from snakemake.io import directory

from dmd2.lineage.companions import companions

STORED = workflow.storage_settings.default_storage_provider


def with_companions_of(paths):
    """A function of wildcards: what lies beside the given outputs of other rules (texts, or functions of wildcards)."""

    def found(wildcards):
        values = [path(wildcards) if callable(path) else path for path in paths]
        flat = [
            item
            for value in values
            for item in ([value] if isinstance(value, str) else value)
        ]
        filled = [str(item).format(**dict(wildcards.items())) for item in flat]
        beside = {file: None for item in filled for file, _ in companions(item)}
        return [file for file in beside if file not in filled]

    return found


def declare_companions(rule):
    """Adds to a rule what lies beside its outputs and inputs."""
    own = [str(path) for path in rule.output]
    beside = {
        file: whole_folder for path in own for file, whole_folder in companions(path)
    }
    for file, whole_folder in beside.items():
        if file not in own:
            rule.set_output(directory(file) if whole_folder else file)
    given = [
        getattr(path, "callable", None) or str(path)
        for path in rule.input
        if not getattr(path, "flags", {}).get("local")
    ]
    rule.set_input(with_companions_of(given))
