"""The process that `preloaded` starts: it imports what is slow, and forks itself for each requested stage.

It imports nothing of dmd2, so a stage runs the code that is there when it starts. It has one thread, since a lock that
another thread holds would stay locked in a fork. It ends by itself after `IDLE_S` without work.

A caller sends one message with five files: its request, the pipe by which it lets the stage begin, and its standard
files. The answers are the stage's pidfd and, at the end, its wait status. When the caller dies, its stage is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing.process
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    *("typer", "pydantic.main", "pydantic.type_adapter", "pydantic.functional_validators", "yaml", "tabulate", "tqdm"),
    *("requests", "filelock", "concurrent.futures.process", "numpy", "torch", "torch._dynamo", "torch.nn.parallel"),
    *("torch.utils.tensorboard", "safetensors.torch", "torchvision", "cleanfid.fid", "scipy.linalg"),
    *("matplotlib.pyplot", "matplotlib.backends.backend_agg"),
    *("PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.PpmImagePlugin"),
)
TEXT_TO_IMAGE = (
    *(f"diffusers.models.{name}" for name in ("unets.unet_2d_condition", "autoencoders.autoencoder_kl")),
    *(f"diffusers.schedulers.scheduling_{name}" for name in ("ddim", "ddpm", "euler_discrete", "lcm", "pndm")),
    *(f"diffusers.schedulers.scheduling_{name}_multistep" for name in ("dpmsolver", "unipc")),
    *(f"transformers.models.clip.{name}_clip" for name in ("modeling", "tokenization")),
)
"""What stages of text-to-image import besides: when the first of them comes, 6 s that no other stage waits for."""
IDLE_S = float(os.environ.get("DMD2_PRELOAD_IDLE_S", "20"))
NUM_FILES = 5
TEXT_TO_IMAGE_OPTION = b"--components"
STAYS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that may reach all processes of a user, and that the server leaves to its stages."""
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
libc = ctypes.CDLL(None)


class Server:
    """Stages by their callers' connections."""

    def __init__(self, listener: socket.socket):
        self._listener = listener
        self._selector = selectors.PollSelector()  # unlike epoll, nothing that a fork would share
        self._selector.register(listener, selectors.EVENT_READ)
        self._stages: dict[socket.socket, tuple[int, int] | None] = {}  # process id and pidfd, once forked
        self._callers: dict[int, socket.socket] = {}  # by pidfd

    def serve(self, idle_s: float = IDLE_S) -> list[int] | None:
        """Until nobody has called for `idle_s`: then None; in each fork, the files that its caller sent."""
        while True:
            events = self._selector.select(None if self._stages else idle_s)
            if not events and not self._stages:
                return None
            for key, _ in events[:1]:  # what it closes may be what the next is about
                with contextlib.suppress(OSError):
                    if files := self._handle(key.fileobj):
                        return files

    def _handle(self, source: object) -> list[int] | None:
        if source is self._listener:
            caller, _ = self._listener.accept()
            self._stages[caller] = None
            self._selector.register(caller, selectors.EVENT_READ)
        elif isinstance(source, int):
            self._tell_end(source)
        elif isinstance(source, socket.socket):
            if stage := self._stages[source]:  # it says nothing more, so it is gone
                self._selector.unregister(source)
                signal.pidfd_send_signal(stage[1], signal.SIGKILL)
            else:
                return self._begin(source)
        return None

    def _begin(self, caller: socket.socket) -> list[int] | None:
        """Forks; returns the caller's files in the fork."""
        files: list[int] = []
        try:
            _, files, _, _ = socket.recv_fds(caller, 1, NUM_FILES)
            if files and os.pread(files[0], 1 << 20, 0).find(TEXT_TO_IMAGE_OPTION) >= 0:
                preload(TEXT_TO_IMAGE, Exception)  # a stage that needs a broken library will say so itself
            process = os.fork() if len(files) == NUM_FILES else None
        except OSError:
            process = None
        if process == 0:
            self._leave()
            return files
        for descriptor in files:
            os.close(descriptor)
        if process is None:
            self._forget(caller)
            return None
        pidfd = os.pidfd_open(process)
        self._stages[caller], self._callers[pidfd] = (process, pidfd), caller
        self._selector.register(pidfd, selectors.EVENT_READ)
        socket.send_fds(caller, [b"!"], [pidfd])
        return None

    def _tell_end(self, pidfd: int) -> None:
        caller = self._callers.pop(pidfd)
        stage = self._stages[caller]
        assert stage is not None
        _, status = os.waitpid(stage[0], 0)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        with contextlib.suppress(OSError):
            caller.send(status.to_bytes(4, "little"))
        self._forget(caller)

    def _forget(self, caller: socket.socket) -> None:
        del self._stages[caller]
        with contextlib.suppress(KeyError):
            self._selector.unregister(caller)
        caller.close()

    def _leave(self) -> None:
        """Closes, in a fork, what is the server's."""
        self._selector.close()
        for connection in (self._listener, *self._stages):
            connection.close()
        for pidfd in self._callers:
            os.close(pidfd)


