"""A small convolutional classifier whose last hidden layer is the feature space of small images.

It replaces Inception, and is determined by seed, data and settings, so that anyone can train the same one in seconds.
Kind `pair_classifier` is the same network with a left and a right digit at its end, for source digit_pairs.
Shapes: B batch, C channels, R resolution, D = 64 features, K classes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dmd2 import config
from dmd2.errors import UserError
from dmd2.metrics.extractor import Observed
from dmd2.metrics.images import Images, Labels, batches, check_images, check_varied
from dmd2.metrics.labels import targets
from dmd2.metrics.pair_augmentation import augmented
from dmd2.progress import Progress

DIM = 64
DIGITS = 10
FORWARD_BATCH = 256
MIN_RESOLUTION = 8


class Classifier(nn.Module):
    """Two blocks of two 3x3 convolutions (32 and 64 channels) with pooling, then two linear layers."""

    scale: Tensor  # (), standard deviation that makes the features' mean variance on the data 1

    def __init__(self, channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.fc1 = nn.Linear(64 * (resolution // 4) ** 2, DIM)
        self.fc2 = nn.Linear(DIM, num_classes)
        self.register_buffer("scale", torch.ones(()))

    def hidden(self, x: Tensor) -> Tensor:
        """The output of the first linear layer before its activation, (B, D); x is (B, C, R, R) in [-1, 1]."""
        x = F.max_pool2d(F.silu(self.conv2(F.silu(self.conv1(x)))), 2)  # (B, 32, R/2, R/2)
        x = F.max_pool2d(F.silu(self.conv4(F.silu(self.conv3(x)))), 2)  # (B, 64, R/4, R/4)
        return self.fc1(x.flatten(1))

    def logits(self, hidden: Tensor) -> Tensor:
        """The class logits (B, K) of the output (B, D) of `hidden`."""
        return self.fc2(F.silu(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, R, R) in [-1, 1] -> class logits (B, K)."""
        return self.logits(self.hidden(x))


class PairClassifier(Classifier):
    """A classifier of compositions, K = 100, that names the left and the right digit independently.

    It therefore knows each digit from 20 compositions and can name those that are missing in its training data.
    """

    def __init__(self, channels: int, resolution: int) -> None:
        super().__init__(channels, resolution, 2 * DIGITS)

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (B, 100) of 10 * left + right: sums of the digits' own, so that probabilities are products."""
        left, right = super().logits(hidden).split(DIGITS, dim=1)
        return (left[:, :, None] + right[:, None, :]).flatten(1)


