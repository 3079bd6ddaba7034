"""What all sections of the configuration share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Model(BaseModel):
    """Frozen, and unknown keys are errors. YAML's `3e-3`, which PyYAML reads as a string, counts as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""One word, so that (seed, step, rank) never means the same numbers as another such triple."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["fp32", "bf16"]
"""What networks compute in; weights, preconditioning and losses stay float32."""


class WeightsFile(Model):
    """A file that the user supplies, or that a rule fetches (`workflow/downloads.yaml`)."""

    path: str
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
