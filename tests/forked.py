"""Processes for tests, forked from one that has done the slow imports (AdamW brings torch._dynamo)."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

Start = Callable[..., BaseProcess]
PRELOAD = [
    "dmd2.training.loop",
    "dmd2.method.distillation",
    "dmd2.teachers.edm",
    "dmd2.teachers.mixture",
    "dmd2.datasets.loader",
    "torch._dynamo",
]


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Starts a function of an importable module in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def join(rank: int, world: int, port: int) -> None:
    """Makes this process one of `world` ranks, as the launcher does."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in names.items()} | {"GLOO_SOCKET_IFNAME": "lo"})


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Runs `function(rank, world, port, *arguments)` on all ranks, to its end."""
    port = free_port()
    processes = [start(function, rank, world, port, *arguments) for rank in range(world)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def command(rank: int, world: int, port: int, arguments: list[str], constants: dict[str, Any]) -> None:
    """`dmd2 ARGUMENTS` as one rank, with constants of modules, by their dotted names, changed."""
    join(rank, world, port)
    from dmd2.__main__ import main
    from dmd2.training.launcher import LAUNCHER, drop_foreign_ranks

    os.environ[LAUNCHER] = str(os.getppid())
    drop_foreign_ranks()
    assert os.environ["WORLD_SIZE"] == str(world)
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.argv = ["dmd2", *arguments]
    main()
