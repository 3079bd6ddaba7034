"""Stages that train the teacher of a small data set, and students."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmd2.config import Runtime, Train
from dmd2.datasets.shards import content_id, read_manifest
from dmd2.errors import UserError
from dmd2.files import atomic, write_json, write_text
from dmd2.lineage.records import write_record
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Denoiser, Teacher
from dmd2.method.distillation import Distillation
from dmd2.method.graphed import graphed
from dmd2.method.inputs import Distance, Networks
from dmd2.method.teacher_fit import TeacherFit
from dmd2.metrics.perceptual import load_lpips
from dmd2.report.table_schema import TRAINING
from dmd2.stages import imports
from dmd2.stages.batches import data_batches, pair_batches, prompt_batches, with_cached_prompts
from dmd2.stages.open_weights import components_folder, open_teacher, open_weights
from dmd2.stages.state import check_students_room, check_teachers_room, checksums, state_store
from dmd2.teachers import load_teacher
from dmd2.training import ranks, sharding
from dmd2.training.checkpoint_store import CheckpointStore, save_weights
from dmd2.training.loop import fit, log
from dmd2.training.post_hoc_ema import ema_suffix
from dmd2_kernels import implementation

COLLAPSE = 0.15
"""Threshold of `neighbour_ratio` (mean nearest-neighbour over mean pair distance) for the mode-collapse warning."""


def _group(device: torch.device, runtime: Runtime) -> AbstractContextManager[None]:
    if device.type == "cuda" and runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined,unused-ignore]
    return ranks.process_group(device, runtime.collective_timeout_minutes)


def teacher(
    spec: Spec,
    latents: Path | None,
    state_root: Path,
    weights: Path,
    train_log: Path,
    runtime: Runtime,
    components: Path | None = None,
) -> None:
    """Writes the teacher's weights: trained here, in closed form, or from the user's file."""
    config, device = spec.need("teacher"), ranks.device_of(runtime.device)
    if config.weights is not None:
        imports.teacher(spec, weights)
        _empty_log(train_log)
        return
    folder = None if components is None else components_folder(components, spec.upstream["components"])
    seed = config.training.seed if config.training else 0
    initial = load_teacher(config, spec.need("data"), seed=seed, components=folder)
    if config.training is None:
        save_weights(weights, initial.denoiser.state_dict())
        _empty_log(train_log)
        write_record(weights, spec, iterations=0, origin="closed form")
        return
    training = config.training
    if latents is None:
        raise UserError("--latents is missing: this teacher is trained on them")
    read = {"latents": content_id(read_manifest(latents, spec.upstream["latents"]))}
    with state_store(state_root, spec, runtime, read) as store:
        with _group(device, runtime):
            data = data_batches(spec, latents, initial, training.batch_size, training.seed, device)
            trainee = TeacherFit(
                initial,
                training,
                data,
                micro_batch_size=training.micro_batch_size(runtime.micro_batch_size, device.type),
                layout=runtime.layout,
                device=device,
            )
            _prepare(runtime, trainee.network)
            check_teachers_room(trainee, store.folder, weights.parent, runtime)
            took = fit(trainee, training.iterations, store, runtime, title="teacher")
            trained = sharding.gather(trainee.export())
        if ranks.rank() == 0:
            save_weights(weights, trained)
            _publish_log(store, train_log)
            facts = {
                "iterations": training.iterations,
                "seed": training.seed,
                "origin": "trained",
                **_train_seconds(took, device.type),
            }
            write_record(weights, spec, **facts)
            store.clear()


class TrainOutputs(NamedTuple):
    """Paths of a run's results, all in one folder, so that they appear together."""

    generator: Path
    networks: Path
    snapshots: Path
    train_log: Path