class ClassifierExtractor:
    """Features, classes and class probabilities of a trained `Classifier`."""

    name = "classifier"
    dim = DIM

    def __init__(
        self, network: Classifier, device: torch.device | str = "cpu", batch_size: int = FORWARD_BATCH
    ) -> None:
        self.network = network.to(device).eval()
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def observe(self, images: Images, *, detailed: bool = True, bicubic: bool = False) -> Observed:
        """The hidden layer (N, 64) divided by `scale`, the most probable class, and the softmax."""
        del bicubic  # the images are of the network's size
        check_images(images)
        parts = [self._forward(images[part]) for part in batches(len(images), self.batch_size)]
        features, classes, probabilities = (torch.cat(column) for column in zip(*parts, strict=True))
        return Observed(
            features.double().cpu().numpy(),
            classes.cpu().numpy(),
            probabilities.cpu().numpy() if detailed else None,
        )

    def _forward(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.network.hidden(as_input(images).to(self.device))
        logits = self.network.logits(hidden)
        return hidden / self.network.scale, logits.argmax(1), logits.double().softmax(1)


class PairExtractor(ClassifierExtractor):
    """The same of a trained `PairClassifier`; the classes are those of `labels.targets`."""

    name = "pair_classifier"


def as_input(images: Images) -> Tensor:
    """The images in [-1, 1], float32 (B, C, R, R)."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def load_classifier(
    features: config.Features,
    data: config.Data,
    weights: Path | None,
    device: torch.device | str = "cpu",
    batch_size: int = FORWARD_BATCH,
) -> ClassifierExtractor:
    """Loads the extractor from a safetensors file of `train_classifier`'s weights.

    Raises UserError naming the file if it is missing, damaged, or trained on other data.
    """
    if weights is None:
        raise UserError("features.kind classifier needs the weights that the rule `features` writes, and got none")
    try:
        state = load_file(weights)
    except FileNotFoundError:
        raise UserError(f"{weights}: no such file; run the rule `features`") from None
    except SafetensorError as error:
        raise UserError(f"{weights}: not a safetensors file ({error}); delete it and run the workflow again") from None
    extractor, network = _of_kind(features, data)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if wanted != found:
        key = min(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise UserError(
            f"{weights}: `{key}` has shape {found.get(key)}, this data's classifier has {wanted.get(key)}; "
            f"delete it and run the workflow again"
        )
    network.load_state_dict(state)
    return extractor(network, device, batch_size)


def _of_kind(features: config.Features, data: config.Data) -> tuple[type[ClassifierExtractor], Classifier]:
    """The extractor's class and its network. Raises UserError if the data's labels are not those of the kind."""
    if features.kind == PairExtractor.name:
        if data.source != "digit_pairs":
            raise UserError(f"features.kind pair_classifier belongs to source digit_pairs, not {data.source}")
        return PairExtractor, PairClassifier(data.channels, data.resolution)
    if data.num_classes is None:
        raise UserError("features.kind classifier needs data with classes; use inception, or pair_classifier")
    return ClassifierExtractor, Classifier(data.channels, data.resolution, data.num_classes)


def train_classifier(
    images: Images,
    labels: Labels,
    features: config.Features,
    data: config.Data,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trains the classifier `features.kind` on the labelled images; returns its weights and facts about it.

    Weights, split and batch order depend on `features.seed` only; the global generator is not used.
    """
    _check(images, labels, data)
    rng = torch.Generator().manual_seed(features.seed)
    order = torch.randperm(len(images), generator=rng)
    num_held_out = max(1, round(len(images) * features.held_out))
    held_out, train = order[:num_held_out], order[num_held_out:]
    if len(train) == 0:
        raise UserError(f"features.held_out {features.held_out} leaves none of {len(images)} images; lower it")
    kind, network = _initialised(features, data, rng)
    network, classes = network.to(device), targets(labels)
    _fit(network, as_input(images)[train].to(device), torch.from_numpy(classes)[train].to(device), features, rng)
    extractor = kind(network, device)
    variance = float(extractor.observe(images).features.var(axis=0, ddof=1).mean())
    if not (math.isfinite(variance) and variance > 0):
        raise UserError(
            f"features: the classifier's features of the images have variance {variance}; it diverged or ignores the "
            f"images: lower features.learning_rate, or check the data"
        )
    network.scale.fill_(math.sqrt(variance))
    guessed = extractor.observe(images[held_out.numpy()]).classes
    facts = {
        "kind": extractor.name,
        "dim": DIM,
        "held_out_accuracy": float((guessed == classes[held_out.numpy()]).mean()),
        "num_train": len(train),
        "num_held_out": num_held_out,
        "scale": float(network.scale),
        "epochs": features.epochs,
        "num_parameters": sum(p.numel() for p in network.parameters()),
    }
    return {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, facts


def _check(images: Images, labels: Labels, data: config.Data) -> None:
    check_images(images, labels)
    wanted = (data.resolution, data.resolution, data.channels)
    if images.shape[1:] != wanted:
        raise UserError(f"images are {images.shape[1:]} but data.resolution and data.channels require {wanted}")
    if data.resolution < MIN_RESOLUTION:
        raise UserError(
            f"data.resolution {data.resolution} is below {MIN_RESOLUTION}, the classifier's minimum; increase it"
        )
    if data.num_classes is not None and not 0 <= labels.min() <= labels.max() < data.num_classes:
        raise UserError(f"data.num_classes is {data.num_classes} but labels reach {labels.max()}; set it above that")
    check_varied(images)


def _initialised(
    features: config.Features, data: config.Data, rng: torch.Generator
) -> tuple[type[ClassifierExtractor], Classifier]:
    """A classifier with Kaiming-uniform weights drawn from `rng`, and its extractor's class."""
    with torch.device("meta"):  # no random numbers are drawn there
        kind, network = _of_kind(features, data)
    network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=rng)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    network.scale.fill_(1)
    return kind, network


def _fit(network: Classifier, x: Tensor, y: Tensor, features: config.Features, rng: torch.Generator) -> None:
    """Adam on the cross-entropy, of augmented pairs if configured, with cosine decay of the learning rate to 0."""
    network.train()
    num_batches = math.ceil(len(x) / features.batch_size)
    optimizer = torch.optim.Adam(network.parameters(), lr=features.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, features.epochs * num_batches)
    progress = Progress("features", features.epochs)
    for epoch in range(features.epochs):
        for batch in torch.randperm(len(x), generator=rng).split(features.batch_size):
            images, classes = (x[batch], y[batch]) if not features.augment else augmented(x[batch], y[batch], rng)
            loss = F.cross_entropy(network(images), classes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.update(epoch + 1, loss.item())
