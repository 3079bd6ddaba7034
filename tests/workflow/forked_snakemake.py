"""Snakemake's command line in processes forked from one that has done its imports, which are half of a dry run's time.

Folder, arguments, environment and the checkout's own `dmd2`, which is imported after the fork, are those of a started
process. Run as a script, this is that process: it answers each line of JSON with an exit status.
"""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from subprocess import PIPE


def run(folder: Path, arguments: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`snakemake ARGUMENTS` in `folder`; `stdout` has all it printed."""
    with tempfile.NamedTemporaryFile("r") as said:
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        request = {"folder": str(folder), "arguments": arguments, "env": dict(environment), "said": said.name}
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(["snakemake", *arguments], status, stdout=said.read())


@cache
def _server() -> subprocess.Popen[str]:
    """It ends when this process does, which closes its input."""
    return subprocess.Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, text=True)


def _serve() -> None:
    import pydantic  # noqa: F401

    importlib.import_module("yte")  # a package of Snakemake's
    from snakemake.cli import get_argument_parser

    get_argument_parser()  # imports the plugins
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(_answer(**json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _answer(folder: str, arguments: list[str], env: dict[str, str], said: str) -> int:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for source, number in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(said, os.O_WRONLY), 1), (1, 2)):
        os.dup2(source, number)
    sys.path[0], sys.argv = folder, ["snakemake", *arguments]
    try:
        runpy.run_module("snakemake", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve()
