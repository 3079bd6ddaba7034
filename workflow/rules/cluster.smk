# What each job requests from Slurm: the site file's answer to its rule, GPUs, machines and threads. Only with the profile
# profiles/slurm, which names the site file; what a profile or the command line sets by --set-resources stays.
from dmd2.slurm import REQUESTED, check_site, check_status_command, read_site


def site_file():
    """The site file that the profile names by the default resource `site`, or None."""
    named = workflow.resource_settings._parsed_default_resources.get("site").raw
    return named and next(
        (
            path
            for path in (Path(named), Path(workflow.basedir) / named)
            if path.exists()
        ),
        Path(named),
    )


def request_from_slurm(stage, site):
    """Gives a rule the resources that the site file has for it."""
    chosen = set(
        workflow.resource_settings._parsed_overwrite_resources.get(stage.name, {})
    )
    gpu, nodes = stage.resources.get("gpu"), stage.resources.get("nodes")

    def requested(name):
        def value(wildcards, threads, **aux):
            def of(resource):
                return resource.evaluate(wildcards, threads=threads, **aux).value

            num_nodes = of(nodes) or 1
            return site.request(stage.name, of(gpu) or 0, num_nodes, threads).get(name)

        return value

    given = (
        set(stage.resources) - {"mem_mb"} | chosen
    )  # Snakemake has a default for memory
    for name in REQUESTED:
        if name not in given:
            stage.resources[name] = requested(name)
    if gpu.is_evaluable() and "nodes" not in stage.resources:
        stage.resources["nodes"] = 1  # else Slurm may spread a job's GPUs over several
    if "state" in stage.resources and "state" not in chosen:
        stage.resources["state"] = site.state


def keep_start_times():
    """Notes when a job began on its node, which `dmd2 times` and `dmd2 costs` count from.

    On the node Snakemake removes the mark of a job that runs, whose age the call that submitted it takes for the start.
    """
    from snakemake.persistence.file import FilePersistence

    unmark = FilePersistence._unmark_incomplete
    recorded = FilePersistence._get_recorded_starttime

    def folder(memory):
        return memory.path / "started"

    def note_and_unmark(self, key):
        mark = Path(self._record_path(self._incomplete_path, key))
        if not workflow.is_main_process and mark.exists():
            folder(self).mkdir(exist_ok=True)
            self._io_write(folder(self), mark.stat().st_mtime, key)
        unmark(self, key)

    def noted(self, key):
        if not (start := self._io_read(folder(self), key)):
            return recorded(self, key)
        self._io_delete(folder(self), key)
        return start

    FilePersistence._unmark_incomplete = note_and_unmark
    FilePersistence._get_recorded_starttime = noted


SITE_FILE = site_file()
if SITE_FILE:
    keep_start_times()
    SITE = user_errors_stop_planning(read_site, SITE_FILE)
    for stage in workflow.rules:
        request_from_slurm(stage, SITE)


def check_cluster(gpus):
    """Stops before the first job if the site file does not fit the cluster; `gpus` are the most on a node."""
    if SITE_FILE and workflow.executor_plugin.name == "slurm":
        user_errors_stop_planning(check_site, SITE, str(SITE_FILE), gpus)
        user_errors_stop_planning(
            check_status_command, workflow.executor_settings.status_command
        )
        keep_jobs_while_slurm_is_silent()


def keep_jobs_while_slurm_is_silent():
    """Version 2.8 of the executor forgets every job when five questions in a row fail, and then waits for ever.

    An answer without jobs leaves them as they are until the next question.
    """
    import snakemake_executor_plugin_slurm as plugin

    query = plugin.query_job_status

    async def query_again_later(command, logger):
        status, seconds = await query(command, logger)
        if status is None:
            logger.warning(
                "Slurm does not answer; jobs go on, and the question is repeated"
            )
            return {}, 0.0
        return status, seconds

    plugin.query_job_status = query_again_later
