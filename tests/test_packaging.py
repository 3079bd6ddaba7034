"""What the package claims to need is what it needs, and it starts wherever it is unpacked."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
DEVELOPMENT = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["optional-dependencies"]["dev"])}
DEMO = {canonicalize_name(r.name) for r in map(Requirement, PROJECT["optional-dependencies"]["demo"])}
FIRST_PARTY = {"dmd2", "dmd2_kernels"}
DISTRIBUTIONS = importlib.metadata.packages_distributions()
WITHOUT_CODE = {"__pycache__", ".venv", ".git"}


def test_environment_for_conda_has_the_same_requirements():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(item["pip"] for item in conda["dependencies"] if isinstance(item, dict))
    assert pip == PROJECT["dependencies"] + PROJECT["optional-dependencies"]["slurm"]
    python = next(item for item in conda["dependencies"] if isinstance(item, str) and item.startswith("python "))
    assert python == f"python {PROJECT['requires-python']}"


def test_installed_versions_are_in_the_declared_ranges():
    here = {name: r for name, r in (RUNTIME | DEVELOPMENT).items() if r.marker is None or r.marker.evaluate()}
    versions = {name: importlib.metadata.version(name) for name in here}
    assert {name: version for name, version in versions.items() if version not in here[name].specifier} == {}


def minor_release(name: str) -> Version:
    """The minor release that a requirement's range spans, such as 2.14 of `>=2.14.1,<2.15`."""
    bounds = {clause.operator: Version(clause.version) for clause in RUNTIME[name].specifier}
    low, high = bounds[">="], bounds["<"]
    assert (high.major, high.minor) == (low.major, low.minor + 1), f"{name} spans more than one minor release"
    return Version(f"{low.major}.{low.minor}")


def test_torch_torchvision_and_triton_are_pinned_to_releases_that_belong_together():
    torch, torchvision, triton = (minor_release(name) for name in ("torch", "torchvision", "triton"))
    # torchvision 0.(n + 15) is built for torch 2.n: a newer one would load an extension of another ABI.
    assert (torchvision.major, torchvision.minor) == (0, torch.minor + 15)
    wanted = [r for r in map(Requirement, importlib.metadata.requires("torch") or []) if r.name == "triton"]
    assert all(r.specifier.contains(f"{triton}.0") for r in wanted)


def test_clean_fid_has_a_scipy_that_it_can_call():
    """clean-fid 0.1.35 calls `scipy.linalg.sqrtm(disp=...)`, an argument that SciPy 1.18 does not take."""
    assert str(RUNTIME["clean-fid"].specifier) == "==0.1.35"
    assert not RUNTIME["scipy"].specifier.contains("1.18.0")


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in files if not WITHOUT_CODE & set(path.parts))


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names)


def undeclared(path: Path, local: set[str], declared: set[str]) -> set[str]:
    foreign = imported(path) - local
    return {name for name in foreign if not declared & {canonicalize_name(d) for d in DISTRIBUTIONS.get(name, [])}}


def test_packages_import_only_what_they_declare():
    found = {str(path): undeclared(path, FIRST_PARTY, set(RUNTIME)) for path in python_files("dmd2", "kernels")}
    page = str(ROOT / "dmd2/stages/demo.py")
    assert {path: names for path, names in found.items() if names and path != page} == {}
    assert found[page] <= DEMO, "only the page may import what `pip install -e '.[demo]'` adds"


def test_tests_import_only_what_is_declared():
    files = python_files("tests")
    local, declared = FIRST_PARTY | {path.stem for path in files}, set(RUNTIME | DEVELOPMENT)
    found = {str(path): undeclared(path, local, declared) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


def python_in_root(code: str, *search: Path) -> str:
    """What `python -c CODE` prints in the repository's root, with `search` on its path behind the root."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, search))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_folder_kernels_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert python_in_root("import kernels; print(kernels.__file__)") == "None"  # a namespace and nothing else


def test_installed_distribution_called_kernels_is_not_shadowed(tmp_path: Path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): return 'installed'\n")
    assert python_in_root("import kernels; print(kernels.get_kernel())", tmp_path) == "installed"


COMMANDS = ("make table1", "make table3", "make tables", "make report", "make test", "make dag")


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_the_command_and_the_makefile_has_it(command: str):
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = " ".join(re.findall(r"^(?:\.PHONY:|TABLES :=) (.*)$", makefile, re.MULTILINE))
    assert command in readme
    assert command.removeprefix("make ") in targets.split()


def test_readme_names_the_plain_commands():
    readme = (ROOT / "README.md").read_text()
    assert "snakemake --cores all results/table1.csv" in readme
    assert "pytest" in readme


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_launcher_starts_one_process_or_one_for_each_gpu(tmp_path: Path, gpus: int):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@" "PYTHONPATH=$PYTHONPATH"\n')
    stub.chmod(0o755)
    arguments = ["train", "--spec", '{"a": "b c"}', "--state", "a folder"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [str(ROOT / "workflow/launch.sh"), str(gpus), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    *started, path = done.stdout.splitlines()
    module = {0: ["dmd2.commands.preloaded"], 1: ["dmd2"]}.get(gpus, ["dmd2.training.launcher", str(gpus)])
    assert started == ["python", "-P", "-m", *module, *arguments]
    assert path == f"PYTHONPATH={ROOT}/workflow/python:{ROOT}/kernels"  # also where the project is not installed


def test_launcher_passes_the_stages_exit_status_on(tmp_path: Path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 143\n")
    (tmp_path / "python").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run([str(ROOT / "workflow/launch.sh"), "0", "train"], env=env, check=False).returncode == 143
