"""Captions as the conditions of text-to-image networks: CLIP tokenizers and frozen CLIP text encoders.

Shapes: B batch, L text length, D text width (of all encoders together), P width of the pooled text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.method.denoiser import Cond, Conditioner

log = logging.getLogger(__name__)
Null = Literal["empty", "zeros"]
TOKENS = ("ids", "ids_2")
LENGTH = 77
"""Text length of CLIP, where no tokenizer is loaded."""


class TextShape(NamedTuple):
    """What the network expects."""

    width: int  # D
    pooled: int | None = None  # P; None: a network without pooled text and time ids


class TextConditioner:
    """Captions as `text` (B, L, D) and, for SDXL's kind, `pooled` (B, P) and `time_ids` (B, 6), float32.

    Tokens are `ids` (and `ids_2` of a second tokenizer), int32 (B, L). With one encoder `text` is its last hidden
    state (Stable Diffusion v1.5); with pooled text it is the penultimate states of all encoders side by side, and the
    pooled text is the projection of the last one (SDXL). `num_truncated` counts the prompts that were too long.

    Without tokenizers and encoders (for planning) tokens and conditions are zeros of the right shapes.
    """

    def __init__(
        self,
        shape: TextShape,
        tokenizers: Sequence[Any] = (),
        encoders: Sequence[nn.Module] = (),
        *,
        null: Null = "empty",
        time_ids: Sequence[int] = (),
        length: int = LENGTH,
    ):
        self.shape, self.tokenizers, self.encoders = shape, tuple(tokenizers), tuple(encoders)
        self.time_ids, self.length, self.num_truncated = tuple(time_ids), length, 0
        self.null_kind: Null = null
        self._empty: Cond | None = None
        if self.tokenizers:
            self.length = self.tokenizers[0].model_max_length

    def to(self, device: torch.device | str) -> TextConditioner:
        """Itself, with its encoders on `device`."""
        for encoder in self.encoders:
            encoder.to(device)
        self._empty = None
        return self

    def use_first_tokenizer(self) -> None:
        """Gives the first tokenizer's tokens to all encoders, a mistake of the released evaluation of SDXL."""
        self.tokenizers = self.tokenizers[:1] * len(self.tokenizers)
        self._empty = None

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        first = next(self.encoders[0].parameters(), None) if self.encoders else None
        return torch.device("cpu") if first is None else first.device

    def tokenize(self, labels: Sequence[Any]) -> Cond:
        """The tokens of B captions, padded or cut to L. Raises UserError for a label that is not a text."""
        captions = [str(label) if isinstance(label, str) else label for label in labels]
        for index, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise UserError(
                    f"caption {index} of a batch is {caption!r}, not a text; correct the source, or set "
                    f"`data.num_classes` and a class-conditional teacher"
                )
        names = TOKENS[: self._num_tokenizers]
        if not self.tokenizers or not captions:
            return {name: torch.zeros(len(captions), self.length, dtype=torch.int32, device="cpu") for name in names}
        self.num_truncated += self.num_too_long(captions)
        return {name: self._ids(tokenizer, captions) for name, tokenizer in zip(names, self.tokenizers, strict=True)}

    @property
    def _num_tokenizers(self) -> int:
        return len(self.tokenizers) or (1 if self.shape.pooled is None else 2)

    def _ids(self, tokenizer: Any, captions: list[str]) -> Tensor:
        found = tokenizer(captions, padding="max_length", max_length=self.length, truncation=True)
        return torch.tensor(found.input_ids, dtype=torch.int32, device="cpu")

    def num_too_long(self, captions: Sequence[str]) -> int:
        """Captions with more than L tokens, the special ones included; `tokenize` cuts them."""
        if not self.tokenizers:
            return 0
        long = [caption for caption in captions if len(caption) > self.length - 2]  # a token has a character or more
        if not long:
            return 0
        found = self.tokenizers[0](long, truncation=False, padding=False, verbose=False)
        return sum(len(ids) > self.length for ids in found.input_ids)

    @torch.no_grad()
    def embed(self, tokens: Cond) -> Cond:
        """The conditions of a batch of tokens, on their device, without gradient."""
        ids = [tokens[name] for name in TOKENS if name in tokens]
        device, num = ids[0].device, len(ids[0])
        if not self.encoders:
            cond = {"text": torch.zeros(num, self.length, self.shape.width, device=device)}
            pooled = None if self.shape.pooled is None else torch.zeros(num, self.shape.pooled, device=device)
        else:
            text, pooled = self._encoded(ids)
            cond = {"text": text.float()}
        if pooled is not None:
            cond["pooled"] = pooled.float()
            cond["time_ids"] = torch.tensor(self.time_ids, dtype=torch.float32, device=device).repeat(num, 1)
        return cond

    def _encoded(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The text (B, L, D) and the pooled text (B, P) of the ids of each tokenizer, (B, L)."""
        if self.shape.pooled is None:
            return self.encoders[0](ids[0].long()).last_hidden_state, None
        found = [
            encoder(part.long(), output_hidden_states=True) for encoder, part in zip(self.encoders, ids, strict=True)
        ]
        return torch.cat([output.hidden_states[-2] for output in found], dim=-1), found[-1].text_embeds

    def draw(self, num: int, rng: torch.Generator) -> None:
        """None: prompts come from a list."""
        return

    def null(self, cond: Cond) -> Cond:
        """The unconditional inputs of a batch of conditions: the empty prompt, or zeros; time ids stay the samples'."""
        if self.null_kind == "zeros" or not self.encoders:
            return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in cond.items()}
        text = cond["text"]
        if self._empty is None or self._empty["text"].device != text.device:
            tokens = {name: ids.to(text.device) for name, ids in self.tokenize([""]).items()}
            self._empty = self.embed(tokens)
        empty = {name: self._empty[name].to(value.dtype).expand_as(value) for name, value in cond.items()}
        return {**empty, **{name: value for name, value in cond.items() if name == "time_ids"}}


def report_truncated(conditioner: Conditioner, what: str) -> None:
    """Logs how many of the captions that were tokenized for `what` were too long, if any were."""
    if isinstance(conditioner, TextConditioner) and conditioner.num_truncated:
        found, length = conditioner.num_truncated, conditioner.length
        log.warning("%s: %d captions were longer than %d tokens, special ones included, and cut", what, found, length)
