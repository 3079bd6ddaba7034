"""The perceptual distance LPIPS (Zhang et al. 2018, arXiv 1801.03924) between generated images and their targets.

It is the regression loss of the original DMD, with VGG-16 and images resized to 224 x 224 (arXiv 2311.18828,
section 3.3 and appendix B). The package `lpips` provides the distance and the weights of its linear layers; the VGG-16
weights are torchvision's, from a file that the user supplies.

Shapes: B batch, C channels, H, W height and width.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmd2.config import WeightsFile
from dmd2.errors import UserError
from dmd2.files import check_sha256

SOURCE = "https://download.pytorch.org/models/vgg16-397923af.pth"
RESOLUTION = 224


def load_lpips(weights: WeightsFile, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the mean LPIPS () between x0 and targets (B, C, H, W) in [-1, 1], differentiable in x0.

    Grey images are repeated to three channels. `weights` is torchvision's VGG-16. Raises UserError if the file is
    missing, has another SHA-256 than the one set, or other content; nothing in it is executed.
    """
    return distance_by(load_network(weights, device))


def load_network(weights: WeightsFile, device: torch.device | str = "cpu", key: str = "train.vgg_weights") -> nn.Module:
    """The LPIPS network of two batches (B, 3, H, W) in [-1, 1] of at least 16 pixels, frozen: (B, 1, 1, 1).

    Raises UserError as `load_lpips`, naming `key`.
    """
    return _build(_read(weights, key), weights.path).to(device)


def distance_by(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the mean distance () by an LPIPS network of the library, of images resized to its input size."""

    def distance(x0: Tensor, target: Tensor) -> Tensor:
        each: Tensor = network(_prepared(x0), _prepared(target.detach()))  # (B, 1, 1, 1)
        return each.mean()

    return distance


def _prepared(x0: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, 224, 224) float32, bilinear."""
    x0 = x0.float().expand(-1, 3, -1, -1)
    return F.interpolate(x0, size=(RESOLUTION, RESOLUTION), mode="bilinear", align_corners=False)


def _read(weights: WeightsFile, key: str) -> dict[str, Any]:
    path = Path(weights.path)
    if not path.is_file():
        raise UserError(f"{path}: no such file ({key}.path); fetch {SOURCE} and put it there")
    check_sha256(path, weights.sha256, f"fetch {SOURCE} again, or correct {key}.sha256")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a file of tensors ({first}); fetch {SOURCE} again") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: contains a {type(state).__name__}, not named tensors; fetch {SOURCE}")
    return state


def _build(trunk: Mapping[str, Any], path: str) -> nn.Module:
    """The library's LPIPS network with the weights from the files, frozen."""
    import lpips

    network = without_values()
    network.scaling_layer = lpips.ScalingLayer()
    bundled = Path(lpips.__file__).with_name("weights") / "v0.1" / "vgg.pth"
    linear = torch.load(bundled, map_location="cpu", weights_only=True)
    state = {name: linear[_bundled(name)] for name in network.state_dict() if name.startswith("lin")}
    for name, wanted in network.net.state_dict().items():
        state[f"net.{name}"] = _checked(trunk, f"features.{name.partition('.')[2]}", wanted.shape, path)
    state |= {f"scaling_layer.{name}": value for name, value in network.scaling_layer.state_dict().items()}
    network.load_state_dict(state, assign=True)
    frozen: nn.Module = network.eval().requires_grad_(False)
    return frozen


def without_values() -> Any:
    """The library's LPIPS network on the meta device, which initialises and downloads nothing."""
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # the library uses a deprecated argument of torchvision
        return lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval().requires_grad_(False)


def _bundled(name: str) -> str:
    """The key of a linear layer's weight in the library's file; its network has each twice: lins.0 is lin0."""
    return name.replace("lins.", "lin") if name.startswith("lins.") else name


def _checked(trunk: Mapping[str, Any], name: str, shape: torch.Size, path: str) -> Tensor:
    value = trunk.get(name)
    if not isinstance(value, Tensor) or value.shape != shape:
        found = f"is {tuple(value.shape)}" if isinstance(value, Tensor) else "is missing"
        raise UserError(f"{path}: not torchvision's VGG-16: {name} {found}, expected {tuple(shape)}; fetch {SOURCE}")
    return value.float()
