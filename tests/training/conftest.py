"""Processes for the tests of fitting, forked from one that has done the slow imports (AdamW brings torch._dynamo)."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from trainees import write_latents

PRELOAD = [
    "dmd2.training.loop",
    "dmd2.method.distillation",
    "dmd2.teachers.mixture",
    "dmd2.datasets.loader",
    "torch._dynamo",
]


@pytest.fixture(scope="session")
def start() -> Callable[..., BaseProcess]:
    """Starts a function of an importable module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def run(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
        process = context.Process(target=function, args=arguments, daemon=True)
        process.start()
        return process

    return run


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a small latent set."""
    manifest = tmp_path_factory.mktemp("latents") / "manifest.json"
    write_latents(manifest)
    return manifest
