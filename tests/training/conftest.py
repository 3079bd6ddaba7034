"""A latent set for the tests of fitting."""

from pathlib import Path

import pytest
from trainees import write_latents


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small latent set."""
    manifest = tmp_path_factory.mktemp("latents") / "manifest.json"
    write_latents(manifest)
    return manifest
