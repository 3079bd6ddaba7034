"""Whether a model and a sampler, the two parts of an entry, go together."""

from __future__ import annotations

from dmd2.config import Run, Sampler
from dmd2.errors import UserError


def check_sampler(entry: str, run: Run | None, name: str, sampler: Sampler) -> None:
    """Raises UserError if the sampler `name` does not suit the run of an entry; a run of None is the teacher."""
    model = entry.partition("/")[0]
    as_teacher = run is None or run.own is not None
    if as_teacher != sampler.of_teacher:
        wanted = "a sampler of a teacher" if as_teacher else "a few_step sampler"
        raise UserError(f"entry {entry}: {model} needs {wanted}, but {name} is {sampler.kind}")
    if run is None:
        return
    if run.weights and sampler.is_selected:
        raise UserError(f"entry {entry}: {model} is imported, with no snapshots to choose from; use another")
    if sampler.ema_length is not None and run.train.ema_lengths is None:
        raise UserError(
            f"entry {entry}: samplers.{name}.ema_length is {sampler.ema_length}, but {model} stores no averages; "
            f"set its ema_lengths"
        )
    checkpoint = sampler.checkpoint
    if isinstance(checkpoint, int) and checkpoint not in (steps := run.train.snapshot_steps()):
        raise UserError(
            f"entry {entry}: samplers.{name}.checkpoint is {checkpoint}, but {model} has snapshots after "
            f"{', '.join(map(str, steps))} iterations; name one of them, or change num_snapshots"
        )
