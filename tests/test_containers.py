"""Container files and the conda environment, as far as they can be checked without building them."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "workflow/containers"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {
    "Snakefile",
    "environment.yml",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "dmd2",
    "kernels",
    "workflow",
    "profiles",
}
INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "CMD"}
SECTIONS = {"files", "post", "runscript"}


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions in order, continued lines joined."""
    text = re.sub(r"\\\n", " ", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def definition() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Header and sections of the Apptainer file."""
    header: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in (FOLDER / "Apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            current = sections.setdefault(line[1:].strip(), [])
        elif current is not None and line.strip():
            current.append(line.strip())
        elif ":" in line and not line.startswith("#"):
            header.update([(part.strip() for part in line.split(":", 1))])
    return header, sections


def test_the_dockerfile_copies_what_is_there_and_installs_declared_extras() -> None:
    steps = dockerfile()
    assert {name for name, _ in steps} <= INSTRUCTIONS
    assert [name for name, _ in steps].count("FROM") == 1
    assert steps[0][0] == "FROM"
    copied = [path for name, rest in steps if name == "COPY" for path in rest.split()[:-1]]
    assert set(copied) == NEEDED
    assert all((ROOT / path).exists() for path in copied)


def test_both_containers_have_the_same_base_packages_and_a_python_of_the_project() -> None:
    steps, (header, sections) = dockerfile(), definition()
    assert set(sections) == SECTIONS
    assert header["Bootstrap"] == "docker"
    assert header["From"] == steps[0][1]
    version = re.fullmatch(r"python:(3\.\d+)-slim-\w+", header["From"])
    assert version is not None
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{version[1]}.0")
    pairs = [line.split() for line in sections["files"]]
    assert {source for source, _ in pairs} == NEEDED
    assert all(target == f"/opt/dmd2/{source}" for source, target in pairs)
    run = " && ".join(rest for name, rest in steps if name == "RUN")
    post = " && ".join(sections["post"])
    for pattern in (r"apt-get install --yes --no-install-recommends ([^&]*?) *(?:&&|$)", r"\[([a-z,]+)\]"):
        found = [re.findall(pattern, text) for text in (run, post)]
        assert found[0], pattern
        assert [item.split() for item in found[0]] == [item.split() for item in found[1]]
    extras = set(re.findall(r"\[([a-z,]+)\]", run)[0].split(","))
    assert extras <= set(PROJECT["optional-dependencies"])


def test_the_shell_of_both_containers_parses() -> None:
    scripts = ["\n".join(lines) for name, lines in definition()[1].items() if name != "files"]
    scripts += [rest for name, rest in dockerfile() if name == "RUN"]
    for script in scripts:
        assert shlex.split(script)
        done = subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


SOLVER = next((name for name in ("micromamba", "mamba", "conda") if shutil.which(name)), None)


@pytest.mark.skipif(SOLVER is None, reason="no solver: environment.yml is only compared with pyproject.toml")
def test_a_solver_finds_the_environment() -> None:
    command = [str(SOLVER), *([] if SOLVER == "micromamba" else ["env"]), "create", "--dry-run", "--yes", "-n", "dry"]
    done = subprocess.run([*command, "-f", str(ROOT / "environment.yml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
