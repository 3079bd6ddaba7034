"""`clip`: agreement of samples with their prompts by CLIP (paper, section 5.2: OpenCLIP-G).

The mean cosine between the embeddings of an image and of "A photo depicts " before its prompt, neither scaled by 100
nor clipped, in float32, as the released evaluation computes it: the centre square of the image is resized to 256 pixels
with a Lanczos filter, and then as open_clip evaluates the network. The tokenizer is open_clip's own: 77 tokens, the
last one of a cut text is the end. Shapes: N images.
"""

from __future__ import annotations

import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

from dmd2.config import ClipModel
from dmd2.errors import UserError
from dmd2.files import check_sha256
from dmd2.metrics.context import Context
from dmd2.metrics.distances import Device
from dmd2.metrics.images import Images, Labels, batches, resized
from dmd2.metrics.measure import Batch, Draw, Means

PREFIX = "A photo depicts "
SIDE = 256
FORWARD_BATCH = 64


class ClipScorer:
    """The cosines of images and prompts by a network of open_clip, loaded when first used."""

    def __init__(self, config: ClipModel, device: Device = "cpu", batch_size: int = FORWARD_BATCH) -> None:
        self.config, self.device, self.batch_size = config, device, batch_size

    @torch.no_grad()
    def cosines(self, images: Images, prompts: Labels) -> NDArray[np.float64]:
        """The cosine (N,) of each image (N, H, W, C) with its prompt; grey images are repeated to three channels."""
        parts = [self._cosines(images[part], prompts[part]) for part in batches(len(images), self.batch_size)]
        return np.concatenate(parts)

    def _cosines(self, images: Images, prompts: Labels) -> NDArray[np.float64]:
        network, preprocess, tokenize = self._loaded
        pictures = [Image.fromarray(x) for x in np.broadcast_to(resized(images, SIDE), (len(images), SIDE, SIDE, 3))]
        x = torch.stack([preprocess(picture) for picture in pictures]).to(self.device)
        tokens = tokenize([PREFIX + str(prompt) for prompt in prompts]).to(self.device)
        ours, theirs = network.encode_image(x, normalize=True), network.encode_text(tokens, normalize=True)
        return F.cosine_similarity(ours.double(), theirs.double()).cpu().numpy()

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        """The network, its image transform and its tokenizer. Raises UserError for a missing or unsuitable file."""
        import open_clip  # slow

        config, file = self.config, self.config.weights
        if config.model not in open_clip.list_models():
            raise UserError(f"evaluation.clip.model: open_clip has no {config.model!r}; see open_clip.list_models()")
        if file is not None:
            if not Path(file.path).is_file():
                raise UserError(f"{file.path}: no such file (evaluation.clip.weights.path); correct the path")
            check_sha256(file.path, file.sha256)
        source = file.path if file else config.pretrained
        try:  # tensors alone are read: open_clip passes weights_only
            network, _, preprocess = open_clip.create_model_and_transforms(
                config.model, pretrained=source, device=self.device, weights_only=True
            )
        except (RuntimeError, OSError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"evaluation.clip: {source} is no weights of open_clip's {config.model} ({first}); name a file in "
                f"evaluation.clip.weights, or allow the download"
            ) from None
        return network.eval(), preprocess, open_clip.get_tokenizer(config.model)


class ClipScore:
    """The measure `clip_score`, with the column `clip`."""

    def __init__(self, context: Context) -> None:
        self._scorer = ClipScorer(context.evaluation.clip or ClipModel(), context.device)

    def observe(self, batch: Batch) -> Means:
        """The cosines, summed."""
        return Means.of(self._scorer.cosines(batch.whole[0], batch.labels))

    def value(self, sums: Means) -> dict[str, float]:
        """The mean."""
        return sums.means("clip")

    def floor(self, draw: Draw) -> dict[str, float]:
        """Nothing: real images are kept as thumbnails, which CLIP would score lower."""
        del draw
        return {}
