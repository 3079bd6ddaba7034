"""Weights as others save them: wrapped by torch.compile, by accelerate, in shards; and what is not weights at all."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from toy import assert_equal

from dmd2.errors import UserError
from dmd2.files import sha256
from dmd2.teachers.weights import digest_of, load_weights, read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4)}


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in STATE.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_prefixes_of_wrappers_are_dropped(prefix: str, suffix: str, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(prefixed(prefix), path)
    assert_equal(read_weights(path), STATE)


def test_a_prefix_of_some_names_is_part_of_them(tmp_path: Path):
    mixed = {"module.a": torch.ones(1), "b": torch.zeros(1)}
    save_file(mixed, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").keys() == mixed.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
def test_a_folder_stands_for_the_file_in_it(name: str, tmp_path: Path):
    (torch.save if name.endswith(".bin") else save_file)(prefixed("_orig_mod."), tmp_path / name)
    assert_equal(read_weights(tmp_path), STATE)
    (tmp_path / "optimizer.bin").write_bytes(b"")
    assert_equal(read_weights(tmp_path), STATE)


def sharded(folder: Path, suffix: str = ".safetensors") -> Path:
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    for number, name in enumerate(STATE):
        save({name: STATE[name]}, folder / f"{stem}-{number}{suffix}")
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{stem}-{i}{suffix}" for i, name in enumerate(STATE)}}))
    return index


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_read_by_their_index_or_their_folder(suffix: str, tmp_path: Path):
    index = sharded(tmp_path, suffix)
    assert_equal(read_weights(index), STATE)
    assert_equal(read_weights(tmp_path), STATE)
    shards = sorted(tmp_path.glob(f"*-?{suffix}"))
    listed = "".join(f"{sha256(shard)}  {shard.name}\n" for shard in shards)
    assert digest_of(index) == hashlib.sha256(listed.encode()).hexdigest(), "what sha256sum prints, hashed"
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"{shards[1].name}: no such weight file"):
        read_weights(tmp_path)


def test_an_averaged_compiled_model_loads_into_the_network_that_it_wraps(tmp_path: Path):
    network, other = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)) for _ in range(2))
    torch.save(AveragedModel(torch.compile(network)).state_dict(), tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert_equal(dict(other.named_parameters()), dict(network.named_parameters()))


def test_an_index_cannot_name_other_folders_or_tensors_that_are_nowhere(tmp_path: Path):
    index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a.weight": "../model-0.safetensors"}}))
    with pytest.raises(UserError, match="not in the index's folder"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-0.safetensors", "c": "model-0.safetensors"}}))
    with pytest.raises(UserError, match="1 tensors that are in no shard: c"):
        read_weights(index)


STAND_INS = {
    b"<!DOCTYPE html>\n<html><title>Sign in</title></html>": "a web page, not weights",
    b"\n  <html lang='en'>": "a web page, not weights",
    b"\xef\xbb\xbf<!-- login -->\n<html>": "a web page, not weights",
    b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "a web page, not weights",
    b'{"error": "Repository not found"}': "a JSON text, not weights",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n": "a pointer of Git LFS",
    b"/annex/objects/MD5E-s1--a.bin\n": "a pointer of git-annex",
    b"": "an empty file, not weights",
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pkl"])
def test_what_a_failed_download_leaves_is_called_that(suffix: str, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    for content, said in STAND_INS.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"weights{suffix}: {said}") as caught:
            read_weights(path)
        assert "\n" not in str(caught.value)


def test_a_file_whose_length_looks_like_text_is_read(tmp_path: Path):
    """The first byte of a safetensors file is the low byte of its header's length, here that of `{`."""
    save_file(STATE, tmp_path / "plain.safetensors")
    plain = (tmp_path / "plain.safetensors").read_bytes()
    size = int.from_bytes(plain[:8], "little")
    padded = size + (ord("{") - size) % 256
    path = tmp_path / "weights.safetensors"
    path.write_bytes(padded.to_bytes(8, "little") + plain[8 : 8 + size].ljust(padded) + plain[8 + size :])
    assert path.read_bytes()[:1] == b"{"
    assert_equal(read_weights(path), STATE)


def test_an_empty_folder_says_what_it_should_have(tmp_path: Path):
    with pytest.raises(UserError, match=r"no model\.safetensors, .* in this folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module"])
def test_parts_that_wrappers_of_inner_modules_leave_are_dropped(part: str, tmp_path: Path):
    """A compiled or sharded block: a.PART.weight."""
    wrapped = {name.replace(".", f".{part}."): value for name, value in STATE.items()}
    save_file(wrapped, tmp_path / "w.safetensors")
    assert_equal(read_weights(tmp_path / "w.safetensors"), STATE)


def test_hidden_copies_of_an_index_are_not_taken(tmp_path: Path):
    sharded(tmp_path)
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"resource fork")
    assert_equal(read_weights(tmp_path), STATE)
