"""Stages that take weights from outside: a teacher's, and the students that others have released."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dmd2.checkpoint import save_weights
from dmd2.config import WeightsFile
from dmd2.errors import UserError
from dmd2.records import sha256, write_record
from dmd2.spec import Spec
from dmd2.teachers import state_of
from dmd2.teachers.weights import check_sha256, read_network

GENERATOR, GUIDANCE = "pytorch_model.bin", "pytorch_model_1.bin"
"""The files in a folder of the released code: generator; frozen teacher, fake score and discriminator."""


def teacher(spec: Spec, out: Path) -> None:
    """The weights of a published teacher."""
    config = spec.need("teacher")
    source, digest = _identified(config.weights)
    state = read_network(source, state_of(config, spec.need("data")))
    _publish(out, spec, state, source, digest)


def student(spec: Spec, generator: Path | None, networks: Path | None) -> None:
    """A released student: `generator` to sample from, and `networks` (with its fake score) for a run to go on from.

    The source is a generator's state dict, or a folder of the released code.
    """
    source, digest = _identified(spec.need("weights"))
    expected = state_of(spec.need("teacher"), spec.need("data"))
    state = read_network(source, expected)
    if generator is not None:
        _publish(generator, spec, state, source, digest)
    if networks is not None:
        guidance = source.with_name(GUIDANCE)
        if source.name != GENERATOR or not guidance.is_file():
            raise UserError(
                f"{source}: a run cannot go on from a generator alone; name the released folder, with {GENERATOR} and "
                f"{GUIDANCE}, in the `weights` of run {spec.name}"
            )
        fake = read_network(guidance, expected, prefix="fake_unet.")
        both = _prefixed("generator.", state) | _prefixed("critic.fake.", fake)
        _publish(networks, spec, both, source, digest)


def _identified(weights: WeightsFile) -> tuple[Path, str]:
    """The file to read, and its SHA-256 after it was compared with the configured one."""
    source = Path(weights.path)
    if source.is_dir():
        source /= GENERATOR
    if not source.is_file():
        raise UserError(f"{source}: no such weight file; put it there or correct the configured path")
    check_sha256(source, weights.sha256)
    return source, weights.sha256 or sha256(source)


def _publish(out: Path, spec: Spec, state: Mapping[str, Tensor], source: Path, digest: str) -> None:
    """Writes weights with a record that says where they come from."""
    save_weights(out, state)
    write_record(
        out,
        spec,
        run=spec.name,
        origin="file",
        source={"file": source.name, "sha256": digest},
        num_tensors=len(state),
        num_values=sum(math.prod(value.shape) for value in state.values()),
    )


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}
