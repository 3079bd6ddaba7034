# What jobs wait for and which settings they get, as functions of their wildcards.


def supplied(path, key, output):
    """What a job waits for that reads `path` from outside and makes `output`: the record of a listed file, or nothing.

    `key` names the setting; `path` may be a model or weight file of the configuration. A path where there is nothing
    stops the planning, unless `output` is there already. Records are for `ancient`: one that is written again starts
    nothing.
    """
    done = Path(output).exists()
    record = user_errors_stop_planning(
        lambda: requirement(path, key, CATALOGUE, done=done)
    )
    return [] if record is None else local(str(record))


def supplied_key(key, output):
    """A function of wildcards: `supplied` for the file or model that the preset's `key` names, if it names one."""

    def record(wildcards):
        value = plan_of(wildcards).preset
        for part in key.split("."):
            value = value and getattr(value, part)
        return supplied(value, key, output.format(**dict(wildcards.items())))

    return record


def run_of(wildcards):
    return user_errors_stop_planning(plan_of(wildcards).run, wildcards.run)


def weights_of(wildcards):
    """The weights behind an entry."""
    plan, folder = plan_of(wildcards), RESULTS.format(preset=wildcards.preset)
    user_errors_stop_planning(plan.split, ENTRY.format(**dict(wildcards.items())))
    if wildcards.model == "teacher":
        return f"{folder}/teacher/teacher.safetensors"
    selected = plan.preset.samplers[wildcards.sampler].is_selected
    file = f"{wildcards.sampler}/snapshot" if selected else "generator"
    return f"{folder}/{wildcards.model}/{file}.safetensors"


def metrics_file(preset, entry):
    """The metrics record of an entry, or of the floor."""
    return f"results/{preset}/{entry}/metrics.json"


def table_metrics(wildcards):
    """The metric records that a table reads, by entry: all of them, or those that are there."""
    preset = TARGETS.preset_of(wildcards.table)
    files = {
        entry: metrics_file(preset, entry) for entry in TARGETS.entries(wildcards.table)
    }
    return {
        entry: file
        for entry, file in files.items()
        if not MEASURED_ALREADY or Path(file).exists()
    }


def table_latencies(wildcards):
    """The latency records that a table reads, by entry: all of them, or those that are there."""
    preset = TARGETS.preset_of(wildcards.table)
    files = {
        entry: f"results/{preset}/{entry}/latency.json"
        for entry in TARGETS.timed(wildcards.table)
    }
    return {
        entry: file
        for entry, file in files.items()
        if not MEASURED_ALREADY or Path(file).exists()
    }


def components_of(wildcards):
    """The record of the autoencoder and text encoders, for a text-to-image teacher."""
    path = f"{RESULTS}/components/components.json".format(preset=wildcards.preset)
    return path if plan_of(wildcards).has_components else []


def components_option(wildcards, input):
    return f"--components {input.components}" if input.components else ""


def component_data(wildcards):
    """The images, for components that are trained."""
    trained = plan_of(wildcards).preset.teacher.training is not None
    return (
        f"{DATA}/shards/manifest.json".format(preset=wildcards.preset)
        if trained
        else []
    )


def teacher_data(wildcards):
    """The latents, for a teacher that is trained."""
    trained = plan_of(wildcards).preset.teacher.training is not None
    return (
        f"{DATA}/latents/manifest.json".format(preset=wildcards.preset)
        if trained
        else []
    )


def teacher_processes(preset):
    """Processes, one thread each, that train the teacher of a preset on CPU."""
    training = preset.teacher.training
    return training.cpu_processes if training and not preset.gpus else 1


# An autoencoder runs on the GPUs; pixels need none.
latents_gpus = preset_key(
    lambda preset: preset.gpus if preset.teacher.kind == "diffusers" else 0
)
teacher_gpus = preset_key(lambda preset: preset.gpus if preset.teacher.training else 0)
teacher_nodes = preset_key(
    lambda preset: preset.nodes if preset.teacher.training else 1
)


def pairs_of(wildcards):
    """The teacher's pairs, for a run with a regression loss."""
    needs = run_of(wildcards).train.regression_weight > 0
    return (
        f"{DATA}/pairs/manifest.json".format(preset=wildcards.preset) if needs else []
    )


def start_of(wildcards):
    """The networks of the run that this one goes on from."""
    parent = run_of(wildcards).train.init_run
    folder = RESULTS.format(preset=wildcards.preset)
    return f"{folder}/{parent}/networks.safetensors" if parent else []


def base_of(wildcards):
    """The teacher's weights, for a released student that is adapters of them."""
    weights = run_of(wildcards).weights
    folder = RESULTS.format(preset=wildcards.preset)
    return f"{folder}/teacher/teacher.safetensors" if weights.lora_rank else []


def run_file(key, get):
    """A function of wildcards: the record of the file from outside that the run's `key` names, if it names one."""

    def record(wildcards):
        file = get(run_of(wildcards))
        output = f"{RESULTS}/{wildcards.run}/generator.safetensors"
        return supplied(
            file and file.path,
            f"run {wildcards.run}: {key}",
            output.format(preset=wildcards.preset),
        )

    return record


released = run_file("weights", lambda run: run.weights)


def reference_images(wildcards):
    """The images that samples are compared with."""
    own = plan_of(wildcards).preset.reference_data is not None
    folder = "reference_shards" if own else "shards"
    return f"{DATA}/{folder}/manifest.json".format(preset=wildcards.preset)


def extractor_data(wildcards):
    """The images, for an extractor that is trained."""
    trained = plan_of(wildcards).preset.features.weights is None
    return reference_images(wildcards) if trained else []


def metrics_source(wildcards):
    """What metrics are made of: stored samples, or the weights whose samples are streamed."""
    samples = f"{RESULTS}/{{model}}/{{sampler}}/samples/manifest.json".format(
        **dict(wildcards.items())
    )
    return weights_of(wildcards) if is_streamed(wildcards) else samples


def curve_of(wildcards):
    """What the best snapshot is chosen by; that of an iteration needs nothing."""
    best = plan_of(wildcards).preset.samplers[wildcards.sampler].checkpoint == "best"
    curve = f"{RESULTS}/{wildcards.run}/curve.csv".format(preset=wildcards.preset)
    return curve if best else []


def of_students(file):
    """A function of wildcards: that file of every student."""

    def paths(wildcards):
        folder = RESULTS.format(preset=wildcards.preset)
        runs = user_errors_stop_planning(TARGETS.students, wildcards.preset)
        return [f"{folder}/{run}/{file}" for run in runs]

    return paths


def named_students(option, wildcards, files):
    """`OPTION RUN=FILE` for every student."""
    return [
        f"{option} {run}={file}"
        for run, file in zip(TARGETS.students(wildcards.preset), files)
    ]


def panels_of(wildcards):
    """The sets of samples in the side-by-side sheet, by title."""
    panels = user_errors_stop_planning(TARGETS.panels, wildcards.preset)
    return {
        title: f"results/{wildcards.preset}/{entry}/samples/manifest.json"
        for title, entry in panels.items()
    }
