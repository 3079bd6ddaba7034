"""Files that are whole or not there, and records that tell a damaged or foreign artifact."""

import hashlib
import importlib.metadata
import os
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dmd2.config import Data
from dmd2.errors import UserError
from dmd2.files import atomic, read_json, sha256, write_json, write_text
from dmd2.lineage.records import expect_digest, provenance, read_record, record_path, write_record
from dmd2.lineage.spec import Spec

SPEC = Spec.of("shards", "shards", data=Data(source="digits", resolution=8, channels=1, num_classes=10))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A recorded artifact."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"some weights")
    write_record(path, SPEC, iterations=7)
    return path


def test_failed_write_leaves_the_file_before_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    write_text(path, "before")

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half of")
            assert path.read_text() == "before"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_file_is_replaced_and_not_written_over(tmp_path: Path):
    path, seen = tmp_path / "file", tmp_path / "as a reader has it open"
    write_text(path, "before")
    os.link(path, seen)
    write_text(path, "after")
    assert (seen.read_text(), path.read_text()) == ("before", "after")


def test_failure_to_reach_the_disk_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    write_text(path, "before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_has_the_usual_permissions_and_its_folders(tmp_path: Path):
    path = tmp_path / "a" / "b" / "file"
    write_text(path, "text")
    plain = tmp_path / "plain"
    plain.touch()
    assert path.read_text() == "text"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_json_comes_back_and_refuses_nan(tmp_path: Path):
    path = tmp_path / "x.json"
    value = {"a": [1, 2.5, None], "b": {"σ": "80"}}
    write_json(path, value)
    assert read_json(path) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', "damaged JSON"),
        (b"", "damaged JSON"),
        (b"\xff\xfe", "damaged JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (None, "no such file; run the rule that writes it"),
    ],
)
def test_unreadable_json_is_named_in_one_line(content: bytes | None, message: str, tmp_path: Path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}") as error:
        read_json(path)
    assert "\n" not in str(error.value)


def test_record_says_what_the_artifact_is_and_where_it_comes_from(artifact: Path):
    record = read_record(artifact)
    assert record["sha256"] == sha256(artifact) == hashlib.sha256(b"some weights").hexdigest()
    assert (record["artifact"], record["bytes"], record["iterations"]) == ("weights.safetensors", 12, 7)
    origin = record["provenance"]
    assert Spec.model_validate(origin["spec"]) == SPEC
    assert (origin["stage"], origin["digest"]) == ("shards", SPEC.digest)
    assert origin["versions"]["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", origin["commit"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"some weightz"), r"SHA-256 differs from the record's"),
        (lambda path: path.write_bytes(b"some"), r"SHA-256 differs"),
        (lambda path: path.unlink(), r"weights\.safetensors: no such file, although its record exists"),
        (lambda path: record_path(path).unlink(), r"weights\.json: no such file"),
        (lambda path: record_path(path).write_text("{}"), r"weights\.json: not a record"),
        (lambda path: record_path(path).write_text('{"sha'), r"weights\.json: damaged JSON"),
    ],
)
def test_damaged_truncated_or_missing_artifact_or_record_is_named(
    damage: Callable[[Path], Any], message: str, artifact: Path
):
    damage(artifact)
    with pytest.raises(UserError, match=message) as error:
        read_record(artifact)
    assert "\n" not in str(error.value)


def test_large_artifact_can_be_taken_on_trust(artifact: Path):
    artifact.write_bytes(b"other")
    assert read_record(artifact, verify=False)["iterations"] == 7


def test_artifact_of_another_configuration_is_refused(artifact: Path):
    record = read_record(artifact)
    expect_digest(artifact, record, SPEC.digest)
    with pytest.raises(UserError, match=f"made with configuration {SPEC.digest}, but this run expects {'0' * 16}"):
        expect_digest(artifact, record, "0" * 16)
    with pytest.raises(UserError, match="made with configuration None"):
        expect_digest(artifact, {}, SPEC.digest)


def test_provenance_outside_git_says_so(monkeypatch: pytest.MonkeyPatch):
    from dmd2.lineage import records

    records.commit.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert provenance(SPEC)["commit"] == "unknown"
    records.commit.cache_clear()


def test_the_commit_of_a_repository_that_the_code_was_unpacked_in_is_not_the_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from dmd2.lineage import records

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    code = tmp_path / "project" / "dmd2" / "lineage" / "records.py"
    write_text(code, "")
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of something else")
    monkeypatch.setattr(records, "__file__", str(code))
    records.commit.cache_clear()
    assert provenance(SPEC)["commit"] == "unknown"
    git("add", ".")
    git("commit", "-q", "-m", "the project as a part of another repository")
    records.commit.cache_clear()
    assert provenance(SPEC)["commit"] == "unknown"
    git("-C", str(code.parents[2]), "init", "-q")
    git("-C", str(code.parents[2]), "add", ".")
    git("-C", str(code.parents[2]), "commit", "-q", "-m", "of the project")
    records.commit.cache_clear()
    assert re.fullmatch(r"[0-9a-f]{12}", provenance(SPEC)["commit"])
    records.commit.cache_clear()


def test_the_commit_of_a_repository_whose_root_the_code_was_unpacked_in_is_not_the_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from dmd2.lineage import records

    code = tmp_path / "dmd2" / "lineage" / "records.py"
    write_text(code, "")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "of something else"], check=True)
    monkeypatch.setattr(records, "__file__", str(code))
    monkeypatch.setenv("GIT_DIR", str(Path(__file__).parents[2] / ".git"))  # a hook's
    records.commit.cache_clear()
    assert provenance(SPEC)["commit"] == "unknown"
    monkeypatch.delenv("GIT_DIR")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "of the project"], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    records.commit.cache_clear()
    assert re.fullmatch(r"[0-9a-f]{12}", provenance(SPEC)["commit"])
    records.commit.cache_clear()
