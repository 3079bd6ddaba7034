"""Types shared by all sections of the configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """Frozen; unknown keys are errors. `3e-3`, which PyYAML reads as a string, is accepted as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""One 32-bit word, so that different (seed, step, rank) never seed the same random numbers."""
Beta = Annotated[float, Field(ge=0, lt=1)]
WIDEST = 0.288
"""Widths of power-function averages of weights (EDM2) are below this; a plain mean has 0.2887."""
Precision = Literal["fp32", "bf16"]
"""Compute precision of networks; weights, preconditioning and losses stay float32."""


class WeightsFile(Model):
    """A file that the user supplies or that a rule downloads (`workflow/downloads.yaml`)."""

    path: str
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")


class StudentWeights(WeightsFile):
    """The weights of an imported student: its whole network, or adapters of the preset's teacher."""

    lora_rank: int | None = Field(
        None, gt=0, description="of low-rank adapters in the file, which the import adds to the teacher's weights"
    )
