"""Sets that the tests of data share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numbered import numbered

from dmd2.config import Data
from dmd2.datasets.shards import write_shards
from dmd2.lineage.spec import Spec


@pytest.fixture(scope="session")
def digits() -> Data:
    return Data(
        source="digits", resolution=8, channels=1, num_classes=10, levels=17, shard_size=600, image_format="png"
    )


@pytest.fixture
def spec(digits: Data) -> Spec:
    return Spec.of("shards", "numbered", data=digits)


@pytest.fixture
def write(tmp_path: Path, spec: Spec) -> Callable[..., Path]:
    """Writes `num` numbered samples in shards of `size`; returns the manifest's path."""

    def run(num: int = 23, size: int = 10, folder: str = "set", **options: Any) -> Path:
        manifest = tmp_path / folder / "manifest.json"
        write_shards(manifest, num, size, numbered, spec, **options)
        return manifest

    return run
