"""Python, packages, the GPUs' driver, one kernel, and the connection between the GPUs."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dmd2.doctor import Check, failed, note, ok

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
SETUP = "run `make setup`, or `conda env update -f environment.yml`"
TIMEOUT_S = 300


def python() -> Iterator[Check]:
    """The version of Python, against pyproject.toml's range."""
    version = ".".join(map(str, sys.version_info[:3]))
    if not PROJECT.exists():
        yield note("python", f"{version}; not started in a checkout, so ranges of versions are unknown")
        return
    wanted = tomllib.loads(PROJECT.read_text())["project"]["requires-python"]
    if SpecifierSet(wanted).contains(version):
        yield ok("python", f"{version} at {sys.executable}")
    else:
        yield failed("python", version, f"use Python {wanted}, then {SETUP}")


def packages() -> Iterator[Check]:
    """The versions of all packages that the project needs, against its ranges."""
    if not PROJECT.exists():
        return
    wrong, names = [], []
    for requirement in map(Requirement, tomllib.loads(PROJECT.read_text())["project"]["dependencies"]):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        names.append(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if wrong:
        yield failed("packages", ", ".join(wrong), SETUP)
    else:
        shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in ("torch", "triton"))
        yield ok("packages", f"{len(names)} in their ranges: {shown}")


def driver() -> Iterator[Check]:
    """The NVIDIA driver, and whether torch can use the GPUs that it shows."""
    import torch

    built = torch.version.cuda
    if shutil.which("nvidia-smi") is None:
        if torch.cuda.is_available():
            yield ok("driver", f"{torch.cuda.device_count()} GPUs; nvidia-smi is not on the path")
        else:
            yield note("driver", "no NVIDIA driver: presets for CPU (digits, smoke) run here")
        return
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode or not done.stdout.strip():
        said = " ".join((done.stdout + done.stderr).split())[:120] or "it lists no GPU"
        yield failed("driver", f"nvidia-smi: {said}", "install or restart the driver (a reboot after an update)")
        return
    version, kind = (part.strip() for part in done.stdout.splitlines()[0].split(",", 1))
    found = f"driver {version}, {len(done.stdout.splitlines())} x {kind}, torch built for CUDA {built}"
    if built is None:
        yield failed("driver", found.replace("CUDA None", "CPU"), f"install torch with CUDA: {SETUP}")
    elif not torch.cuda.is_available():
        change = f"update the driver to one for CUDA {built} or later, and see CUDA_VISIBLE_DEVICES"
        yield failed("driver", f"{found}, which finds no GPU", change)
    else:
        yield ok("driver", found)


def kernel() -> Iterator[Check]:
    """One Triton kernel against its definition in torch: on a GPU, or by Triton's interpreter on CPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    env = os.environ if on_gpu else os.environ | {"TRITON_INTERPRET": "1"}
    done = _started("dmd2.doctor.one_kernel", dict(env))
    where = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter (no GPU: the compiler was not used)"
    if done.returncode:
        change = "install a C compiler and the Python headers, delete ~/.triton/cache, or reinstall triton"
        yield failed("kernel", f"on {where}: {_last_line(done)}", change)
    else:
        yield ok("kernel", f"matching_loss equals its definition on {where}")


def exchange() -> Iterator[Check]:
    """A sum over all GPUs by NCCL."""
    import torch

    num = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num < 2:
        yield note("nccl", f"{num} GPUs: nothing to connect")
        return
    done = _started("dmd2.doctor.one_exchange", dict(os.environ), str(num), "nccl")
    if done.returncode:
        change = "set NCCL_DEBUG=INFO and look there; try NCCL_P2P_DISABLE=1, and a larger /dev/shm in a container"
        yield failed("nccl", f"{num} GPUs: {_last_line(done)}", change)
    else:
        yield ok("nccl", f"a sum over {num} GPUs is right")


def _started(module: str, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module in a process of its own: a crash of it, or a hang, is a result."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"did not end within {TIMEOUT_S} s")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1][:200] if lines else f"ended with status {done.returncode}"
