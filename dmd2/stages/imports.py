"""Stages that import weights: a published teacher's, and released students'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dmd2.config import WeightsFile
from dmd2.errors import UserError
from dmd2.lineage.records import write_record
from dmd2.lineage.spec import Spec
from dmd2.method.denoiser import Denoiser
from dmd2.teachers import outline
from dmd2.teachers.weights import INDEX, digest_of, read_network, refuse_stand_in, weight_file
from dmd2.training.checkpoint_store import save_weights

GENERATOR, GUIDANCE = "pytorch_model.bin", "pytorch_model_1.bin"
"""The files in a folder of the released code: generator; frozen teacher, fake score and discriminator."""
GUIDANCE_OF = {GENERATOR: GUIDANCE, "model.safetensors": "model_1.safetensors"}
"""By the generator's name: the released code's accelerate wrote the first, newer ones write the second."""


def teacher(spec: Spec, out: Path) -> None:
    """Imports the weights of a published teacher."""
    source, digest = _identified(spec.need("teacher").weights)
    network = _network(spec)
    _publish(out, spec, read_network(source, network.state_dict()), source, digest, network)


def student(spec: Spec, generator: Path | None, networks: Path | None) -> None:
    """Imports a released student: `generator` for sampling, and `networks` (with its fake score) to initialise a run.

    The source is a generator's weights (see `read_weights`), or a folder of the released code.
    """
    source, digest = _identified(spec.need("weights"))
    network = _network(spec)
    state = read_network(source, network.state_dict())
    if generator is not None:
        _publish(generator, spec, state, source, digest, network)
    if networks is not None:
        guidance = source.with_name(GUIDANCE_OF.get(source.name, GUIDANCE))
        if source.name not in GUIDANCE_OF or not guidance.is_file():
            raise UserError(
                f"{source}: a generator alone cannot initialise a run; name the released folder, with {GENERATOR} and "
                f"{GUIDANCE}, in the `weights` of run {spec.name}"
            )
        fake = read_network(guidance, network.state_dict(), prefix="fake_unet.")
        both = _prefixed("generator.", state) | _prefixed("critic.fake.", fake)
        _publish(networks, spec, both, source, digest, network)


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


def _publish(out: Path, spec: Spec, state: Mapping[str, Tensor], source: Path, digest: str, network: Denoiser) -> None:
    """Writes weights with a record of their source and the size of one network."""
    save_weights(out, state)
    write_record(
        out,
        spec,
        run=spec.name,
        origin="file",
        source={"file": source.name, "sha256": digest},
        num_tensors=len(state),
        num_parameters=sum(p.numel() for p in network.parameters()),
    )


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}
