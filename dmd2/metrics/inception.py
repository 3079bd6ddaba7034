"""The Inception network of the published FID figures, from a TorchScript file that the user supplies.

The file is NVIDIA's `inception-2015-12-05.pt`, which clean-fid uses and which holds the same network as the pickle of
EDM's evaluation. With `return_features=True` it resizes to 299 x 299 internally, with TensorFlow 1's bilinear
interpolation, as EDM and clean-fid's mode `legacy_tensorflow` do. With `no_output_bias=True` it returns the softmax of
its 1008 classes without the last layer's bias, from which published inception scores are computed (Salimans et al.
2016 and NVIDIA's metrics). Shapes: N images, C channels, D = 2048 features, K = 1008 classes.

`torch.jit.load` runs TorchScript, not Python, and unpickles nothing into Python; but TorchScript is a program whose
operators can access files. The file is therefore loaded only if its SHA-256 equals the one in the preset.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dmd2 import config
from dmd2.errors import UserError
from dmd2.files import check_sha256, sha256
from dmd2.metrics.extractor import Observed
from dmd2.metrics.images import PATCH, Images, batches, check_images

SOURCE = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
FORWARD_BATCH = 64


class InceptionExtractor:
    """The pooled features of a TorchScript network called as `network(images, return_features=True)`.

    Returns class probabilities if the network also has an argument `no_output_bias`.
    """

    name = "inception"

    def __init__(
        self, network: torch.jit.ScriptModule, device: torch.device | str = "cpu", batch_size: int = FORWARD_BATCH
    ) -> None:
        self.network = network.to(device).eval()
        self.device, self.batch_size = device, batch_size
        schema: Any = network.forward.schema  # type: ignore[attr-defined]  # of a ScriptMethod
        self._scores = "no_output_bias" in {argument.name for argument in schema.arguments}
        probe = self.observe(np.zeros((1, 64, 64, 3), np.uint8))
        self.dim = probe.features.shape[1]
        if probe.probabilities is not None and not np.allclose(probe.probabilities.sum(axis=1), 1, atol=1e-3):
            raise TypeError("its outputs with no_output_bias=True are not probabilities")

    @torch.no_grad()
    def observe(self, images: Images, *, detailed: bool = True, bicubic: bool = False) -> Observed:
        """Features of images of any size, and class probabilities; grey images are repeated to three channels.

        `bicubic` resizes them to 299 x 299 with clean-fid's filter; the network's own then leaves them as they are.
        `classes` is None: the network's classes are not the data's.
        """
        check_images(images)
        features, probabilities = [], []
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as NVIDIA's metrics, for accuracy
            for part in batches(len(images), self.batch_size):
                x = self._input(to_input(images[part]) if bicubic else images[part])
                features.append(self.network(x, return_features=True).flatten(1).double().cpu().numpy())
                if detailed and self._scores:
                    probabilities.append(self.network(x, no_output_bias=True).flatten(1).double().cpu().numpy())
        return Observed(np.concatenate(features), None, np.concatenate(probabilities) if probabilities else None)

    def _input(self, images: NDArray) -> torch.Tensor:
        x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # (N, C, H, W)
        return x.expand(-1, 3, -1, -1).to(self.device, torch.float32)  # 0..255


def to_input(images: Images) -> NDArray[np.float32]:
    """Images (N, H, W, C) of 0..255 as (N, 299, 299, C), by PIL's antialiased bicubic filter without rounding.

    As clean-fid's mode `clean`: each channel on its own in float32, and clipped.
    """
    size = (PATCH, PATCH)
    channels = np.moveaxis(images, 3, 1).reshape(-1, *images.shape[1:3]).astype(np.float32)
    made = [np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC)) for channel in channels]
    resized = np.stack(made).clip(0, 255).reshape(len(images), -1, *size)
    return np.moveaxis(resized, 1, 3)


def load_inception(
    features: config.Features,
    data: config.Data,
    weights: Path | None,
    device: torch.device | str = "cpu",
    batch_size: int = FORWARD_BATCH,
) -> InceptionExtractor:
    """Loads the extractor from `weights`, or else from the file in `features.weights`.

    Raises UserError if the file is missing, its SHA-256 differs from the preset's, or it is not such a network.
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
    if named.sha256 is None:
        raise UserError(
            f"features.weights.sha256 is not set, and a TorchScript file is a program: compare its SHA-256 "
            f"{sha256(path)} with a copy you trust, then set it"
        )
    check_sha256(path, named.sha256, f"fetch {SOURCE} again, or correct features.weights.sha256")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated
            network = torch.jit.load(str(path), map_location="cpu")
        return InceptionExtractor(network, device, batch_size)
    except (RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: not a TorchScript network that takes (images, return_features) ({first}); fetch {SOURCE}"
        ) from None