def num_threads() -> int:
    """Of this process, those outside Python included."""
    return len(os.listdir("/proc/self/task"))


def preload(packages: Iterable[str] = PACKAGES, passed_over: type[Exception] = ModuleNotFoundError) -> bool:
    """Imports packages, but those that are not installed or raise `passed_over`; whether this process can be forked."""
    if all(name in sys.modules for name in packages):
        return True
    gc.disable()
    for name in packages:
        with contextlib.suppress(passed_over):
            importlib.import_module(name)
    if num_threads() > 1:  # OpenBLAS starts its threads when imported, and ends them before a fork, for good
        if (process := os.fork()) == 0:
            os._exit(0)
        os.waitpid(process, 0)
    gc.freeze()  # a collection would write to, and so copy, every page
    return num_threads() == 1


def become(files: list[int], server: int, handlers: Mapping[signal.Signals, Any]) -> None:
    """Makes this fork what `python -m dmd2` would be, started by the caller; ends it if the caller has gone."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(128 + signal.SIGKILL)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    os.setsid()  # a Ctrl-C reaches it through its caller alone
    request, permission, *standard = files
    if not os.read(permission, 1):
        os._exit(128 + signal.SIGKILL)
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
    os.lseek(request, 0, os.SEEK_SET)
    with open(request, closefd=False) as file:
        call = json.load(file)
    for descriptor in files:
        os.close(descriptor)
    libc.prctl(PR_SET_NAME, f"dmd2 {call['command']}".encode(errors="replace")[:15], 0, 0, 0)
    os.environ.clear()
    os.environ.update(call["env"])
    os.chdir(call["cwd"])
    multiprocessing.process.ORIGINAL_DIR = call["cwd"]  # type: ignore[attr-defined]
    tempfile.tempdir = None
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    sys.argv = ["-m", *call["arguments"]]
    sys.orig_argv = [sys.executable, "-m", "dmd2", *call["arguments"]]
    sys.path[:] = call["path"]
    importlib.invalidate_caches()
    for name in ("numpy.random", "torch.random"):
        if name in sys.modules:
            sys.modules[name].seed()  # else every stage would draw the same
    gc.enable()


def stage() -> int:
    """Runs `python -m dmd2` with `sys.argv` and returns its exit status."""
    try:
        runpy.run_module("dmd2", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(status: int) -> None:
    """Ends this process as Python does, but does not destroy every object: that copies the server's pages, 0.4 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = status or 120
    os._exit(status)


def main() -> None:
    """Serves the socket that it was started with; in a fork, is the stage."""
    if not sys.flags.safe_path:
        sys.path.pop(0)  # this file's folder
    listener, server = socket.socket(fileno=int(sys.argv[1])), os.getpid()
    path = listener.getsockname()
    handlers = {signum: signal.signal(signum, signal.SIG_IGN) for signum in STAYS}
    failed = Path(f"{path}.failed")
    failed.touch()
    if preload():
        failed.unlink()
        os.chdir("/")
        if files := Server(listener).serve():
            become(files, server, handlers)
            end(stage())
    Path(path).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
