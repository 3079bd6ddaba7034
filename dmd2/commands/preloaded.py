"""Runs a stage in a process with preloaded imports: `python -m dmd2.commands.preloaded ARGUMENTS...`.

Equivalent to `python -m dmd2 ARGUMENTS...`, without the seconds of importing torch. The first call starts a server
(`preload_server`), which forks for each stage. The stage gets the caller's arguments, environment, folder and standard
files; the caller forwards signals and exits with the stage's status. Everything else that a process inherits, or that
imports depend on (variables, limits, installed packages), is hashed into the server's name: a caller in which something
differs starts another server.

If a server cannot be started or dies, or with `DMD2_PRELOAD=0`, the caller executes `python -m dmd2 ARGUMENTS...`. This
file imports little, since each job pays for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import stat
import sys
import time
from types import FrameType

PATIENCE_S, RETRY_S = 60.0, 600.0
"""Seconds that a caller waits for a server before importing itself; seconds until a failed server is tried again."""
SERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "preload_server.py")
READ_LATE = ("_", "SHLVL", "PWD", "OLDPWD")
"""Variables, besides dmd2's own, that imports do not depend on."""
INHERITED = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "Cap", "NoNew", "Seccomp", "Cpus_allowed", "Mems_all")
"""Lines of /proc/self/status that a process inherits."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = {signal.SIGTSTP: signal.SIGSTOP}
"""The stage is not in a terminal's session, so SIGTSTP would have no effect."""


def leading_options(arguments: list[str]) -> tuple[dict[str, str], str]:
    """The options before the command, by name, and the command."""
    options: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            return options, argument
        name, given, value = argument.partition("=")
        options[name] = value if given else next(rest, "")
    return options, ""


def run(arguments: list[str]) -> int | None:
    """The wait status of a stage run by a server, or None if the server died. Raises OSError without a server."""
    for descriptor in range(3):
        os.fstat(descriptor)
    options, command = leading_options(arguments)
    threads = {"OMP_NUM_THREADS": options["--threads"]} if "--threads" in options else {}
    request = os.memfd_create("request")
    with open(request, "w", closefd=False) as file:
        json.dump({"arguments": arguments, "command": command, "env": dict(os.environ), "cwd": os.getcwd()}, file)
    permission, permit = os.pipe()
    with _connection(os.environ | threads) as server:
        server.settimeout(PATIENCE_S)
        socket.send_fds(server, [b"?"], [request, permission, 0, 1, 2])
        os.close(permission)
        _, stages, _, _ = socket.recv_fds(server, 1, 1)
        return _accompany(stages[0], server, permit) if stages else None


def _accompany(stage: int, server: socket.socket, permit: int) -> int | None:
    """Starts the stage, forwards signals, and returns its wait status; None if the server died."""
    passed: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(stage, STOPPING.get(signal.Signals(signum), signum))
        if signum in STOPPING:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif signum != signal.SIGCONT:
            passed.append(signum)

    for signum in (*FORWARDED, *STOPPING, signal.SIGQUIT, signal.SIGCONT):
        signal.signal(signum, forward)
    server.settimeout(None)
    with contextlib.suppress(OSError):
        os.write(permit, b"!")
        if reply := server.recv(4):
            return int.from_bytes(reply, "little")
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(stage, signal.SIGKILL)
    select.select([stage], [], [])  # blocks until it has ended
    if passed:
        return passed[0]  # the wait status of a process killed by this signal
    print("warning: the server of preloaded stages died; the stage starts again without it", file=sys.stderr)
    return None


def _connection(env: dict[str, str]) -> socket.socket:
    """Connects to the server for this environment, which is started if there is none."""
    folder = f"{os.environ.get('TMPDIR') or '/tmp'}/dmd2-preload-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not private")
    path = f"{folder}/{server_name(env)}"
    if connection := _connected(path):
        return connection
    with contextlib.suppress(FileNotFoundError):
        if time.time() - os.stat(f"{path}.failed").st_mtime < RETRY_S:
            raise ConnectionRefusedError(path)
    with open(f"{folder}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if connection := _connected(path):  # another caller was first
            return connection
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(128)
            _start_server(listener.fileno(), env, f"{folder}/log")
    if connection := _connected(path):
        return connection
    raise ConnectionRefusedError(path)


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def server_name(env: dict[str, str]) -> str:
    """A digest of everything that a stage inherits from its server, and that the server's imports depend on."""
    variables = sorted(item for item in env.items() if item[0] not in READ_LATE and not item[0].startswith("DMD2_"))
    files = [SERVER, __file__, *(folder for folder in sys.path if folder.endswith("-packages"))]
    facts: list[object] = [
        sys.executable,
        sys.version,
        os.getcwd(),
        variables,
        [(path, os.stat(path).st_mtime_ns) for path in files],
    ]
    facts += [os.getpriority(os.PRIO_PROCESS, 0), *(os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net"))]
    for name in ("limits", "cgroup", "oom_score_adj", "status"):
        with open(f"/proc/self/{name}") as file:
            facts += [line for line in file if name != "status" or line.startswith(INHERITED)]
    return hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _start_server(listener: int, env: dict[str, str], log: str) -> None:
    """Starts the server as a daemon (own session, reparented) whose only open files are the listener and a log."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    try:
        os.setsid()
        if os.fork() == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor > 2 and descriptor != listener:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            os.set_inheritable(listener, True)
            os.execve(sys.executable, [sys.executable, SERVER, str(listener)], env)
    finally:
        os._exit(0)


def _end_as(status: int) -> None:
    """Ends this process like one with this wait status."""
    if not os.WIFSIGNALED(status):
        sys.exit(os.WEXITSTATUS(status))
    signum = os.WTERMSIG(status)
    if signum in FORWARDED:
        signal.signal(signum, signal.SIG_DFL)
    if signum in (*FORWARDED, signal.SIGKILL):
        os.kill(os.getpid(), signum)
    sys.exit(128 + signum)


def main() -> None:
    """Runs the stage in `sys.argv` and exits with its status."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of this file
    status = None
    is_alone = "LOCAL_WORLD_SIZE" not in os.environ  # not a process of several ranks
    if sys.platform == "linux" and is_alone and os.environ.get("DMD2_PRELOAD") != "0":
        with contextlib.suppress(OSError):
            status = run(sys.argv[1:])
    if status is not None:
        _end_as(status)
    os.execv(sys.executable, [sys.executable, "-m", "dmd2", *sys.argv[1:]])


if __name__ == "__main__":
    main()
