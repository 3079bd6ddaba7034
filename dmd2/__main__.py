"""The command line: options of all commands, error handling and exit statuses."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dmd2.commands import planning, stages
from dmd2.errors import Interrupted, UserError
from dmd2.training.launcher import drop_foreign_ranks

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def settings(
    log: Annotated[Path | None, typer.Option(help="also write the log there")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="processor threads")] = None,
    preset: Annotated[
        str | None, typer.Option(help="whose settings of execution in DMD2_RUNTIMES, JSON by preset, are used")
    ] = None,
) -> None:
    """Settings of every stage."""
    if preset is not None and "DMD2_RUNTIME" not in os.environ:
        runtimes = json.loads(os.environ.get("DMD2_RUNTIMES", "{}"))
        os.environ["DMD2_RUNTIME"] = json.dumps(runtimes.get(preset, {}))  # read by the command's --runtime
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log))
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=handlers)
    if threads is not None:
        share = max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # per process of this machine
        # Read when torch is imported, by the stage. Snakemake sets both to a job's threads, and torch takes MKL's last.
        os.environ.update(OMP_NUM_THREADS=str(share), MKL_NUM_THREADS=str(share))


for command in (*stages.COMMANDS, *planning.COMMANDS):
    app.command()(command)


def main() -> None:
    """Runs the command line; a UserError is one line and exit status 2, an interruption 128 + signal."""
    os.environ["MPLBACKEND"] = "agg"  # figures are files; a notebook's backend may be left over
    gc.set_threshold(100_000, 20, 100)  # importing torch triggers hundreds of collections: 0.3 s per stage
    drop_foreign_ranks()
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}disk full ({error.strerror}); free space and run the same command: finished work is kept", 2)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") != "0":  # rank 0 reports it for all
            sys.exit(stop.status)
        _fail(str(stop), stop.status)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command to resume", 130)


def _fail(message: str, status: int) -> None:
    logging.getLogger("dmd2").error("error: %s", message)
    sys.exit(status)


if __name__ == "__main__":
    main()
