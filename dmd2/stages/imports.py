"""Stages that import weights: a published teacher's, and released students'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dmd2.config import ModelFolder, StudentWeights, WeightsFile
from dmd2.errors import UserError
from dmd2.lineage.records import write_record
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Denoiser
from dmd2.stages.open_weights import open_teacher
from dmd2.teachers import outline
from dmd2.teachers.weights import INDEX, digest_of, fitted, read_network, refuse_stand_in, weight_file
from dmd2.training.checkpoint_store import save_weights

GENERATOR, GUIDANCE = "pytorch_model.bin", "pytorch_model_1.bin"
"""The files in a folder of the released code: generator; frozen teacher, fake score and discriminator."""
GUIDANCE_OF = {GENERATOR: GUIDANCE, "model.safetensors": "model_1.safetensors"}
"""By the generator's name: the released code's accelerate wrote the first, newer ones write the second."""


def teacher(spec: Spec, out: Path) -> None:
    """Imports the weights of a published teacher: a file, or the U-Net in a model folder."""
    configured, network = spec.need("teacher").weights, _network(spec)
    if isinstance(configured, ModelFolder):
        from dmd2.teachers.diffusers import import_unet

        state, files = import_unet(spec.need("teacher"), spec.need("data"))
        origin = {"model": configured.path, "revision": configured.revision}
        source = origin | {"sha256": {f"unet/{path.name}": digest_of(path) for path in files}}
        _publish(out, spec, fitted(state, network.state_dict(), configured.path), source, network)
        return
    path, digest = _identified(configured)
    state = read_network(path, network.state_dict())
    _publish(out, spec, state, {"file": path.name, "sha256": digest}, network)


def student(spec: Spec, generator: Path | None, networks: Path | None, teacher: Path | None = None) -> None:
    """Imports a released student: `generator` for sampling, and `networks` (with its fake score) to initialise a run.

    The source is a generator's weights (see `read_weights`), a folder of the released code, or adapters of the weights
    `teacher`, to which they are added.
    """
    weights: StudentWeights = spec.need("weights")
    source, digest = _identified(weights)
    facts = {"file": source.name, "sha256": digest}
    network = _network(spec)
    if weights.lora_rank is None:
        state = read_network(source, network.state_dict())
    else:
        if teacher is None:
            raise UserError("--teacher is missing: these weights are adapters, which are added to the teacher's")
        from dmd2.teachers.diffusers_unet import DiffusersDenoiser
        from dmd2.teachers.lora_file import merge_file

        base = open_teacher(spec, teacher).denoiser
        assert isinstance(base, DiffusersDenoiser)  # checked in the configuration
        state = merge_file(base, source, rank=weights.lora_rank)
    if generator is not None:
        _publish(generator, spec, state, facts, network)
    if networks is not None:
        guidance = source.with_name(GUIDANCE_OF.get(source.name, GUIDANCE))
        if source.name not in GUIDANCE_OF or not guidance.is_file():
            raise UserError(
                f"{source}: a generator alone cannot initialise a run; name the released folder, with {GENERATOR} and "
                f"{GUIDANCE}, in the `weights` of run {spec.name}"
            )
        fake = read_network(guidance, network.state_dict(), prefix="fake_unet.")
        both = _prefixed("generator.", state) | _prefixed("critic.fake.", fake)
        _publish(networks, spec, both, facts, network)


def _identified(weights: WeightsFile) -> tuple[Path, str]:
    """The file to read and its SHA-256. Raises UserError if it is missing or its SHA-256 is not the configured one."""
    source = weight_file(Path(weights.path))
    if not source.name.endswith(INDEX):
        refuse_stand_in(source)  # before its checksum, which would not say what it is
    digest = digest_of(source)
    if weights.sha256 not in (None, digest):
        raise UserError(
            f"{source}: its SHA-256 is {digest}, expected {weights.sha256}; fetch it again or correct the configured "
            f"`sha256`"
        )
    return source, digest


def _network(spec: Spec) -> Denoiser:
    return outline(spec.need("teacher"), spec.need("data"))


def _publish(out: Path, spec: Spec, state: Mapping[str, Tensor], source: Mapping[str, Any], network: Denoiser) -> None:
    """Writes weights with a record of their source and the size of one network."""
    save_weights(out, state)
    write_record(
        out,
        spec,
        run=spec.name,
        origin="file",
        source=dict(source),
        num_tensors=len(state),
        num_parameters=sum(p.numel() for p in network.parameters()),
    )


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}
