"""A package `dmd2` and packages `torch` and so on that are made for a test, so that a server starts at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import psutil
from events import wait_for_end

from dmd2.commands import preload_server, preloaded

COMMANDS = Path(preloaded.__file__).parent
STAGE = """
import json, os, resource, signal, sys, time

def facts():
    names = sorted(n for n in sys.modules if n.partition(".")[0] in ("dmd2", "torch"))
    return {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "env": dict(os.environ), "cwd": os.getcwd(),
        "umask": os.umask(0), "flags": str(sys.flags), "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
        "signals": {s: str(signal.getsignal(s)) for s in range(1, 32)}, "mask": str(signal.pthread_sigmask(0, [])),
        "affinity": sorted(os.sched_getaffinity(0)), "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "buffering": [sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding],
        "files": sorted(os.listdir("/proc/self/fd")), "main": str(sys.modules["__main__"].__spec__.name),
    }

def threads():
    import numpy, scipy.linalg, threadpoolctl, torch
    found = {Path(p["filepath"]).name: p["num_threads"] for p in threadpoolctl.threadpool_info()}
    return [torch.get_num_threads(), found, torch.initial_seed(), int(numpy.random.randint(2**31))]

def wait():
    heard = []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, lambda signum, frame: heard.append(signum))
    say(None)
    while not heard:
        signal.pause()
    sys.exit(100 + sum(heard))

def say(value):
    print(json.dumps([os.getpid(), os.getppid(), value]), flush=True)

from pathlib import Path
name, *rest = [argument for argument in sys.argv[1:] if not argument.startswith("--threads")]
if name == "facts":
    say(facts())
elif name == "threads":
    say(threads())
elif name == "say":
    say("old")
elif name == "echo":
    sys.stdout.write(sys.stdin.read().upper())
    print("on stderr", file=sys.stderr)
elif name == "end":
    sys.exit(eval(rest[0]))
elif name == "raise":
    raise ValueError("nothing repaired it")
elif name == "kill":
    os.kill(os.getpid(), int(rest[0]))
elif name == "wait":
    wait()
elif name == "twice" and not os.path.exists(rest[0]):
    Path(rest[0]).touch()
    wait()
"""


class World:
    """A folder with the packages, the folder of the servers' sockets, and processes that end with the test."""

    def __init__(self, root: Path, sockets: Path):
        self.root, self.sockets, self.processes = root, sockets, []
        (root / "dmd2/commands").mkdir(parents=True)
        for name in ("preloaded.py", "preload_server.py"):
            shutil.copy(COMMANDS / name, root / "dmd2/commands" / name)
        for name in ("__init__.py", "commands/__init__.py"):
            (root / "dmd2" / name).touch()
        (root / "dmd2/__main__.py").write_text(STAGE)
        self.imports = root / "imports"
        for name in {package.partition(".")[0] for package in preload_server.PACKAGES} - {"concurrent"}:
            (root / "packages" / name).mkdir(parents=True)
            (root / "packages" / name / "__init__.py").touch()
        self.torch = root / "packages/torch/__init__.py"
        self.torch.write_text(f"open({str(self.imports)!r}, 'a').write('x')\n")

    def start(
        self, *arguments: str, module: str = "dmd2.commands.preloaded", **env: str | None
    ) -> subprocess.Popen[str]:
        folders = [str(self.root), str(self.root / "packages")]
        mine = {"PYTHONPATH": os.pathsep.join(folders), "TMPDIR": str(self.sockets), "DMD2_PRELOAD": None, **env}
        surroundings = {name: value for name, value in {**os.environ, **mine}.items() if value is not None}
        command = [sys.executable, "-m", module, *arguments]
        how: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(command, env=surroundings, cwd=self.root, text=True, start_new_session=True, **how)
        self.processes.append(process)
        return process

    def run(self, *arguments: str, stdin: str | None = None, **how: Any) -> tuple[int, str, str]:
        """Exit status and what was written to stdout and stderr."""
        process = self.start(*arguments, **how)
        out, err = process.communicate(stdin, timeout=100)
        return process.returncode, out, err

    def say(self, *arguments: str, **how: Any) -> tuple[int, int, Any]:
        """Process id, that of the parent, and the value that a stage printed."""
        status, out, err = self.run(*arguments, **how)
        assert status == 0, err
        return tuple(json.loads(out))

    @property
    def num_servers(self) -> int:
        return len(self.imports.read_text()) if self.imports.exists() else 0

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()
        for process in psutil.process_iter():
            try:
                if str(self.root) in " ".join(process.cmdline()):
                    process.kill()
                    wait_for_end(process.pid)
            except psutil.Error:
                pass


def line(file: IO[str] | None) -> Any:
    """The next line as JSON."""
    assert file is not None
    return json.loads(file.readline())
