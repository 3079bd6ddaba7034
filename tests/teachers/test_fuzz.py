"""Thousands of hostile and damaged weight files: none executes anything, each is read or refused in one line.

`pytest -m fuzz` runs it; hand-made files are read in every run of the tests (test_safe_pickle, test_torch_file). Every
file is read under an audit hook, with little memory, and in bounded time. The corpus is the same on every run.
"""

import io
import pickle
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from edm_pickles import edm_pickle
from hostile import (
    Call,
    bombs,
    fragments,
    injected,
    little_memory,
    mutated,
    old_torch_file,
    soon,
    soup,
    unframed,
    watching,
    with_pickle,
    with_storage,
)
from torch import Tensor, nn

from dmd2.errors import UserError
from dmd2.teachers.safe_pickle import read_edm_pickle
from dmd2.teachers.torch_file import read_torch_file

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol"),
]
SPARE, SECONDS = 2**30, 5.0
Reader = Callable[[Path], dict[str, Tensor]]
STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.tensor(3)}


def read_all(corpus: Iterable[bytes], read: Reader, path: Path, flag: Path) -> Counter[str]:
    """How many files of a corpus were read, refused, and blocked by the name of what they wanted; and of how many."""
    outcomes: Counter[str] = Counter()
    for content in corpus:
        path.write_bytes(content)
        with little_memory(SPARE), soon(SECONDS), watching() as events:
            try:
                state = read(path)
            except UserError as error:
                reported = str(error)
                outcomes["blocked" if "blocked global" in reported else "refused"] += 1
            else:
                reported = ""
                outcomes["read"] += 1
                assert all(isinstance(value, Tensor) for value in state.values())
                assert sum(float(value.double().nan_to_num().sum()) for value in state.values()) is not None
        assert "\n" not in reported
        assert len(reported) < 600 + len(str(path))
        assert [event for event in events if str(path) not in event and not harmless(event)] == [], content[:2000]
        assert not flag.exists(), content[:2000]
        outcomes["files"] += 1
    return outcomes


def harmless(event: str) -> bool:
    """Imports that the reader's own code makes on the way to an error."""
    return event.startswith(("import 'torch", "import 'encodings"))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A file to read and one that must not appear; what torch imports at its first call is imported."""
    path = tmp_path / "weights"
    b"a".decode("cp437")  # which zipfile's names are in
    path.write_bytes(edm_pickle(nn.Linear(1, 1)))
    read_edm_pickle(path)
    for zipped in (True, False):
        torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
        read_torch_file(path)
    path.write_bytes(b"\x80")
    with pytest.raises(UserError):
        read_torch_file(path)
    return path, tmp_path / "flag"


class Shared(nn.Module):
    """A module with views, an integer buffer and a submodule."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.arange(6.0)
        self.register_buffer("turned", values.view(2, 3).t())
        self.register_buffer("part", values[2:5])
        self.register_buffer("count", torch.tensor(7))
        self.inner = nn.ModuleDict({"8x8_conv": nn.Conv2d(1, 1, 1)})


def edm_files() -> list[bytes]:
    return [
        edm_pickle(module, "import os", protocol) for module in (nn.Linear(2, 2), Shared()) for protocol in (2, 3, 4, 5)
    ]


def edm_mutations(flag: Path) -> Iterator[bytes]:
    rng, files = random.Random(1), edm_files()
    for _ in range(900):
        yield mutated(rng.choice(files), rng)
    for _ in range(200):
        content = rng.choice(files)
        yield content[: rng.randrange(len(content))]


def edm_injections(flag: Path) -> Iterator[bytes]:
    rng, files, hostile = random.Random(2), [unframed(content) for content in edm_files()], fragments(flag)
    for fragment in hostile:
        for _ in range(2):
            yield injected(rng.choice(files), fragment, rng)
        yield b"\x80\x04" + fragment + b"."


def edm_soups(flag: Path) -> Iterator[bytes]:
    rng = random.Random(3)
    for _ in range(400):
        yield soup(rng, flag)


