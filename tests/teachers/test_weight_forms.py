"""Weights as others save them: wrapped by torch.compile, by accelerate, in shards; and what is not weights at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toy import assert_equal

from dmd2.errors import UserError
from dmd2.teachers.weights import read_weights

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


def sharded(folder: Path) -> Path:
    for number, name in enumerate(STATE):
        save_file({name: STATE[name]}, folder / f"model-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(STATE)}}))
    return index


def test_shards_are_read_by_their_index_or_their_folder(tmp_path: Path):
    index = sharded(tmp_path)
    assert_equal(read_weights(index), STATE)
    assert_equal(read_weights(tmp_path), STATE)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-1\.safetensors: no such weight file"):
        read_weights(tmp_path)


def test_an_index_cannot_name_other_folders_or_tensors_that_are_nowhere(tmp_path: Path):
    index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a.weight": "../model-0.safetensors"}}))
    with pytest.raises(UserError, match="not in the index's folder"):
        read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a.weight": "model-0.safetensors", "c": "model-0.safetensors"}}))
    with pytest.raises(UserError, match="1 tensors that are in no shard: c"):
        read_weights(index)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pkl"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>\n<html><title>Sign in</title></html>", "a web page, not weights"),
        (b"\n  <html lang='en'>", "a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a pointer of Git LFS"),
    ],
)
def test_what_a_failed_download_leaves_is_called_that(suffix: str, content: bytes, said: str, tmp_path: Path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_weights(path)


def test_an_empty_folder_says_what_it_should_have(tmp_path: Path):
    with pytest.raises(UserError, match=r"no model\.safetensors, .* in this folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module"])
def test_parts_that_wrappers_of_inner_modules_leave_are_dropped(part: str, tmp_path: Path):
    """A compiled or sharded block: a.PART.weight."""
    wrapped = {name.replace(".", f".{part}."): value for name, value in STATE.items()}
    save_file(wrapped, tmp_path / "w.safetensors")
    assert_equal(read_weights(tmp_path / "w.safetensors"), STATE)


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf<!DOCTYPE html>", b"<!-- login -->\n<html>"])
def test_web_pages_that_begin_otherwise_are_called_that(start: bytes, tmp_path: Path):
    (tmp_path / "w.safetensors").write_bytes(start + b"x" * 100)
    with pytest.raises(UserError, match="a web page, not weights"):
        read_weights(tmp_path / "w.safetensors")


def test_hidden_copies_of_an_index_are_not_taken(tmp_path: Path):
    sharded(tmp_path)
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"resource fork")
    assert_equal(read_weights(tmp_path), STATE)
