"""One folder with all that an evaluation reads, and one with text-to-image results, for all tests here."""

from pathlib import Path

import pytest
from text_results import write_results
from world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def text_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("text"))
