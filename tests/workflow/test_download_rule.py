"""Files from outside as jobs: fetched from a mirror, taken where they lie, refused when they are others."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkout import Checkout

DIRECT = {"NO_PROXY": "127.0.0.1"}
DOWNLOADS = "data/downloads"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a folder that is served, and the folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_comes_from_the_mirror_and_its_record_starts_nothing_again(
    fresh: Checkout, tmp_path: Path, mirror: tuple[str, Path]
) -> None:
    checkout, (url, folder) = fresh.copy(tmp_path / "dmd2"), mirror
    (folder / "cifar10-32x32.npz").write_bytes(b"statistics")
    target = f"{DOWNLOADS}/cifar10-32x32.npz.json"
    done = checkout.snakemake(target, "--cores", "1", overlay={"mirror": url}, env=DIRECT)
    assert done.returncode == 0, done.stdout
    assert (checkout / f"{DOWNLOADS}/cifar10-32x32.npz").read_bytes() == b"statistics"
    record = json.loads((checkout / target).read_text())
    assert record["url"] == f"{url}/cifar10-32x32.npz"
    assert record["compared"] is False
    assert (
        f"SHA-256 {record['sha256']}, compared with nothing"
        in (checkout / "logs/downloads/cifar10-32x32.npz.log").read_text()
    )
    assert checkout.planned(target) == set()


def test_a_users_file_outlives_every_run_and_another_file_is_refused_in_one_line(
    fresh: Checkout, tmp_path: Path
) -> None:
    checkout = fresh.copy(tmp_path / "dmd2")
    own, wrong = checkout / f"{DOWNLOADS}/imagenet-64x64.npz", checkout / f"{DOWNLOADS}/vgg16-397923af.pth"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_bytes(b"put there by hand")
    wrong.write_bytes(b"another file")
    targets = [f"{file.relative_to(checkout.folder)}.json" for file in (own, wrong)]
    for _ in range(2):  # the second run starts over what the first has made
        done = checkout.snakemake(*targets, f"{DOWNLOADS}/ILSVRC2012_img_train.tar.json", "--cores", "1", "--forceall")
        assert done.returncode == 1, done.stdout
        assert own.read_bytes() == b"put there by hand"
        assert wrong.read_bytes() == b"another file"
    assert json.loads((checkout / targets[0]).read_text())["url"] is None
    assert not (checkout / targets[1]).exists()
    errors = [line for line in done.stdout.splitlines() if "error: " in line]
    assert any(
        "vgg16-397923af.pth: its SHA256 is " in line and "delete it to have it fetched" in line for line in errors
    )
    assert any("put it at data/downloads/ILSVRC2012_img_train.tar (MD5 1d675b47" in line for line in errors)
    assert "Traceback" not in done.stdout


def test_a_path_where_nothing_lies_stops_the_planning(fresh: Checkout) -> None:
    overlay = {"data": {"source": "image_folder", "path": "no/such/folder", "channels": 3, "levels": 256}}
    stopped = fresh.snakemake("data/smoke/shards/manifest.json", "-n", overlay=overlay)
    assert stopped.returncode == 1
    assert "data.path: no/such/folder does not exist; put it there or correct the path" in stopped.stdout