def edm_storages(flag: Path) -> Iterator[bytes]:
    rng, values = random.Random(4), io.BytesIO()
    torch.save(torch.ones(1).storage(), values, _use_new_zipfile_serialization=False)
    hostile = [fragment for fragment in fragments(flag) if len(fragment) < 2000]
    for _ in range(250):
        yield with_storage(mutated(values.getvalue(), rng))
    for _ in range(250):
        content = b"\x80\x02" + rng.choice(hostile) + b"."
        yield with_storage(old_torch_file(content, at=rng.randrange(5)))


EDM = {
    "mutations": edm_mutations,
    "injections": edm_injections,
    "soups": edm_soups,
    "storages": edm_storages,
}


@pytest.mark.parametrize("corpus", list(EDM))
def test_hostile_edm_pickles_execute_nothing_and_are_read_or_refused(corpus: str, places: tuple[Path, Path]):
    path, flag = places
    outcomes = read_all(EDM[corpus](flag), read_edm_pickle, path, flag)
    assert outcomes["refused"] > 50, outcomes
    assert outcomes["blocked"] > (-1 if corpus == "soups" else 50), outcomes
    assert outcomes["read"] > (5 if corpus in ("mutations", "injections") else -1), outcomes


def test_corpus_is_large_and_differs(tmp_path: Path):
    files = {content for corpus in EDM.values() for content in corpus(tmp_path / "flag")}
    assert len(files) > 2500


def saved(*, zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(STATE, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def rezipped(pickled: bytes) -> bytes:
    """torch's archive of `STATE` with another pickle in it."""
    return with_pickle(saved(zipped=True), pickled)


def state_pickle() -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved(zipped=True))) as archive:
        return archive.read("archive/data.pkl")


def torch_mutations(flag: Path) -> Iterator[bytes]:
    rng = random.Random(5)
    new, old = saved(zipped=True), saved(zipped=False)
    for content in (new, old):
        for _ in range(300):
            yield mutated(content, rng)
        for _ in range(80):
            yield content[: rng.randrange(len(content))]
    for _ in range(300):
        yield rezipped(mutated(state_pickle(), rng))


def torch_injections(flag: Path) -> Iterator[bytes]:
    rng, pickled = random.Random(6), state_pickle()
    for fragment in fragments(flag):
        if len(fragment) > 2000:  # torch's loader recurses as deep as a file says
            continue
        yield rezipped(injected(pickled, fragment, rng))
        content = b"\x80\x02" + fragment + b"."
        yield rezipped(content) if rng.random() < 0.5 else old_torch_file(content, at=rng.randrange(5))


@pytest.mark.parametrize("corpus", [torch_mutations, torch_injections])
def test_hostile_torch_files_execute_nothing_and_are_read_or_refused(
    corpus: Callable[[Path], Iterator[bytes]], places: tuple[Path, Path]
):
    path, flag = places
    outcomes = read_all(corpus(flag), read_torch_file, path, flag)
    assert outcomes["files"] > 700
    assert outcomes["refused"] > 50, outcomes
    assert outcomes["blocked"] > 20, outcomes
    assert outcomes["read"] > (5 if corpus is torch_mutations else -1), outcomes


def test_fragments_would_act_under_a_plain_loader(tmp_path: Path):
    """The corpus is not harmless by mistake: unpickled plainly, several of its parts do what they say."""
    flag, acted = tmp_path / "flag", 0
    for name in ("os.system", "posix.system", "os.popen", "builtins.eval", "builtins.exec"):
        for fragment in fragments(flag):
            if name.encode().replace(b".", b"\n") in fragment and len(fragment) < 300:
                try:
                    pickle.loads(b"\x80\x04" + fragment + b".")
                except Exception:
                    continue
                acted += flag.exists()
                flag.unlink(missing_ok=True)
    assert acted > 10
    assert len(bombs()) > 30
    assert Call(print, 1).__reduce__()[0] is print
