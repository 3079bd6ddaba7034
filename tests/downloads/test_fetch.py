"""A file over HTTP: whole or not there, whatever the line and the server do."""

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from server import Server

from dmd2.downloads import fetch
from dmd2.downloads.fetch import Fetch, Refused
from dmd2.errors import UserError

CONTENT = np.random.default_rng(0).bytes(48 * fetch.CHUNK + 1234)
OTHER = np.random.default_rng(1).bytes(len(CONTENT))


def is_content(path: Path) -> None:
    if path.read_bytes() != CONTENT:
        raise Refused("another content")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "downloads" / "file.bin"


def rests(server: Server) -> list[int]:
    """Where each request began."""
    return [int(requested.get("Range", "bytes=0-")[6:-1]) for requested in server.requests]


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("with_length", [False, True])
def test_a_file_arrives_whole_and_nothing_else_is_left(
    pinned: bool, with_length: bool, server: Server, target: Path
) -> None:
    server.files, server.with_length = {"a": CONTENT}, with_length
    seen: list[tuple[int, int | None]] = []
    job = Fetch(target, is_content, pinned=pinned, progress=lambda done, total: seen.append((done, total)))
    assert job.run([f"{server.url}/a"]) == f"{server.url}/a"
    assert target.read_bytes() == CONTENT
    assert left(target) == ["file.bin"]
    assert seen[-1] == (len(CONTENT), len(CONTENT) if with_length else None)
    assert server.requests[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("pinned", [False, True])
def test_a_broken_line_is_gone_on_with_where_it_broke(pinned: bool, server: Server, target: Path) -> None:
    server.files, server.break_after = {"a": CONTENT}, [2 * fetch.CHUNK, 1000, fetch.CHUNK + 500]
    Fetch(target, is_content, pinned=pinned).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT
    begins = rests(server)
    assert begins == [0, 2 * fetch.CHUNK, 2 * fetch.CHUNK, 3 * fetch.CHUNK]  # a piece cut short is requested again


def test_breaks_that_bring_something_are_never_too_many_and_those_that_bring_nothing_are(
    server: Server, target: Path
) -> None:
    server.files, server.break_after = {"a": CONTENT}, [fetch.CHUNK] * 48
    Fetch(target, is_content, retries=2).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 49
    server.break_after, server.requests = [0] * 10, []
    target.unlink()
    with pytest.raises(UserError, match=r"/a: no connection or broken off 3 times"):
        Fetch(target, is_content, retries=2).run([f"{server.url}/a"])
    assert len(server.requests) == 3
    assert not target.exists()


def interrupted(server: Server, target: Path, **options: object) -> int:
    """Stops a fetch in the middle, as Ctrl-C or a kill would; returns what has arrived."""

    def stop(done: int, total: int | None) -> None:
        if done >= 20 * fetch.CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Fetch(target, is_content, progress=stop, **options).run([f"{server.url}/a"])
    server.requests.clear()
    assert not target.exists()
    return target.with_name("file.bin.part").stat().st_size


def test_an_interrupted_fetch_goes_on_in_the_next_run(server: Server, target: Path) -> None:
    server.files = {"a": CONTENT}
    have = interrupted(server, target)
    assert have == 20 * fetch.CHUNK
    Fetch(target, is_content).run([f"{server.url}/a"])
    assert rests(server) == [have]
    assert server.requests[0]["If-Range"] == '"v1"'
    assert target.read_bytes() == CONTENT


def test_a_file_that_changed_on_the_server_is_fetched_anew(server: Server, target: Path) -> None:
    server.files = {"a": OTHER}
    interrupted(server, target)
    server.files, server.version = {"a": CONTENT}, '"v2"'
    Fetch(target, lambda part: None).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT


def test_without_a_version_and_a_checksum_parts_are_not_put_together(server: Server, target: Path) -> None:
    server.files, server.version = {"a": OTHER}, None
    interrupted(server, target)
    server.files = {"a": CONTENT}
    Fetch(target, lambda part: None).run([f"{server.url}/a"])
    assert rests(server) == [0]
    assert target.read_bytes() == CONTENT


def test_a_part_of_another_address_is_used_when_the_checksum_is_known(server: Server, target: Path) -> None:
    server.files = {"a": CONTENT, "b": CONTENT}
    have = interrupted(server, target, pinned=True)
    Fetch(target, is_content, pinned=True).run([f"{server.url}/b"])
    assert rests(server) == [have]
    assert target.read_bytes() == CONTENT


def test_a_damaged_part_is_fetched_once_more_from_the_start(server: Server, target: Path) -> None:
    server.files = {"a": CONTENT}
    interrupted(server, target, pinned=True)
    part = target.with_name("file.bin.part")
    part.write_bytes(b"x" + part.read_bytes()[1:])
    Fetch(target, is_content, pinned=True).run([f"{server.url}/a"])
    assert rests(server)[1:] == [0]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("have", [len(CONTENT), len(CONTENT) + 5])
def test_a_part_that_has_everything_or_too_much_ends_well(have: int, server: Server, target: Path) -> None:
    server.files = {"a": CONTENT}
    target.parent.mkdir()
    target.with_name("file.bin.part").write_bytes((CONTENT + b"extra")[:have])
    target.with_name("file.bin.part.json").write_text(json.dumps({"url": f"{server.url}/a", "version": '"v1"'}))
    Fetch(target, is_content).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT
    assert left(target) == ["file.bin"]


def test_a_server_without_ranges_sends_everything_again(server: Server, target: Path) -> None:
    server.files, server.ranges = {"a": CONTENT}, False
    server.break_after = [fetch.CHUNK]
    Fetch(target, is_content, pinned=True).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_status_that_may_pass_is_tried_again(status: int, server: Server, target: Path) -> None:
    server.files, server.statuses = {"a": CONTENT}, [status, status]
    Fetch(target, is_content).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT


def wrong_page(server: Server) -> None:
    server.kind = "text/html; charset=utf-8"


def wrong_content(server: Server) -> None:
    server.files["a"] = OTHER


def wrong_size(server: Server) -> None:
    server.files["a"] = CONTENT[:-1]


def forbidden(server: Server) -> None:
    server.statuses = [403]


def missing(server: Server) -> None:
    del server.files["a"]


WRONG = [
    (wrong_page, "web page"),
    (wrong_content, "another content"),
    (wrong_size, f"has {len(CONTENT) - 1} bytes instead of {len(CONTENT)}"),
    (forbidden, "403"),
    (missing, "404"),
]


@pytest.mark.parametrize(("spoil", "complaint"), WRONG)
def test_a_wrong_answer_is_reported_once_and_leaves_no_file(
    spoil: Callable[[Server], None], complaint: str, server: Server, target: Path
) -> None:
    server.files = {"a": CONTENT}
    spoil(server)
    with pytest.raises(UserError, match=f"/a: .*{complaint}"):
        Fetch(target, is_content, size=len(CONTENT), pinned=True).run([f"{server.url}/a"])
    assert len(server.requests) == 1
    assert left(target) == []


@pytest.mark.parametrize(("spoil", "complaint"), [w for w in WRONG if w[0] is not wrong_page])
def test_the_next_address_is_tried_when_one_has_not_the_file(
    spoil: Callable[[Server], None], complaint: str, server: Server, target: Path
) -> None:
    server.files = {"a": CONTENT, "b": CONTENT}
    spoil(server)
    found = Fetch(target, is_content, size=len(CONTENT)).run([f"{server.url}/a", f"{server.url}/b"])
    assert found == f"{server.url}/b"
    assert target.read_bytes() == CONTENT


def test_an_address_where_nobody_answers_is_given_up(server: Server, target: Path) -> None:
    server.files = {"b": CONTENT}
    urls = ["http://127.0.0.1:9/a", f"{server.url}/b"]
    assert Fetch(target, is_content, retries=1).run(urls) == urls[1]
    with pytest.raises(UserError, match=r"^http://127.0.0.1:9/a: no connection .*refused"):
        Fetch(target.with_name("other"), is_content, retries=1).run(urls[:1])


def test_two_processes_do_not_fetch_the_same_file_at_once(server: Server, target: Path) -> None:
    server.files = {"a": CONTENT}
    target.parent.mkdir()
    with FileLock(target.with_name(".file.bin.lock")):
        with pytest.raises(UserError, match=r"file.bin is being fetched by another process; wait for it and run again"):
            Fetch(target, is_content).run([f"{server.url}/a"])
        assert server.requests == []
    Fetch(target, is_content).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT


def test_an_empty_file_is_a_file(server: Server, target: Path) -> None:
    server.files = {"a": b""}
    Fetch(target, lambda part: None).run([f"{server.url}/a"])
    assert target.read_bytes() == b""


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_is_reported_before_anything_is_written(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {"a": CONTENT}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, len(CONTENT) - 1))
    with pytest.raises(UserError, match=r"file.bin: 0.0 GB are still to come, 0.0 GB are free; make room, or make"):
        Fetch(target, is_content).run([f"{server.url}/a", f"{server.url}/a"])
    assert len(server.requests) == 1
    assert left(target) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, len(CONTENT)))
    have = interrupted(server, target)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, len(CONTENT) - have))
    Fetch(target, is_content).run([f"{server.url}/a"])
    assert target.read_bytes() == CONTENT


def test_a_disk_that_fills_up_keeps_what_has_arrived(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {"a": CONTENT}

    def full(done: int, total: int | None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        Fetch(target, is_content, progress=full).run([f"{server.url}/a"])
    assert target.with_name("file.bin.part").stat().st_size == fetch.CHUNK
