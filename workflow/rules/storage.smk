# Results in a store (`--default-storage-provider s3`): everything that a rule writes is declared.
#
# On a mounted disk a rule's output is the file that is written last, a manifest or a record, and what is beside it
# stays when a job is started again: finished shards of an interrupted job, for one. A store only gets what is declared,
# so with one the companions of outputs become outputs, and those of inputs inputs. Without one nothing changes.
from dmd2.lineage.companions import companions

PREFIX = (workflow.storage_settings.default_storage_prefix or "").rstrip("/")


def in_workflow(path):
    """The path that its rule names, of one that is in the store."""
    stored = getattr(path, "flags", {}).get("storage_object")
    return str(path) if stored is None else str(stored.query).removeprefix(f"{PREFIX}/")


def beside(given):
    """A function of wildcards: the companions of inputs, which are paths or functions of wildcards."""

    def found(wildcards):
        values = [item(wildcards) if callable(item) else item for item in given]
        flat = [
            path
            for value in values
            for path in ([value] if isinstance(value, str) else value)
        ]
        known = dict(wildcards.items())
        filled = [in_workflow(path).format(**known) for path in flat]
        wanted = {file: None for path in filled for file, _ in companions(path)}
        return [file for file in wanted if file not in filled]

    return found


def declare_companions(of):
    """Adds to a rule what is beside its outputs and inputs."""
    own = [in_workflow(path) for path in of.output]
    for file, is_folder in dict.fromkeys(
        item for path in own for item in companions(path)
    ):
        if file not in own:
            of.set_output(directory(file) if is_folder else file)
    if of.output and of.input:
        of.set_input(
            beside([getattr(item, "callable", None) or item for item in of.input])
        )


if workflow.storage_settings.default_storage_provider:
    for each in list(workflow.rules):
        declare_companions(each)
