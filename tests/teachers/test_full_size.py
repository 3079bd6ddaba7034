"""The ImageNet-64 network at its full size, from a pickle of EDM's format to its outputs."""

import gc
import json
from pathlib import Path

import edm_by_hand
import torch
from edm_by_hand import distance, randomised
from edm_pickles import write_edm_pickle
from hostile import little_memory
from torch import Tensor

from dmd2 import config
from dmd2.files import sha256
from dmd2.lineage.spec import Spec
from dmd2.stages import imports
from dmd2.stages.open_weights import open_teacher
from dmd2.teachers.edm import build_denoiser

DATA = config.Data(source="imagenet_tar", resolution=64, num_classes=1000)
TEACHER = config.TeacherConfig(kind="edm")
PRECISIONS = {"fp32": 1e-5}
if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # elsewhere a pass takes ten minutes; small networks are tested anyway
    PRECISIONS["bf16"] = 3e-2
SIGMA, LABEL = torch.tensor([2.5]), {"label": torch.tensor([417])}


def image() -> Tensor:
    """A sixteenth of the pixels: every weight is used all the same, and fp64 convolutions are slow."""
    return SIGMA * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def write_published(path: Path) -> tuple[Tensor, Tensor]:
    """A pickle of the whole network, filled at random; x0 and tap by the formulas written a second time."""
    denoiser = randomised(build_denoiser(TEACHER, DATA))
    with path.open("wb") as file:
        write_edm_pickle(denoiser, file)
    sigma = SIGMA.double()
    c_in, c_out = (sigma**2 + 0.25).rsqrt(), 0.5 * sigma * (sigma**2 + 0.25).rsqrt()
    state = denoiser.model.state_dict()
    out, outputs = edm_by_hand.unet(state, c_in * image(), sigma.log() / 4, LABEL["label"], channels_per_head=64)
    return 0.25 / (sigma**2 + 0.25) * image() + c_out * out, outputs[-1]


def test_full_size_network_is_imported_and_equals_its_formulas(tmp_path: Path):
    path, out = tmp_path / "edm-imagenet-64x64-cond-adm.pkl", tmp_path / "teacher.safetensors"
    with little_memory(8 * 2**30), torch.no_grad():
        truth, tap = write_published(path)
        gc.collect()
        weights = config.WeightsFile(path=str(path), sha256=sha256(path))
        teacher = TEACHER.model_copy(update={"weights": weights})
        spec = Spec.of("teacher", "teacher", data=DATA, teacher=teacher)
        imports.teacher(spec, out)
        record = json.loads(out.with_suffix(".json").read_text())
        assert (record["num_tensors"], record["num_parameters"]) == (553, 295_899_267)

        pairs = Spec.of("pairs", "pairs", {"teacher": spec}, data=DATA, teacher=TEACHER)
        denoiser = open_teacher(pairs, out).denoiser
        denoiser.sample_shape = (3, 16, 16)
        for precision, within in PRECISIONS.items():
            denoiser.precision = precision
            x0, (features,) = denoiser.denoise_and_tap(image(), SIGMA, LABEL, 1)
            assert x0.dtype == features.dtype == torch.float32
            assert 0 < distance(x0, truth) < within
            assert 0 < distance(features, tap) < within