def train(
    spec: Spec,
    teacher_weights: Path,
    latents: Path,
    pairs: Path | None,
    start: Path | None,
    state_root: Path,
    out: TrainOutputs,
    runtime: Runtime,
    components: Path | None = None,
) -> None:
    """Trains a student; writes generator, networks (to initialise other runs), snapshots with manifest, and the log."""
    config, device = spec.need("train"), ranks.device_of(runtime.device)
    opened = open_teacher(spec, teacher_weights, components=components)
    frozen, adapted = adapted_networks(with_cached_prompts(spec, opened, runtime.cached_prompts, device), config)
    distance = _regression_distance(config, device)
    read = checksums(spec, teacher_weights, latents, pairs, start)
    with state_store(state_root, spec, runtime, read) as store:
        with _group(device, runtime):
            run = Distillation(
                frozen,
                config,
                data=data_batches(spec, latents, frozen, config.batch_size, config.seed, device),
                pairs=pair_batches(spec, pairs, config.batch_size, config.seed, device) if pairs is not None else None,
                prompts=prompt_batches(spec, frozen, config.batch_size, config.seed, device),
                networks=adapted,
                regression_distance=distance,
                start=open_weights(start, spec.upstream["start"]) if start is not None else None,
                micro_batch_size=runtime.micro_batch_size,
                layout=runtime.layout,
                device=device,
            )
            _prepare(runtime, run.generator, run.critic.fake, run.teacher.denoiser)
            check_students_room(run, store.folder, out.generator.parent, runtime)
            kernels = implementation(next(run.generator.parameters()))
            log.info("%s: digest %s on %s, losses by the %s kernels", spec.name, spec.digest, device, kernels)
            snapshots = config.snapshot_steps()
            trainee = graphed(run, runtime.cuda_graphs)
            took = fit(
                trainee,
                config.iterations,
                store,
                runtime,
                title=spec.name,
                snapshots=snapshots,
                averages=run.averages,
                alarm=_alarm,
            )
            networks, generator = sharding.gather(run.networks()), sharding.gather(run.export())
        if ranks.rank() == 0:  # after the process group: what follows may take longer than its timeout
            facts = {
                "run": spec.name,
                "seed": config.seed,
                "iterations": config.iterations,
                "kernels": kernels,
                "ema_decay": config.ema_decay,
                **_progress(config, config.iterations, took, device.type),
            }
            _publish_snapshots(store, facts, out.snapshots, spec)
            _publish_log(store, out.train_log)
            save_weights(out.networks, networks)
            write_record(out.networks, spec, **facts)
            save_weights(out.generator, generator)
            write_record(out.generator, spec, **facts)
            store.clear()


def adapted_networks(frozen: Teacher, config: Train) -> tuple[Teacher, Networks | None]:
    """The teacher and the networks of a run that trains adapters; all share the frozen weights. None: a full run.

    Raises UserError for a teacher whose network takes no adapters.
    """
    wanted = {"student": config.generator_lora, "critic": config.critic_lora}
    adapters = {role: lora for role, lora in wanted.items() if lora is not None}
    if not adapters:
        return frozen, None
    from dmd2.teachers.diffusers_unet import DiffusersDenoiser
    from dmd2.teachers.lora import Role, merged_with, roles

    network = frozen.denoiser
    if not isinstance(network, DiffusersDenoiser):
        raise UserError("generator_lora and critic_lora need a teacher of kind diffusers; remove them")
    full = frozen.copy_network() if len(adapters) == 1 else None
    found: dict[str, Denoiser] = dict(roles(network, adapters, seed=config.seed))
    generator, fake = found.get("student", full), found.get("critic", full)
    assert generator is not None
    assert fake is not None

    def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return merged_with(generator, weights) if isinstance(generator, Role) else dict(weights)

    return dataclasses.replace(frozen, denoiser=found["teacher"]), Networks(generator, fake, merged)


def _prepare(runtime: Runtime, *networks: Denoiser) -> None:
    """`Denoiser.prepare` of all networks; a frozen one recomputes too when a gradient flows through it to images."""
    for network in networks:
        network.prepare(compile=runtime.compile, activation_checkpointing=runtime.activation_checkpointing)


