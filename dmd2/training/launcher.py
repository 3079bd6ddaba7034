"""Starts a stage as several processes: `python -m dmd2.training.launcher NUM ARGUMENTS...` (`workflow/launch.sh`).

Like torchrun, with three differences: the exit status is that of the process that failed first (torchrun's is always 1,
so a saved interruption, 143, would look like a failure); signals are forwarded to every process, which has time to
save; and no process outlives the launcher, however it ends. It does not import torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that are passed on; SIGHUP, which a closed terminal sends, not where it is ignored (`nohup`)."""
GRACE_S = 30.0
"""Seconds between the end of the first failed process and SIGKILL to those still running."""
POLL_S = 0.02
PR_SET_PDEATHSIG = 1
LAUNCHER = "DMD2_LAUNCHER"
"""The variable with the process id of the launcher that started a rank."""
RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
)
"""Variables that torch or dmd2 takes a process's rank from; also all that begin with `TORCHELASTIC_`."""


def drop_foreign_ranks() -> None:
    """Removes the rank variables from this process's environment unless its parent is a launcher, which set them.

    Those of another job in the same shell would make it wait for ranks that do not exist. Launchers are this module and
    torchrun.
    """
    if os.environ.get(LAUNCHER) != str(os.getppid()) and not _parent_is_torchrun():
        for name in _rank_variables(os.environ):
            del os.environ[name]


def _parent_is_torchrun() -> bool:
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return False
    return b"torchrun" in command or b"torch.distributed" in command


def _rank_variables(env: Mapping[str, str]) -> list[str]:
    return [name for name in env if name in (*RANK_VARIABLES, LAUNCHER) or name.startswith("TORCHELASTIC_")]


@dataclass(frozen=True)
class Nodes:
    """The machines of a job, and the address of its first process."""

    num: int
    this: int
    address: str
    port: int

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Nodes:
        """From DMD2_NODES, DMD2_NODE, DMD2_MASTER_ADDR and DMD2_MASTER_PORT, or Slurm's variables within `srun`.

        One machine needs none of them. Raises ValueError if there are several and one variable is missing.
        """
        num = int(env.get("DMD2_NODES", "1"))
        if num == 1:
            return cls(1, 0, "127.0.0.1", int(env.get("DMD2_MASTER_PORT") or _free_port()))
        port = env.get("DMD2_MASTER_PORT") or _port_of(env.get("SLURM_JOB_ID"))
        this = env.get("DMD2_NODE") or env.get("SLURM_NODEID")
        address = env.get("DMD2_MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR")
        wanted = {"DMD2_NODE": this, "DMD2_MASTER_ADDR": address, "DMD2_MASTER_PORT": port}
        if missing := [name for name, value in wanted.items() if not value]:
            raise ValueError(f"DMD2_NODES is {num}, which needs {', '.join(missing)}: set it, or start under srun")
        return cls(num, int(this or 0), str(address), int(port or 0))


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _port_of(job: str | None) -> str | None:
    """A port in [20000, 40000) derived from the job's number, so that jobs on one machine rarely collide."""
    return str(20_000 + int(job) % 20_000) if job else None


def environment(nodes: Nodes, num_local: int, local: int) -> dict[str, str]:
    """The environment variables of torch's `env://` initialisation for one process, added to this process's."""
    names = {
        "RANK": nodes.this * num_local + local,
        "WORLD_SIZE": nodes.num * num_local,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": num_local,
        "MASTER_ADDR": nodes.address,
        "MASTER_PORT": nodes.port,
    }
    foreign = _rank_variables(os.environ)
    found = {name: value for name, value in os.environ.items() if name not in foreign}
    found |= {name: str(value) for name, value in names.items()} | {LAUNCHER: str(os.getpid())}
    if nodes.num == 1 and sys.platform == "linux":
        found.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo resolves this machine's name
    return found


class Workers:
    """The processes of one machine."""

    def __init__(self, command: list[str], nodes: Nodes, num: int, grace_s: float = GRACE_S):
        self._grace_s = grace_s
        self._first = nodes.this * num
        self._signals: list[int] = []
        for signum in FORWARDED:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(signum, self._note)
        self._processes = [_start(command, environment(nodes, num, local)) for local in range(num)]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signals.append(signum)

    def wait(self) -> int:
        """Blocks until all processes have ended; returns 0 or the exit status of the first that failed."""
        status, end, forwarded = 0, float("inf"), False
        while running := [process for process in self._processes if process.poll() is None]:
            while self._signals:
                self._send(self._signals.pop(0))
                forwarded = True
            failed = status or self._failure()
            if failed and not status:
                status, end = failed, time.monotonic() + self._grace_s
                if not forwarded:  # else they are already saving
                    self._send(signal.SIGTERM)
            if time.monotonic() > end:
                self._kill(running)
                end = float("inf")
            time.sleep(POLL_S)
        return status or self._failure()

    def _failure(self) -> int:
        """The exit status of a failed process, or 128 + signal of a killed one, which comes first as the cause."""
        codes = {self._first + i: process.returncode for i, process in enumerate(self._processes) if process.returncode}
        for rank, code in sorted(codes.items(), key=lambda item: item[1]):
            if code < 0:
                _print_error(f"rank {rank} was ended by {signal.Signals(-code).name}; the other ranks are terminated")
            return 128 - code if code < 0 else code
        return 0

    def _kill(self, running: list[subprocess.Popen[bytes]]) -> None:
        ranks = [str(self._first + i) for i, process in enumerate(self._processes) if process in running]
        _print_error(f"rank {', '.join(ranks)} did not end within {self._grace_s:g} s and is killed")
        self._send(signal.SIGKILL)

    def _send(self, signum: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signum)


def _start(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Starts a process in its own session, which on Linux is killed when this process ends.

    The session makes Ctrl-C reach it only through `Workers`, and not a second time from the terminal.
    """
    if sys.platform != "linux":
        return subprocess.Popen(command, env=env, start_new_session=True)
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)

    return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=prepare)  # noqa: PLW1509  # no threads


def _print_error(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} error: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Runs `python -m dmd2 ARGUMENTS...` in NUM processes; exits with 0 or the status of the first that failed."""
    num, arguments = int(sys.argv[1]), sys.argv[2:]
    try:
        nodes = Nodes.of(os.environ)
    except ValueError as error:
        _print_error(str(error))
        sys.exit(2)
    grace_s = float(os.environ.get("DMD2_GRACE_S", GRACE_S))
    sys.exit(Workers([sys.executable, "-m", "dmd2", *arguments], nodes, num, grace_s).wait())


if __name__ == "__main__":
    main()
