"""A checkout of its own: the repository's files in a temporary folder, driven by `snakemake` as a user drives them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any

import forked_snakemake

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("Snakefile", "environment.yml", "pyproject.toml", "workflow", "profiles", "dmd2", "kernels")
RULE = re.compile(r"^(?:local)?rule (\w+):\n((?: {4}.*\n)*)", re.MULTILINE)
NOTHING = "Nothing to be done"
Overlay = Mapping[str, Any] | None
"""Keys over the preset's, as a user gives them with `--configfile`."""

# A process started in the background of a script ignores SIGINT, and hands that on to its children.
HEAR_SIGINT = "import os, signal as s, sys; s.signal(s.SIGINT, s.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


class Checkout:
    """A folder with Snakefile, workflow and packages, in which data, results and logs of preset smoke appear."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def of_repository(cls, folder: Path) -> "Checkout":
        """The repository's working files, committed to a git of their own so that records name a commit."""
        folder.mkdir(parents=True)
        for name in SOURCES:
            copy = shutil.copy2 if (REPOSITORY / name).is_file() else _copy_folder
            copy(REPOSITORY / name, folder / name)
        for command in (["init"], ["add", "."], ["commit", "-m", "The files under test"]):
            git = ["git", "-C", str(folder), "-c", "user.name=tests", "-c", "user.email=tests@localhost"]
            subprocess.run([*git, *command], check=True, capture_output=True)
        return cls(folder)

    def copy(self, folder: Path) -> "Checkout":
        """Everything in here, results and Snakemake's memory of them included, in another folder."""
        _copy_folder(self.folder, folder)
        return Checkout(folder)

    def __truediv__(self, path: str) -> Path:
        return self.folder / path

    def command(self, *arguments: str, overlay: Overlay = None, config: str = "preset=smoke") -> list[str]:
        """`snakemake ARGUMENTS` with preset smoke and `overlay` on it; targets come first in `arguments`."""
        options = self._options(overlay, config)
        return [sys.executable, "-c", HEAR_SIGINT, sys.executable, "-m", "snakemake", *arguments, *options]

    def _options(self, overlay: Overlay, config: str) -> list[str]:
        options = ["--config", *config.split()]
        if overlay:
            file = self / "overlay.yaml"
            file.write_text(json.dumps(overlay))  # JSON is YAML
            options += ["--configfile", str(file)]
        return options

    def snakemake(
        self,
        *arguments: str,
        overlay: Overlay = None,
        config: str = "preset=smoke",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs `snakemake ARGUMENTS` to its end, options as for `command`; `stdout` has all it printed."""
        surroundings = environment() | (env or {})
        return forked_snakemake.run(self.folder, [*arguments, *self._options(overlay, config)], surroundings)

    def snakemake_started_anew(
        self, *arguments: str, prefix: tuple[str, ...] = (), env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """As `snakemake`, in a process that does its own imports."""
        command = [*prefix, *self.command(*arguments, **options)]
        surroundings = environment() | (env or {})
        how: dict[str, Any] = {"cwd": self.folder, "env": surroundings, "stdout": PIPE, "stderr": STDOUT}
        return subprocess.run(command, text=True, check=False, **how)

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Starts `snakemake ARGUMENTS` in a process group of its own."""
        how: dict[str, Any] = {"cwd": self.folder, "env": environment(), "start_new_session": True}
        return subprocess.Popen(self.command(*arguments, **options), text=True, stdout=PIPE, stderr=STDOUT, **how)

    def planned(self, *targets: str, overlay: Overlay = None) -> set[str]:
        """What a dry run would start: rules with their wildcards, such as `train dmd2` and `sample teacher/ode`."""
        done = self.snakemake(*targets, "-n", overlay=overlay)
        assert done.returncode == 0, done.stdout
        jobs = jobs_in(done.stdout)
        assert (not jobs) == (NOTHING in done.stdout), done.stdout
        return jobs

    @contextmanager
    def edited(self, path: str, old: str, new: str) -> Iterator[None]:
        """The file `path` with `old` replaced by `new` for the duration of the block."""
        file = self / path
        before = file.read_text()
        assert old in before, f"{path} has no {old!r}"
        file.write_text(before.replace(old, new))
        try:
            yield
        finally:
            file.write_text(before)

    @contextmanager
    def added(self, path: str, content: str) -> Iterator[None]:
        """A new file for the duration of the block."""
        file = self / path
        assert not file.exists()
        file.write_text(content)
        try:
            yield
        finally:
            file.unlink()


def jobs_in(text: str) -> set[str]:
    """The jobs that Snakemake announced in `text`, without the target rule that only collects.

    Those of another preset than smoke begin with its name: `other: train dmd2`.
    """
    jobs = set()
    for rule, properties in RULE.findall(text):
        found = re.search(r"^ {4}wildcards: (.*)$", properties, re.MULTILINE)
        values = dict(item.partition("=")[::2] for item in found[1].split(", ")) if found else {}
        preset = values.pop("preset", "smoke")
        job = " ".join([rule, "/".join(values.values())]).strip()
        jobs.add(job if preset == "smoke" else f"{preset}: {job}")
    return jobs - {"all"}


def environment() -> dict[str, str]:
    """The environment without what this test session, or a workflow around it, put there."""
    ours = ("PYTEST", "SNAKEMAKE", "DMD2_", "TRITON_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


def _copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
