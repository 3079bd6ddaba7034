"""The Inception network of the published FID figures, from a TorchScript file that the user supplies.

The file is NVIDIA's `inception-2015-12-05.pt`, which clean-fid uses and which holds the same network as the pickle of
EDM's evaluation. Called with `return_features=True` it resizes to 299 x 299 inside, in TensorFlow's old bilinear way,
as EDM and clean-fid's mode `legacy_tensorflow` do. Shapes: N images, C channels, D = 2048 features.

`torch.jit.load` compiles and runs TorchScript, not Python, and unpickles nothing into Python; but TorchScript is a
program, whose operators can reach files. The file is therefore loaded only if its SHA-256 is the one in the preset.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from dmd2 import config
from dmd2.errors import UserError
from dmd2.metrics.images import Images, Matrix, batches, check_images
from dmd2.records import sha256

SOURCE = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
FORWARD_BATCH = 64


class InceptionExtractor:
    """The pooled features of a TorchScript network called as `network(images, return_features=True)`."""

    name = "inception"

    def __init__(self, network: torch.jit.ScriptModule, device: torch.device | str = "cpu") -> None:
        self.network = network.to(device).eval()
        self.device = device
        self.dim = self.features(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]

    @torch.no_grad()
    def features(self, images: Images) -> Matrix:
        """The features of images of any size, float64 (N, D); grey images are repeated over three channels."""
        check_images(images)
        parts = [self._forward(images[part]) for part in batches(len(images), FORWARD_BATCH)]
        return torch.cat(parts).double().cpu().numpy()

    def classify(self, images: Images) -> None:
        """None: the network's classes are in another order than the data's."""

    def _forward(self, images: Images) -> torch.Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (N, C, H, W)
        x = x.expand(-1, 3, -1, -1).to(self.device, torch.float32)  # 0..255
        return self.network(x, return_features=True).flatten(1)


def load_inception(
    features: config.Features, data: config.Data, weights: Path | None, device: torch.device | str = "cpu"
) -> InceptionExtractor:
    """The extractor from `weights`, or else from the file that `features.weights` names.

    Raises UserError if the file is missing, has another SHA-256 than the preset's, or is no such network.
    """
    named = features.weights
    if named is None:
        raise UserError(
            f"features.weights is not set, and features.kind inception needs it: fetch {SOURCE} and give its "
            f"`path` and `sha256`"
        )
    path = Path(weights or named.path)
    if not path.is_file():
        raise UserError(f"{path}: no such file (features.weights.path); fetch {SOURCE} and put it there")
    found = sha256(path)
    if named.sha256 is None:
        raise UserError(
            f"features.weights.sha256 is not set, and a TorchScript file is a program: compare its SHA-256 {found} "
            f"with a copy you trust, then set it"
        )
    if found != named.sha256:
        raise UserError(
            f"{path}: its SHA-256 is {found}, features.weights.sha256 says {named.sha256}; fetch {SOURCE} again"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, the published file is one
            network = torch.jit.load(str(path), map_location="cpu")
        return InceptionExtractor(network, device)
    except (RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: not a TorchScript network that takes (images, return_features) ({first}); fetch {SOURCE}"
        ) from None