def _regression_distance(config: Train, device: torch.device) -> Distance:
    if config.regression_weight == 0 or config.regression_loss == "mse":
        return torch.nn.functional.mse_loss
    assert config.vgg_weights is not None  # the configuration was checked
    return load_lpips(config.vgg_weights, device)


def _progress(train: Train, step: int, took: Mapping[str, float] | None, device: str) -> dict[str, Any]:
    """Updates and, if known, seconds of a run after iteration `step`."""
    updates = -(-step // train.critic_steps_per_generator)
    seconds = _train_seconds(took, device) if took is not None else {}
    return {"checkpoint_step": step, "generator_updates": updates, **seconds}


def _train_seconds(took: Mapping[str, float], device: str) -> dict[str, Any]:
    """Wall-clock seconds of the main process over all attempts; CPU and GPU seconds, and joules, of all processes.

    CPU seconds and joules are the main process's times the number of processes, which share the work equally.
    """
    seconds: dict[str, Any] = {"train_wall_s": took["wall_s"], "train_cpu_s": took["cpu_s"] * ranks.world_size()}
    if device == "cuda":
        seconds["gpu_s"] = took["wall_s"] * ranks.world_size()
        seconds["device_name"] = torch.cuda.get_device_name()
        if "energy_j" in took:
            seconds["energy_j"] = took["energy_j"] * ranks.world_size()
    return {**seconds, "num_processes": ranks.world_size(), "device": device}


def _alarm(row: dict[str, float]) -> str | None:
    if row.get("num_nonfinite", 0.0) > 0:
        return "the matching gradient has non-finite values, which are replaced by 0: the teacher may be damaged"
    ratio = row.get("neighbour_ratio")
    if ratio is None or ratio >= COLLAPSE or "brightness" not in row:  # the threshold is of pixels
        return None
    return f"generated images are nearly equal (neighbour ratio {ratio:.3f}): the generator may have collapsed"


def _empty_log(out: Path) -> None:
    """The log of weights that were not trained here."""
    write_text(out, "")
    (out.parent / "tensorboard").mkdir(exist_ok=True)


def _publish_log(store: CheckpointStore, out: Path) -> None:
    with atomic(out) as temporary:
        shutil.copyfile(store.folder / "log.jsonl", temporary)
    board = out.parent / "tensorboard"
    shutil.rmtree(board, ignore_errors=True)
    if (store.folder / "tensorboard").exists():
        shutil.copytree(store.folder / "tensorboard", board)


def _publish_snapshots(store: CheckpointStore, facts: dict[str, Any], manifest: Path, spec: Spec) -> None:
    """Copies the exported generators to `snapshots` next to `manifest`, which is written last and lists them.

    Each has a record: the run's `facts`, with the updates and seconds up to its step (no seconds if the log's row was
    lost in a power failure).
    """
    folder, train = manifest.parent / "snapshots", spec.need("train")
    folder.mkdir(parents=True, exist_ok=True)  # a store waits for it, also where there are none
    clock = {row["step"]: row for row in map(json.loads, (store.folder / "log.jsonl").read_text().splitlines())}
    listed, averages = [], []
    for step in train.snapshot_steps():
        target = folder / f"{step:08d}.safetensors"
        with atomic(target) as temporary:
            shutil.copyfile(store.folder / f"snapshot-{step:08d}.safetensors", temporary)
        known = {name: value for name, value in facts.items() if name not in TRAINING}
        write_record(target, spec, **known | _progress(train, step, clock.get(step), facts["device"]))
        listed.append({"step": step, "file": f"snapshots/{target.name}"})
        for width in train.ema_lengths or ():
            average = target.with_name(f"{step:08d}{ema_suffix(width)}.safetensors")
            with atomic(average) as temporary:
                shutil.copyfile(store.folder / f"snapshot-{average.name}", temporary)
            write_record(average, spec, step=step, ema_length=width)
            averages.append({"step": step, "ema_length": width, "file": f"snapshots/{average.name}"})
    found = {"snapshots": listed, "digest": spec.digest}
    write_json(manifest, found | ({"averages": averages} if averages else {}))
