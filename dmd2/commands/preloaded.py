"""Runs a stage in a process that has the slow imports behind it: `python -m dmd2.commands.preloaded ARGUMENTS...`.

What `python -m dmd2 ARGUMENTS...` does, without the seconds that importing torch takes. The first call leaves a server
behind (`preload_server`), which forks itself for each stage. The stage gets the caller's arguments, environment, folder
and standard files; the caller passes signals on and ends as the stage ends. All else that a process inherits, or reads
while it imports (variables, limits, installed packages), is part of the server's name: a caller for whom something
differs starts another. Checkouts may share one, for it knows nothing of dmd2.

Where there can be no server, or it dies, the caller becomes `python -m dmd2 ARGUMENTS...` itself. `DMD2_PRELOAD=0` asks
for that. This file imports little, since each job pays for it.
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

PATIENCE_S, RETRY_S = 300.0, 600.0
"""Until a caller stops waiting for a server and does without; until a server that failed is tried again."""
ROOT = os.path.abspath(__file__).removesuffix("/dmd2/commands/preloaded.py")
SERVER = f"{ROOT}/dmd2/commands/preload_server.py"
READ_LATE = ("_", "SHLVL", "PWD", "OLDPWD", "PATH")
"""Variables, besides dmd2's own, that no import reads."""
INHERITED = ("Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "Cap", "NoNew", "Seccomp", "Cpus_allowed", "Mems_all")
"""Lines of /proc/self/status."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = {signal.SIGTSTP: signal.SIGSTOP}
"""The stage stands in no terminal's session, where a SIGTSTP would have no effect."""


def leading_options(arguments: list[str]) -> tuple[dict[str, str], str]:
    """The options before the command, and the command."""
    options: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            return options, argument
        name, given, value = argument.partition("=")
        options[name] = value if given else next(rest, "")
    return options, ""


def run(arguments: list[str]) -> int | None:
    """The wait status of a stage that a server ran, or None if there was none; OSError if none can be reached."""
    for descriptor in range(3):
        os.fstat(descriptor)
    options, command = leading_options(arguments)
    request = os.memfd_create("request")
    call = {"arguments": arguments, "command": command, "env": dict(os.environ), "cwd": os.getcwd(), "path": sys.path}
    with open(request, "w", closefd=False) as file:
        json.dump(call, file)
    permission, permit = os.pipe()
    with _connection(server_environment(options.get("--threads"))) as server:
        server.settimeout(PATIENCE_S)
        socket.send_fds(server, [b"?"], [request, permission, 0, 1, 2])
        os.close(permission)
        _, stages, _, _ = socket.recv_fds(server, 1, 1)
        return _accompany(stages[0], server, permit) if stages else None


def _accompany(stage: int, server: socket.socket, permit: int) -> int | None:
    """Lets the stage begin, passes signals on, and returns its wait status; None if the server died with it."""
    passed: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(stage, STOPPING.get(signal.Signals(signum), signum))
        if signum in STOPPING:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif signum != signal.SIGCONT:
            passed.append(signum)

    for signum in (*FORWARDED, *STOPPING, signal.SIGQUIT, signal.SIGCONT):
        if signum != signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:  # which `nohup` ignores
            signal.signal(signum, forward)
    server.settimeout(None)
    with contextlib.suppress(OSError):
        os.write(permit, b"!")
        if status := server.recv(4):
            return int.from_bytes(status, "little")
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(stage, signal.SIGKILL)
    select.select([stage], [], [])  # until it has ended
    if passed:
        return passed[0]  # the wait status of what is ended by this signal
    print("warning: the server of preloaded stages died; the stage starts again without it", file=sys.stderr)
    return None


def _connection(env: dict[str, str]) -> socket.socket:
    """To the server for this environment, which is started if there is none."""
    folder = f"{os.environ.get('TMPDIR') or '/tmp'}/dmd2-preload-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(folder)  # not private
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
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            return connection


def _connected(path: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        connection.connect(path)
        return connection
    connection.close()
    return None


def server_environment(threads: str | None) -> dict[str, str]:
    """This environment as a stage's imports are to find it, without the folders of the checkout."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = ("", ROOT, f"{ROOT}/kernels", f"{ROOT}/workflow/python")
    others = [folder for folder in folders if folder not in own]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(others)}
    return env if threads is None else {**env, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def server_name(env: dict[str, str]) -> str:
    """A digest of what a stage has by inheritance from its server, and of what decides what was imported there."""
    facts: list[object] = [sys.executable, sys.version, os.getpriority(os.PRIO_PROCESS, 0)]
    facts += sorted(item for item in env.items() if item[0] not in READ_LATE and not item[0].startswith("DMD2_"))
    facts += [(folder, os.stat(folder).st_mtime_ns) for folder in sys.path if folder.endswith("-packages")]
    facts += [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net")]
    facts.append(os.getcwd() if os.path.exists("matplotlibrc") else "")  # which is read where it is imported
    for path in (__file__, SERVER):
        with open(path) as file:
            facts.append(file.read())
    for name in ("limits", "cgroup", "oom_score_adj", "status"):
        with open(f"/proc/self/{name}") as file:
            facts += [line for line in file if name != "status" or line.startswith(INHERITED)]
    return hashlib.blake2b(repr(facts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _start_server(listener: int, env: dict[str, str], log: str) -> None:
    """In a session of its own, as nobody's child, with no open file besides the listener and a log."""
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
    """Ends this process as one ended that had this wait status."""
    code = os.waitstatus_to_exitcode(status)
    if -code in (*FORWARDED, signal.SIGKILL):
        with contextlib.suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code if code >= 0 else 128 - code)


def main() -> None:
    """Runs the stage that `sys.argv` says, and ends as it ends."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback from in here
    is_one_of_several = "LOCAL_WORLD_SIZE" in os.environ
    if sys.platform == "linux" and not is_one_of_several and os.environ.get("DMD2_PRELOAD") != "0":
        with contextlib.suppress(OSError):
            if (status := run(sys.argv[1:])) is not None:
                _end_as(status)
    safe = ["-P"] if sys.flags.safe_path else []
    os.execv(sys.executable, [sys.executable, *safe, "-m", "dmd2", *sys.argv[1:]])


if __name__ == "__main__":
    main()
