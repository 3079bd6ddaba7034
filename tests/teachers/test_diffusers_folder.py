"""Model folders in diffusers' layout: whole pipelines load and sample as the stock ones; anything wrong is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import KINDS, LATENT, tiny_data, tiny_teacher, write_pipeline

from dmd2 import config
from dmd2.downloads.hub import resolve
from dmd2.errors import UserError
from dmd2.files import read_json, sha256, write_json
from dmd2.method.denoiser import guided
from dmd2.teachers import load_space, load_teacher
from dmd2.teachers.components import autoencoder_digest, link_components, read_record


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(kind, tmp_path_factory.mktemp(f"whole-{kind}"))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_users_folder_samples_as_its_stock_pipeline(kind: str, source: Path) -> None:
    """One guided DDIM step from pure noise to x0, by the stock pipeline and with the teacher."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(source, use_safetensors=True, local_files_only=True)
    options = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    given = {"guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    expected = pipe(["a red cat"], num_inference_steps=1, **given).images
    teacher = load_teacher(tiny_teacher(kind, source), tiny_data())
    cond = teacher.conditioner.embed(teacher.conditioner.tokenize(["a red cat"]))
    null, x = teacher.conditioner.null(cond), noise * teacher.grid.init_scale
    x0 = guided(teacher.denoiser, x, teacher.grid.sigmas[[999]], cond, null, 3.0)
    torch.testing.assert_close(x0, expected, rtol=1e-4, atol=1e-3)
    plain = teacher.denoiser(x, teacher.grid.sigmas[[999]], cond)
    assert (plain - expected).abs().max() > 0.1  # guidance is felt


def test_components_are_linked_with_a_record(kind: str, source: Path, tmp_path: Path) -> None:
    model, out = config.ModelFolder(path=str(source)), tmp_path / "components"
    assert link_components(model, out) == {"origin": {"path": str(source), "revision": None, "variant": None}}
    assert not (out / "unet").exists()
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").is_symlink()
    assert not (out / "vae" / "config.json").is_symlink()
    weights = "text_encoder/model.safetensors"
    assert sha256(out / weights) == sha256(source / weights)
    files = {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*")) if path.is_file()}
    write_json(out / "components.json", {"files": files})
    assert read_record(out) == files
    assert autoencoder_digest(out) == sha256(source / "vae" / "diffusion_pytorch_model.safetensors")
    codec, conditioner = load_space(tiny_teacher(kind), tiny_data(), out)
    whole = load_teacher(tiny_teacher(kind, source), tiny_data())
    tokens = conditioner.tokenize(["a red cat"])
    for name, value in conditioner.embed(tokens).items():
        assert torch.equal(value, whole.conditioner.embed(tokens)[name])
    x0 = torch.randn(1, *LATENT)
    assert (codec.decode(x0) == whole.codec.decode(x0)).all()
    (out / weights).unlink()
    with pytest.raises(UserError, match=r"model.safetensors: recorded in components.json, but missing"):
        read_record(out)


def test_a_variant_is_linked_under_plain_names_and_loads_as_float32(kind: str, folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        half = {name: value.half() for name, value in load_file(path).items()}
        save_file(half, path.with_name(f"{path.stem}.fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()
    with pytest.raises(UserError, match=r"no such file \(there is .*fp16.safetensors\).*teacher.weights.variant"):
        link_components(config.ModelFolder(path=str(folder)), tmp_path / "x")
    model = config.ModelFolder(path=str(folder), variant="fp16")
    link_components(model, tmp_path / "out", copy=True)
    teacher = load_teacher(tiny_teacher(kind, weights=model), tiny_data(), components=tmp_path / "out")
    assert {p.dtype for p in teacher.denoiser.parameters()} == {torch.float32}
    cond = teacher.conditioner.embed(teacher.conditioner.tokenize(["a"]))
    assert cond["text"].dtype == torch.float32
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_network_in_several_files_is_read_whole(kind: str, folder: Path) -> None:
    home = folder / "unet"
    whole = home / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    expected = load_teacher(tiny_teacher(kind, folder), tiny_data()).denoiser.state_dict()
    names, parts = list(state), {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({key: state[key] for key in chosen}, home / name)
        parts |= dict.fromkeys(chosen, name)
    whole.unlink()
    index = home / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    found = load_teacher(tiny_teacher(kind, folder), tiny_data()).denoiser.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    (home / name).unlink()
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors: no such weight file"):
        load_teacher(tiny_teacher(kind, folder), tiny_data())
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../other.safetensors"}}))
    with pytest.raises(UserError, match="no table `weight_map` of file names"):
        load_teacher(tiny_teacher(kind, folder), tiny_data())


def test_older_files_are_read(kind: str, folder: Path) -> None:
    """Vocabularies as vocab.json and merges.txt, older names in the autoencoder, null for false and one for each."""
    expected = load_teacher(tiny_teacher(kind, folder), tiny_data())
    for home in folder.glob("tokenizer*"):
        model = read_json(home / "tokenizer.json")["model"]
        (home / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (home / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        (home / "tokenizer.json").unlink()
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, old in names.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for name, v in state.items()}
    assert any(".proj_attn." in name for name in state)
    save_file(state, path, metadata={"format": "pt"})
    change(folder / "unet" / "config.json", upcast_attention=None, attention_head_dim=[2, 2], layers_per_block=[1, 1])
    found = load_teacher(tiny_teacher(kind, folder), tiny_data())
    captions = ["a red cat!", "three", ""]
    tokens = found.conditioner.tokenize(captions)
    assert {k: v.tolist() for k, v in tokens.items()} == {
        k: v.tolist() for k, v in expected.conditioner.tokenize(captions).items()
    }
    x0 = torch.randn(1, *LATENT, generator=torch.Generator().manual_seed(0))
    assert (found.codec.decode(x0) == expected.codec.decode(x0)).all()


def remove(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def set_keys(name: str, **keys: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, **keys)


def truncate(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])

    return damage


def drop_a_weight(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / name)
        del state[max(state)]
        save_file(state, folder / name, metadata={"format": "pt"})

    return damage


def spoil_a_weight(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(state, path)


def pickle_instead(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


SCHEDULER = "scheduler/scheduler_config.json"
DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (remove("vae"), "no component vae/; it must have vae, text_encoder, tokenizer, scheduler"),
    (remove("tokenizer"), "no component tokenizer/"),
    (remove("unet/config.json"), "unet/config.json: no such file"),
    (remove("unet/diffusion_pytorch_model.safetensors"), "only safetensors are read"),
    (pickle_instead, r"there is config.json, diffusion_pytorch_model.bin\); only safetensors"),
    (set_keys(SCHEDULER, prediction_type="v_prediction"), "predicts v_prediction, but teacher.prediction is epsilon"),
    (set_keys(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"), "predicts flow"),
    (set_keys(SCHEDULER, beta_end=0.02), "beta_end is 0.02, but the configured teacher's is 0.012"),
    (set_keys(SCHEDULER, beta_schedule="linear"), "beta_schedule is linear"),
    (set_keys(SCHEDULER, num_train_timesteps=500), "num_train_timesteps is 500"),
    (set_keys(SCHEDULER, rescale_betas_zero_snr=True), "rescale_betas_zero_snr is True"),
    (set_keys("vae/config.json", latent_channels=16), "16 latent channels, but 4 are configured"),
    (set_keys("vae/config.json", block_out_channels=[8]), "1 image pixels per latent, but 2 are"),
    (set_keys("vae/config.json", latents_mean=[0.0] * 4), "latents_mean and latents_std are not supported"),
    (set_keys("text_encoder/config.json", hidden_size=32), "teacher.network has cross_attention_dim"),
    (
        set_keys("text_encoder/config.json", max_position_embeddings=4),
        "text_encoder: 1 weights are missing or of another shape",
    ),
    (set_keys("tokenizer/tokenizer_config.json", model_max_length=20), "20 tokens of .* takes 8"),
    (set_keys("unet/config.json", flip_sin_to_cos=False), "flip_sin_to_cos is False, but teacher.network has True"),
    (truncate("vae/diffusion_pytorch_model.safetensors"), "vae: not a readable AutoencoderKL"),
    (truncate("text_encoder/model.safetensors"), "text_encoder: not a readable CLIPTextModel"),
    (truncate("unet/diffusion_pytorch_model.safetensors"), "not a readable safetensors file"),
    (truncate("tokenizer/tokenizer.json"), "not a readable CLIP tokenizer"),
    (drop_a_weight("vae/diffusion_pytorch_model.safetensors"), "vae: .*missing"),
    (drop_a_weight("text_encoder/model.safetensors"), "text_encoder: 1 weights are missing"),
    (drop_a_weight("unet/diffusion_pytorch_model.safetensors"), "not the weights of the configured network: 1 missing"),
    (spoil_a_weight, "1 weights contain NaN or infinity, the first conv_in.weight"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:40] for _, message in DAMAGES])
def test_a_damaged_or_unsuitable_folder_is_named(
    damage: Callable[[Path], None], message: str, source: Path, kind: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as raised:
        load_teacher(tiny_teacher(kind, folder), tiny_data())
    assert str(raised.value).startswith(str(folder))
    assert "\n" not in str(raised.value)


def test_images_of_other_channels_are_refused(kind: str, source: Path) -> None:
    with pytest.raises(UserError, match="3 image channels, but 1 are configured"):
        load_teacher(tiny_teacher(kind, source), tiny_data(channels=1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": "/no/such/folder"}, "/no/such/folder: no such folder"),
        ({"path": "models/sd15/unet"}, "models/sd15/unet: no such folder"),
        ({"path": "owner/name"}, "a repository of the hub needs a revision"),
        ({"path": "owner/name", "revision": "abc"}, "run `hf download owner/name --revision abc`"),
    ],
)
def test_a_model_that_is_not_here_is_refused_without_the_network(
    model: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    with pytest.raises(UserError, match=message):
        resolve(config.ModelFolder(**model))


def test_a_repository_in_the_hubs_cache_is_found(source: Path, kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(source, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = config.ModelFolder(path="owner/name", revision=commit)
    assert resolve(model) == snapshot
    assert load_teacher(tiny_teacher(kind, weights=model), tiny_data()).conditioner.tokenize(["a"])
    origin = link_components(model, tmp_path / "components")["origin"]
    assert origin == {"path": "owner/name", "revision": commit, "variant": None}
