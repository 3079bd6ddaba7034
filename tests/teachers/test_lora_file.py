"""Adapters from outside: in diffusers' and kohya's format, merged exactly, and refused where they do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shared_roles import LORA, base, batch, shaken
from tiny_pipelines import KINDS, UNETS, tiny_teacher
from torch import Tensor

from dmd2.errors import UserError
from dmd2.method.noise import NoiseGrid
from dmd2.teachers.diffusers_unet import DiffusersDenoiser, build_unet
from dmd2.teachers.export import export_adapter, student_scheduler
from dmd2.teachers.lora import Role, merged, roles
from dmd2.teachers.lora_file import merge_file


def student(kind: str) -> Role:
    return shaken(roles(base(kind), {"student": LORA["student"]})["student"], 4)


def kohya(role: Role, alpha: float) -> dict[str, Tensor]:
    """The role's adapters with kohya's names."""
    found = {}
    for name, value in role.state_dict().items():
        path, factor = name.removesuffix(".weight").rsplit(".", 1)
        flat = f"lora_unet_{path.replace('.', '_')}"
        found[f"{flat}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value.detach().clone()
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_export_is_read_back(kind: str, tmp_path: Path) -> None:
    role = student(kind)
    export_adapter(tmp_path / "out", role, student_scheduler(tiny_teacher(kind), (999, 749, 499, 249)))
    plain = base(kind)
    state = merge_file(plain, tmp_path / "out" / "pytorch_lora_weights.safetensors")
    same(state, merged(role))
    assert torch.equal(plain(*batch(kind)), base(kind)(*batch(kind))), "the network itself stays"
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(*batch(kind)), role(*batch(kind)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_kohyas_files_are_read_with_their_alpha(kind: str, tmp_path: Path) -> None:
    role, path = student(kind), tmp_path / "w.safetensors"
    save_file(kohya(role, LORA["student"].alpha), path)
    same(merge_file(base(kind), path), merged(role))


def test_adapters_of_another_rank_are_refused(tmp_path: Path) -> None:
    role, path = student("sd15"), tmp_path / "w.safetensors"
    save_file(kohya(role, LORA["student"].alpha), path)
    rank = LORA["student"].rank
    same(merge_file(base(), path, rank=rank), merged(role))
    with pytest.raises(UserError, match=rf"has rank {rank}, but {rank + 1} is configured"):
        merge_file(base(), path, rank=rank + 1)


def test_unsuitable_files_are_refused(tmp_path: Path) -> None:
    role, path = student("sd15"), tmp_path / "w.safetensors"
    state = {f"unet.{name}": value.detach().clone() for name, value in role.state_dict().items()}
    save_file(state | {"text_encoder.a.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="adapters of text encoders, such as text_encoder"):
        merge_file(base(), path)
    save_file(state, path)
    with pytest.raises(UserError, match=r"fit the configured U-Net|not adapters of the configured"):
        merge_file(base("sdxl"), path)
    wide = DiffusersDenoiser(build_unet({**UNETS["sd15"], "block_out_channels": [16, 32]}), NoiseGrid.ddpm().sigmas)
    with pytest.raises(UserError, match="not adapters of the configured U-Net"):
        merge_file(wide, path)
    save_file(base().state_dict(), path)
    with pytest.raises(UserError, match=r"w\.safetensors: "):
        merge_file(base(), path)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        merge_file(base(), path)
    with pytest.raises(UserError, match="no such weight file"):
        merge_file(base(), tmp_path / "none.safetensors")
