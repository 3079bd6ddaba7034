"""Trains the small text encoder of a text-to-image teacher: a CLIP tokenizer and transformers' `CLIPTextModel`.

There is no CLIP to start from, so the encoder learns to name what a caption describes (its *targets*, such as the left
and the right digit) from its last hidden state, and is then frozen. Shapes: B batch, L text length, D width.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dmd2.config import ComponentsTraining
from dmd2.errors import UserError
from dmd2.teachers.fit_components import minimise, refused, seeded

KEY = "teacher.training.components.text_encoder"
TOKENIZER_FOLDER, FOLDER = "tokenizer", "text_encoder"
BEGIN_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"
END = "</w>"
"""Suffix of a word's last token."""

Targets = Mapping[str, Sequence[int]]
"""Caption -> class numbers, as many for each caption."""


def fit_text_encoder(
    targets: Targets,
    training: ComponentsTraining,
    folder: Path,
    *,
    unseen: Targets | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Trains a tokenizer and a text encoder; writes `folder`/tokenizer and `folder`/text_encoder.

    The tokenizer has a token for each word of the captions. The encoder minimises
    the cross-entropy of one linear layer per target on the hidden state at the end of the text. `unseen` captions are
    only measured. Everything is a function of captions, targets and `training`. Facts: `accuracy` and
    `unseen_accuracy` (all targets of a caption right), `num_tokens`, `length`, and those of `minimise`.
    Raises UserError for unsuitable captions or configuration, before training.
    """
    if not targets or len({len(wanted) for wanted in targets.values()}) != 1:
        raise UserError("a text encoder is trained on captions with as many targets each; check the captions")
    tokenizer = build_tokenizer(list(targets))
    encoder = build_text_encoder(training, tokenizer).to(device)
    wanted = torch.tensor(np.asarray(list(targets.values()), np.int64))
    heads = seeded(lambda: _heads(encoder.config.hidden_size, wanted), training.seed + 1).to(device)
    ids, wanted = _ids(tokenizer, list(targets)).to(device), wanted.to(device)

    def loss(rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(ids), (training.text_batch_size,), generator=rng).to(device)
        logits = _logits(encoder, heads, ids[chosen])
        return torch.stack([F.cross_entropy(part, wanted[chosen, i]) for i, part in enumerate(logits)]).mean()

    facts = minimise(
        nn.ModuleDict({"encoder": encoder, "heads": heads}),
        loss,
        iterations=training.text_iterations,
        learning_rate=training.text_learning_rate,
        seed=training.seed,
        title="text_encoder",
    )
    measured: dict[str, Any] = {"num_tokens": len(tokenizer), "length": tokenizer.model_max_length}
    for name, captions in (("accuracy", targets), ("unseen_accuracy", unseen)):
        if captions:
            measured[name] = _accuracy(encoder, heads, _ids(tokenizer, list(captions)).to(device), captions)
    tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
    encoder.to("cpu").save_pretrained(folder / FOLDER, safe_serialization=True)
    return {**measured, **facts}


def build_tokenizer(captions: Sequence[str]) -> Any:
    """A CLIP tokenizer with one token per word of the captions, as long as the longest of them.

    Byte pairs are merged, the most frequent first and equal ones in alphabetical order (Sennrich et al. 2016,
    algorithm 1), until no word has more than one token; other words are spelt. The trainer of `tokenizers` is not
    used: the numbers that it gives to tokens change from call to call. The vocabulary is laid out as CLIP's own.
    """
    empty = CLIPTokenizer().backend_tokenizer
    pieces = {
        piece
        for caption in captions
        for piece, _ in empty.pre_tokenizer.pre_tokenize_str(empty.normalizer.normalize_str(caption))
    }
    words = [[*piece[:-1], piece[-1] + END] for piece in sorted(pieces)]
    merges: list[Any] = []  # pairs of tokens
    while any(len(word) > 1 for word in words):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = [_merged(word, merges[-1]) for word in words]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + END for letter in alphabet), *map("".join, merges), BEGIN_TEXT, END_TEXT]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.model_max_length = max(len(ids) for ids in tokenizer(list(captions)).input_ids)
    return tokenizer


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word with each occurrence of the pair joined, from the left."""
    joined: list[str] = []
    for token in word:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return joined


def build_text_encoder(training: ComponentsTraining, tokenizer: Any) -> Any:
    """The configured text encoder for a tokenizer, initialised from `training.seed`. Raises UserError."""
    given = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if set_twice := given.keys() & training.text_encoder.keys():
        raise UserError(f"{KEY}: {', '.join(sorted(set_twice))} are the tokenizer's; leave them out")
    known = vars(CLIPTextConfig()).keys()
    if unknown := training.text_encoder.keys() - known:
        raise UserError(f"{KEY}: CLIPTextModel has no {', '.join(sorted(unknown))}; correct the name")
    try:
        return seeded(lambda: CLIPTextModel(CLIPTextConfig(**training.text_encoder, **given)), training.seed)
    except (StrictDataclassError, TypeError, ValueError, RuntimeError) as error:
        raise refused(KEY, error) from None


def _heads(width: int, wanted: Tensor) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, int(column.max()) + 1) for column in wanted.T)


def _ids(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids (B, L), padded or cut to the tokenizer's length."""
    found = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return torch.tensor(found.input_ids)


def _logits(encoder: Any, heads: nn.ModuleList, ids: Tensor) -> list[Tensor]:
    pooled = encoder(ids).pooler_output  # (B, D), the last hidden state at the end of the text
    return [head(pooled) for head in heads]


@torch.no_grad()
def _accuracy(encoder: Any, heads: nn.ModuleList, ids: Tensor, targets: Targets) -> float:
    """The share of captions whose targets are all right."""
    guessed = torch.stack([part.argmax(1) for part in _logits(encoder, heads, ids)], dim=1).cpu()
    wanted = torch.tensor(np.asarray(list(targets.values()), np.int64))
    return (guessed == wanted).all(1).double().mean().item()
