"""Published teachers and released students: checked, written as the outputs of a run, and used as such."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edm_by_hand import randomised
from edm_pickles import edm_pickle
from torch import Tensor

from dmd2 import config
from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.lineage.spec import Spec, files_in, read_spec
from dmd2.method.denoiser import Denoiser
from dmd2.method.distillation import Distillation
from dmd2.stages import imports, train
from dmd2.stages.open_weights import open_teacher, open_weights
from dmd2.teachers import load_teacher

DATA = config.Data(source="digits", resolution=8, channels=1, num_classes=10, levels=17)
NETWORK = config.Network(
    model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8
)
TEACHER = config.TeacherConfig(kind="edm", network=NETWORK)
INPUTS = torch.ones(2, 1, 8, 8), torch.ones(2), {"label": torch.tensor([3, 7])}


def network(seed: int) -> Denoiser:
    return randomised(load_teacher(TEACHER, DATA).copy_network(), seed)


def released(folder: Path, **parts: dict[str, Tensor]) -> Path:
    """A checkpoint folder as the released code leaves it: every network in its file, under its name there."""
    folder.mkdir()
    torch.save(network(1).state_dict(), folder / "pytorch_model.bin")
    networks = {"real_unet": network(2).state_dict(), "fake_unet": network(3).state_dict(), **parts}
    guidance = {f"{part}.{name}": value for part, state in networks.items() for name, value in state.items()}
    head = {"cls_pred_branch.0.weight": torch.ones(3), "karras_sigmas": torch.ones(1000)}
    torch.save(guidance | head, folder / "pytorch_model_1.bin")
    return folder


def import_spec(path: Path, checksum: str | None = None) -> Spec:
    weights = config.StudentWeights(path=str(path), sha256=checksum)
    return Spec.of("import", "released", data=DATA, teacher=TEACHER, weights=weights)


def teacher_spec(path: Path, checksum: str | None = None) -> Spec:
    weights = config.WeightsFile(path=str(path), sha256=checksum)
    return Spec.of("teacher", "teacher", data=DATA, teacher=TEACHER.model_copy(update={"weights": weights}))


def upstream(name: str, spec: Spec) -> Spec:
    return Spec.of("sample", "released/student", {name: spec}, data=DATA, teacher=TEACHER)


@pytest.mark.parametrize("kind", ["file", "folder", "data parallel", "old format"])
def test_released_student_samples_as_the_network_it_was(kind: str, tmp_path: Path):
    path, state = tmp_path / "student.bin", network(1).state_dict()
    if kind == "folder":
        path = released(tmp_path / "checkpoint")
    elif kind == "data parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "file")
    spec, out = import_spec(path), tmp_path / "generator.safetensors"
    imports.student(spec, out, None)
    model = open_teacher(upstream("model", spec), out, upstream="model").denoiser
    assert torch.equal(model(*INPUTS), network(1)(*INPUTS))


def test_record_says_what_was_imported(tmp_path: Path):
    folder, out = released(tmp_path / "checkpoint"), tmp_path / "generator.safetensors"
    checksum = sha256(folder / "pytorch_model.bin")
    imports.student(import_spec(folder, checksum), out, None)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["run"] == "released"
    assert record["origin"] == "file"
    assert record["source"] == {"file": "pytorch_model.bin", "sha256": checksum}
    assert record["num_tensors"] == len(network(1).state_dict())
    assert record["num_parameters"] == sum(p.numel() for p in network(1).parameters())
    assert not {"iterations", "kernels", "seed", "checkpoint_step"} & record.keys()


def test_run_goes_on_from_a_released_folder(tmp_path: Path):
    spec, out = import_spec(released(tmp_path / "checkpoint")), tmp_path / "networks.safetensors"
    imports.student(spec, None, out)
    start = open_weights(out, spec.digest)
    settings = config.Train(gan_generator_weight=0, gan_critic_weight=0, batch_size=2, iterations=20)
    run = Distillation(load_teacher(TEACHER, DATA), settings, start=start)
    assert torch.equal(run.generator(*INPUTS), network(1).eval()(*INPUTS))
    assert torch.equal(run.critic.fake(*INPUTS), network(3).eval()(*INPUTS))


def test_teacher_is_imported_without_any_data(tmp_path: Path):
    source, out = network(5), tmp_path / "out" / "teacher.safetensors"
    path = tmp_path / "published.pkl"
    path.write_bytes(edm_pickle(source))
    spec = teacher_spec(path, sha256(path))
    train.teacher(spec, None, tmp_path / "state", out, tmp_path / "out" / "log.jsonl", config.Runtime(device="cpu"))
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["source"] == {"file": "published.pkl", "sha256": sha256(path)}
    assert record["origin"] == "file"
    opened = open_teacher(upstream("teacher", spec), out)
    assert torch.equal(opened.denoiser(*INPUTS), source.eval()(*INPUTS))
    assert not (tmp_path / "state").exists()


def fails(spec: Spec, out: Path, networks: bool = False) -> str:
    """The one line that an import ends with, which must write nothing."""
    with pytest.raises(UserError) as caught:
        imports.student(spec, None if networks else out, out if networks else None)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_the_configured_student_is_refused_before_anything_is_written(tmp_path: Path):
    out, folder = tmp_path / "out.safetensors", released(tmp_path / "checkpoint")
    path, state = tmp_path / "student.bin", network(1).state_dict()
    assert "student.bin: no such weight file; put it there" in fails(import_spec(path), out)
    assert "empty: no model.safetensors" in fails(import_spec(empty(tmp_path / "empty")), out)
    assert "expected 0000" in fails(import_spec(folder, "0" * 64), out)

    torch.save({**state, "model.extra": torch.ones(1)}, path)
    assert "1 unexpected: model.extra" in fails(import_spec(path), out)
    torch.save(dict(list(state.items())[3:]), path)
    assert "3 missing: model.map_layer0.weight, " in fails(import_spec(path), out)
    torch.save({"state_dict": state}, path)
    assert "entry 'state_dict' is OrderedDict, not a tensor" in fails(import_spec(path), out)
    torch.save([1], path)
    assert "holds list, not a state dict" in fails(import_spec(path), out)

    guidance = torch.load(folder / "pytorch_model_1.bin", weights_only=True)
    torch.save(guidance, path)
    assert f"{len(state)} missing" in fails(import_spec(path), out)


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_run_cannot_go_on_from_less_than_generator_and_fake_score(tmp_path: Path):
    out, path = tmp_path / "out.safetensors", tmp_path / "student.bin"
    torch.save(network(1).state_dict(), path)
    assert "a generator alone cannot initialise a run; name the released folder" in fails(import_spec(path), out, True)
    folder = released(tmp_path / "checkpoint", fake_unet={})
    reported = fails(import_spec(folder), out, True)
    assert "pytorch_model_1.bin: fake_unet.*: not the weights of the configured network" in reported
    (folder / "pytorch_model_1.bin").unlink()
    assert "a generator alone cannot initialise a run" in fails(import_spec(folder), out, True)


def test_moved_file_is_the_same_spec_and_is_found_by_its_checksum():
    here, there = import_spec(Path("/a/x.bin"), "1" * 64), import_spec(Path("/b/x.bin"), "1" * 64)
    assert here.to_json() == there.to_json()
    assert here.digest == there.digest
    configured: dict[str, Any] = {
        "weights": {"path": "/b/x.bin", "sha256": "1" * 64},
        "vgg": {"path": "v", "sha256": None},
    }
    assert files_in({"runs": {"some": configured}}) == {"1" * 64: "/b/x.bin"}
    assert read_spec(here.to_json()).located(files_in(configured)) == there
    unpinned = import_spec(Path("/a/x.bin"))
    assert read_spec(unpinned.to_json()).located(files_in(configured)) == unpinned
