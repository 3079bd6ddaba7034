"""Lists of prompts from files, and the stream that a generator is trained on."""

import json
import logging
from pathlib import Path

import pytest
import torch

from dmd2.config import Prompts
from dmd2.config.digit_pairs import prompts as digit_pairs
from dmd2.datasets.prompts import PromptStream, load_prompts
from dmd2.errors import UserError
from dmd2.files import sha256

TEXTS = ["a red fox", "two ships, one of them “old”", "naïve\u2028café", "one\rline"]
TIDY = ("a red fox", "two ships, one of them “old”", "naïve café", "one line")


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"prompts{suffix}"
    if suffix == ".txt":
        path.write_bytes(("\r\n".join(TEXTS) + "\n").encode())
    elif suffix == ".jsonl":
        path.write_text(
            "\n".join(json.dumps({"caption": text}, ensure_ascii=False) for text in TEXTS), encoding="utf-8"
        )
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"caption": TEXTS, "url": [""] * 4}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_files_give_their_prompts_in_order(suffix: str, tmp_path: Path):
    path = write(tmp_path, suffix)
    assert load_prompts(Prompts(path=str(path), sha256=sha256(path))) == TIDY


def test_empty_lines_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  \ntwo\n")
    with caplog.at_level(logging.WARNING):
        assert load_prompts(Prompts(path=str(path))) == ("one", "two")
    assert "2 of 4 are empty" in caplog.text


def test_null_captions_count_as_empty_and_numbers_are_refused(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"caption": "a"}\n{"caption": null}\n{"caption": "half a pair \\ud800"}\n')
    assert load_prompts(Prompts(path=str(path))) == ("a", "half a pair ?")
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"caption": "a"}\n{"caption": 3}\n')
    with pytest.raises(UserError, match="line 2 must be a JSON object with a text"):
        load_prompts(Prompts(path=str(path)))


def test_embedded_prompts_come_without_a_file():
    assert load_prompts(Prompts(source="digit_pairs", subset="training")) == tuple(digit_pairs("training"))


def test_bad_lists_say_what_to_change(tmp_path: Path):
    path = write(tmp_path, ".txt")
    with pytest.raises(UserError, match="SHA-256"):
        load_prompts(Prompts(path=str(path), sha256="0" * 64))
    with pytest.raises(UserError, match="does not exist; put it there"):
        load_prompts(Prompts(path=str(tmp_path / "gone.txt")))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="has no prompt"):
        load_prompts(Prompts(path=str(tmp_path / "empty.txt")))
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        load_prompts(Prompts(path=str(tmp_path / "latin.txt")))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match="line 1 must be a JSON object with a text under the key `caption`"):
        load_prompts(Prompts(path=str(tmp_path / "x.jsonl")))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a Parquet file"):
        load_prompts(Prompts(path=str(tmp_path / "x.parquet")))
    (tmp_path / "x.pkl").write_bytes(b"")
    with pytest.raises(UserError, match=r"unknown kind of file; use \.txt"):
        load_prompts(Prompts(path=str(tmp_path / "x.pkl")))


def stream(**keys: int) -> PromptStream:
    texts = [f"prompt {i}" for i in range(10)]
    lengths = lambda given: {"tokens": torch.tensor([int(text.split()[1]) for text in given])}  # noqa: E731
    return PromptStream(texts, lengths, **{"batch_size": 4, "seed": 0, **keys})


def test_every_epoch_has_every_prompt_once_and_tokens_belong_to_the_numbers():
    ids = torch.cat([stream()(step)[0] for step in range(5)])
    assert sorted(ids[:10].tolist()) == sorted(ids[10:].tolist()) == list(range(10))
    numbers, tokens = stream()(3)
    assert torch.equal(numbers, tokens["tokens"])
    assert not torch.equal(stream(seed=1)(0)[0], stream()(0)[0])


def test_ranks_share_a_global_batch():
    whole = stream()(2)[0]
    parts = [stream(batch_size=2, rank=rank, world=2)(2)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), whole)
