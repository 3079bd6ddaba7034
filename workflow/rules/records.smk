# Before it decides which jobs run, Snakemake hears what the records say: also without its own memory in `.snakemake`.
from functools import wraps

from snakemake.dag import DAG
from snakemake_interface_storage_plugins.io import Mtime

from dmd2.lineage.replanning import is_configuration, plan_by_records


def of_other_data(manifest, data):
    """Whether shards are of other data than `data.path` has now."""
    if data.path is None:
        return False
    from dmd2.datasets.origin import is_of_other_data

    return user_errors_stop_planning(is_of_other_data, Path(manifest), data)


def differs(job):
    """What no digest tells: another configuration in the report, other images in the source of the shards."""
    if job.rule.name == "configuration":
        return not is_configuration(job.params.preset, job.params.runs, job.output[0])
    if job.rule.name == "shards":
        return of_other_data(job.output.manifest, plan_of(job.wildcards).preset.data)
    if job.rule.name == "reference_shards":
        return of_other_data(
            job.output.manifest, plan_of(job.wildcards).preset.reference_data
        )
    return False


def with_records(update_needrun):
    """Snakemake has no hook between building its graph and deciding; its version is pinned."""

    @wraps(update_needrun)
    async def update(dag, create_inventory=False):
        if dag.workflow is workflow and create_inventory and workflow.is_main_process:
            await plan_by_records(dag, differs, lambda seconds: Mtime(local=seconds))
        await update_needrun(dag, create_inventory=create_inventory)

    return update


DAG.update_needrun = with_records(DAG.update_needrun)
