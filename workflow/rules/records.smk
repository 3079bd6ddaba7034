# Before it decides which jobs run, Snakemake hears what the records say: also without its own memory in `.snakemake`.
# Snakemake has no hooks around the building of its graph, so two functions of it are wrapped; its version is pinned.
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
    """Decides between building the graph and running it what the records say."""

    @wraps(update_needrun)
    async def update(dag, create_inventory=False):
        if dag.workflow is workflow and create_inventory and workflow.is_main_process:
            await plan_by_records(dag, differs, lambda seconds: Mtime(local=seconds))
        await update_needrun(dag, create_inventory=create_inventory)

    return update


def with_known_targets(init):
    """Refuses a target of an unknown table, preset or run in one line, before Snakemake finds no rule for it."""

    @wraps(init)
    async def checked(dag, *arguments, **options):
        if dag.workflow is workflow and workflow.is_main_process:
            user_errors_stop_planning(
                TARGETS.check_requested, workflow.dag_settings.targets
            )
        await init(dag, *arguments, **options)

    return checked


DAG.init = with_known_targets(DAG.init)
DAG.update_needrun = with_records(DAG.update_needrun)
