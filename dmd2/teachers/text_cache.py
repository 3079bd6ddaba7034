"""Embeddings of few distinct prompts, computed once, in place of running the text encoders in every step.

Shapes: N distinct prompts, B batch, K tokens of one prompt (of all tokenizers).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dmd2.errors import UserError
from dmd2.method.denoiser import Cond
from dmd2.teachers.text_encoder import TextConditioner

BATCH = 64
"""Prompts embedded at once."""


class CachedConditioner:
    """A text conditioner that knows a fixed list of prompts and looks their embeddings up.

    The table has N rows of the conditions in `dtype` (77 x 2048 numbers each for SDXL: 315 kB in float16, 3.2 GB for
    10,000 prompts). The text encoders are not kept. A lookup does not wait for the GPU. Raises UserError for a prompt
    that is not in the list, or a RuntimeError from the GPU.
    """

    def __init__(self, conditioner: TextConditioner, prompts: Sequence[str], *, dtype: torch.dtype = torch.float32):
        distinct = list(dict.fromkeys(["", *prompts]))
        self.tokenize, self.num_too_long = conditioner.tokenize, conditioner.num_too_long
        self._zeros = conditioner.null_kind == "zeros"
        batches = [distinct[start : start + BATCH] for start in range(0, len(distinct), BATCH)]
        tokens = [_joined(conditioner.tokenize(batch)) for batch in batches]
        conds = [self._embedded(conditioner, batch, dtype) for batch in batches]
        self._tokens = torch.cat(tokens)  # (N, K)
        self._rows = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}
        rng = np.random.default_rng(0)
        self._factors = torch.from_numpy(rng.integers(1, 2**62, self._tokens.shape[1]) | 1)
        keys, first = np.unique(self._hash(self._tokens).numpy(), return_index=True)
        self._keys, self._order = torch.from_numpy(keys), torch.from_numpy(first)
        self._known(self._tokens)

    @staticmethod
    def _embedded(conditioner: TextConditioner, batch: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
        tokens = {name: ids.to(conditioner.device) for name, ids in conditioner.tokenize(batch).items()}
        return {
            name: value.cpu() if name == "time_ids" else value.to(dtype).cpu()
            for name, value in conditioner.embed(tokens).items()
        }

    def to(self, device: torch.device | str) -> CachedConditioner:
        """Itself, with its table on `device`."""
        self._tokens, self._factors = self._tokens.to(device), self._factors.to(device)
        self._keys, self._order = self._keys.to(device), self._order.to(device)
        self._rows = {name: value.to(device) for name, value in self._rows.items()}
        return self

    def embed(self, tokens: Cond) -> Cond:
        """The conditions of a batch of tokens, float32."""
        rows = self._known(_joined(tokens))
        return {name: value[rows].float() for name, value in self._rows.items()}

    def _hash(self, tokens: Tensor) -> Tensor:
        """One number (B,) for the tokens (B, K); integers wrap around."""
        return (tokens * self._factors).sum(1)

    def _known(self, tokens: Tensor) -> Tensor:
        """The rows (B,) of the table whose tokens are `tokens` (B, K), compared in full."""
        place = torch.searchsorted(self._keys, self._hash(tokens)).clamp(max=len(self._keys) - 1)
        rows = self._order[place]
        found = (self._tokens[rows] == tokens).all()
        problem = "a prompt is not among those whose embeddings are cached; add it to the list of prompts"
        if found.device.type == "cpu" and not found:
            raise UserError(problem)
        torch._assert_async(found, problem)
        return rows

    def draw(self, num: int, rng: torch.Generator) -> None:
        """None: prompts come from a list."""
        return

    def null(self, cond: Cond) -> Cond:
        """The unconditional inputs of a batch of conditions: the empty prompt, or zeros; time ids stay the samples'."""
        kept = {name: value for name, value in cond.items() if name == "time_ids"}
        if self._zeros:
            return {name: torch.zeros_like(value) for name, value in cond.items()} | kept
        return {name: self._rows[name][:1].to(value.dtype).expand_as(value) for name, value in cond.items()} | kept


def _joined(tokens: Cond) -> Tensor:
    """The tokens of all tokenizers side by side, int64 (B, K)."""
    return torch.cat([tokens[name].long() for name in sorted(tokens)], dim=1)
