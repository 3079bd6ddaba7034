"""What the catalogue says, and that a file is used only when it is the one that it describes."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from server import Server

from dmd2.config.reading import read_yaml
from dmd2.downloads.catalogue import (
    FOLDER,
    Download,
    load_catalogue,
    needed_downloads,
    provide,
    record_of,
    requirement,
    state,
)
from dmd2.errors import UserError
from dmd2.lineage.plan import Plan
from dmd2.stages.download import download, fetch, listing

WORKFLOW = Path(__file__).parents[2] / "workflow"
CATALOGUE = load_catalogue(WORKFLOW / "downloads.yaml")
CONTENT = b"the weights"
SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


def entry(**keys: Any) -> Download:
    return Download(what="weights", page="https://example.org/page", licence="none", **keys)


def runs_of(plan: Plan) -> list[Any]:
    return [plan.run(path.stem) for path in (WORKFLOW / "runs").glob("*.yaml")]


def test_every_listed_file_can_be_fetched_or_says_how_to_get_it() -> None:
    assert len(CATALOGUE) >= 11
    for name, item in CATALOGUE.items():
        assert (item.url is None and item.hub is None) == (item.how is not None), name
        assert all(url.startswith("https://") for url in [item.page, *item.urls(name)])


@pytest.mark.parametrize("preset", sorted(path.stem for path in (WORKFLOW / "presets").glob("*.yaml")))
def test_what_a_preset_names_is_listed_and_its_checksum_is_the_lists(preset: str) -> None:
    plan = Plan(WORKFLOW, preset)
    for path, keys in needed_downloads(plan.preset, runs_of(plan)).items():
        assert Path(path).parent == FOLDER, keys
        assert Path(path).name in CATALOGUE, keys
    texts = [read_yaml(WORKFLOW / "presets" / f"{preset}.yaml"), *map(read_yaml, (WORKFLOW / "runs").glob("*.yaml"))]
    for path, sha256 in re.findall(r'"path": "([^"]+)", "sha256": "([0-9a-f]{64})"', json.dumps(texts)):
        assert CATALOGUE[Path(path).name].sha256 == sha256


def test_needed_names_every_file_with_the_keys_that_ask_for_it() -> None:
    plan = Plan(WORKFLOW, "imagenet64")
    found = needed_downloads(plan.preset, [plan.run("dmd"), plan.run("dmd2")])
    assert found == {
        "data/downloads/ILSVRC2012_img_train.tar": ["data.path"],
        "data/downloads/edm-imagenet-64x64-cond-adm.pkl": ["teacher.weights"],
        "data/downloads/inception-2015-12-05.pt": ["features.weights"],
        "data/downloads/imagenet-64x64.npz": ["features.reference"],
        "data/downloads/vgg16-397923af.pth": ["run dmd: train.vgg_weights"],
    }
    assert needed_downloads(Plan(WORKFLOW, "digits").preset) == {}


def test_a_listed_path_waits_for_its_record_and_one_that_is_there_for_nothing(tmp_path: Path) -> None:
    assert requirement(None, "data.path", CATALOGUE) is None
    for name in CATALOGUE:
        assert requirement(f"data/downloads/{name}", "key", CATALOGUE) == Path(f"data/downloads/{name}.json")
    assert requirement(str(tmp_path), "data.path", CATALOGUE) is None
    assert requirement(f"{tmp_path}/train-{{000..999}}.tar", "data.path", CATALOGUE) is None
    with pytest.raises(UserError, match=r"^teacher.weights: gone/teacher.pkl does not exist; put it there or correct"):
        requirement("gone/teacher.pkl", "teacher.weights", CATALOGUE)
    with pytest.raises(
        UserError, match=r"data/downloads/misspelt.pkl does not exist.*NAME one of ILSVRC2012_img_train"
    ):
        requirement("data/downloads/misspelt.pkl", "teacher.weights", CATALOGUE)


def test_a_missing_file_is_reported_unless_nobody_needs_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = FOLDER / "imagenet-64x64.npz"
    path.parent.mkdir(parents=True)
    record_of(path.name).write_text("{}")
    with pytest.raises(
        UserError, match=r"^key: data/downloads/imagenet-64x64.npz is gone; put it back, or delete data/"
    ):
        requirement(str(path), "key", CATALOGUE)
    assert requirement(str(path), "key", CATALOGUE, done=True) == record_of(path.name)
    assert requirement("gone/teacher.pkl", "key", CATALOGUE, done=True) is None
    path.write_bytes(b"")
    assert requirement(str(path), "key", CATALOGUE) == record_of(path.name)


PINS = [{"sha256": SHA256}, {"md5": MD5}, {"sha256": SHA256, "md5": MD5, "bytes": len(CONTENT)}, {}]


@pytest.mark.parametrize("pin", PINS)
def test_a_file_that_is_there_is_checked_and_recorded_without_a_connection(
    pin: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "w.pkl").write_bytes(CONTENT)
    with caplog.at_level(logging.INFO):
        provide("w.pkl", entry(url="http://127.0.0.1:9/w.pkl", **pin), folder=tmp_path)
    record = json.loads((tmp_path / "w.pkl.json").read_text())
    assert record == {"file": "w.pkl", "bytes": 11, "sha256": SHA256, "compared": bool(pin), "url": None}
    assert (f"SHA-256 {SHA256}, compared with nothing" in caplog.text) == (not pin)


WRONG = [
    ({"sha256": "0" * 64}, f"its SHA256 is {SHA256}, the published file's {'0' * 64}"),
    ({"md5": "0" * 32}, f"its MD5 is {MD5}, the published file's {'0' * 32}"),
    ({"sha256": SHA256, "md5": "0" * 32}, "its MD5 is"),
    ({"bytes": 12, "sha256": SHA256}, "it has 11 bytes, the published file 12"),
]


@pytest.mark.parametrize(("pin", "complaint"), WRONG)
def test_another_file_in_its_place_is_refused_and_kept(pin: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(CONTENT)
    with pytest.raises(UserError, match=rf"w.pkl: {complaint}.*; replace it, or delete it to have it fetched"):
        provide("w.pkl", entry(url="http://127.0.0.1:9/w.pkl", **pin), folder=tmp_path)
    assert (tmp_path / "w.pkl").read_bytes() == CONTENT
    assert not (tmp_path / "w.pkl.json").exists()


@pytest.mark.parametrize("pin", PINS)
def test_a_file_that_is_not_there_is_fetched_checked_and_recorded(
    pin: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    server.files = {"w.pkl": CONTENT}
    provide("w.pkl", entry(url=f"{server.url}/w.pkl", **pin), folder=tmp_path / "new")
    assert (tmp_path / "new" / "w.pkl").read_bytes() == CONTENT
    record = json.loads((tmp_path / "new" / "w.pkl.json").read_text())
    assert record["sha256"] == SHA256
    assert record["url"] == f"{server.url}/w.pkl"


def test_the_mirror_is_tried_first_then_the_address_then_the_entrys_mirrors(server: Server, tmp_path: Path) -> None:
    server.files = {"third": CONTENT}
    item = entry(url=f"{server.url}/second", mirrors=(f"{server.url}/third",), sha256=SHA256)
    provide("w.pkl", item, mirror=f"{server.url}/mirror/", folder=tmp_path)
    assert [requested["path"] for requested in server.requests] == ["/mirror/w.pkl", "/second", "/third"]


def test_a_mirror_serves_what_has_no_public_address(server: Server, tmp_path: Path) -> None:
    server.files = {"w.tar": CONTENT}
    provide("w.tar", entry(how="ask for an account", md5=MD5), mirror=server.url, folder=tmp_path)
    assert (tmp_path / "w.tar").read_bytes() == CONTENT


def test_what_cannot_be_fetched_says_what_to_put_where(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"/gone: 404 .*; fetch http.*/gone elsewhere; put it at data/downloads/w.pkl \(SHA"
    ):
        provide("w.pkl", entry(url=f"{server.url}/gone", sha256=SHA256), folder=tmp_path)
    with pytest.raises(
        UserError, match=r"ILSVRC2012_img_train.tar is missing and cannot be fetched by a program: needs an"
    ) as e:
        provide("ILSVRC2012_img_train.tar", CATALOGUE["ILSVRC2012_img_train.tar"], folder=tmp_path)
    reported = str(e.value)
    assert "put it at data/downloads/ILSVRC2012_img_train.tar (MD5 1d675b47d978889d74fa0da5fadfb00e)" in reported
    assert "image-net.org" in reported
    assert "\n" not in reported
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_from_the_only_address_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.files = {"w.pkl": b"something else"}
    with pytest.raises(UserError, match=rf"/w.pkl: its SHA256 is [0-9a-f]{{64}}, the published file's {SHA256}; fetch"):
        provide("w.pkl", entry(url=f"{server.url}/w.pkl", sha256=SHA256), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_stage_writes_the_file_beside_its_record(server: Server, tmp_path: Path) -> None:
    server.files = {"w.pkl": CONTENT}
    text = entry(sha256=SHA256, url=f"{server.url}/w.pkl").model_dump_json(exclude_none=True)
    download("w.pkl", text, tmp_path / "w.pkl.json", None)
    assert (tmp_path / "w.pkl").read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"other.json is not the record of w.pkl; it must be called w.pkl.json"):
        download("w.pkl", text, tmp_path / "other.json", None)
    with pytest.raises(UserError, match=r"--entry w.pkl: unknown key `sha265`; did you mean 'sha256'"):
        download("w.pkl", text.replace("sha256", "sha265"), tmp_path / "w.pkl.json", None)


def test_states_tell_what_is_there_what_comes_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    FOLDER.mkdir(parents=True)
    pickle, tar = (str(FOLDER / name) for name in ("edm-imagenet-64x64-cond-adm.pkl", "ILSVRC2012_img_train.tar"))
    assert state(pickle, CATALOGUE) == "is fetched when needed"
    assert state(tar, CATALOGUE) == "to be supplied"
    assert state("elsewhere.pkl", CATALOGUE) == "missing"
    Path(tar).write_bytes(b"")
    assert state(tar, CATALOGUE) == "there, not checked yet"
    record_of(Path(tar).name).write_text("{}")
    assert state(tar, CATALOGUE) == "there"
    Path("elsewhere.pkl").write_bytes(b"")
    assert state("elsewhere.pkl", CATALOGUE) == "there"


def test_the_list_of_a_preset_says_what_is_needed_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = listing(WORKFLOW, "imagenet64").splitlines()
    assert re.fullmatch(r"to be supplied +data/downloads/ILSVRC2012_img_train.tar +data.path", lines[0])
    assert re.fullmatch(r"is fetched when needed +data/downloads/imagenet-64x64.npz +features.reference", lines[3])
    assert "run released_dmd2: weights" in "".join(lines)  # a row of this preset's table
    assert lines[-1].startswith("data/downloads/ILSVRC2012_img_train.tar: needs an account at image-net.org")
    assert listing(WORKFLOW, "digits") == "preset digits needs nothing from outside"  # nor do its tables' runs
    assert "released" not in listing(WORKFLOW, "cifar10")
    assert len(listing(WORKFLOW, None).splitlines()) >= len(CATALOGUE)


def test_all_a_preset_needs_can_be_fetched_at_once_and_what_cannot_be_had_is_reported(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {item: name.encode() for name in CATALOGUE for item in (f"mirror/{name}", f"own/{name}")}
    unpinned = {name: entry(url=f"{server.url}/own/{name}") for name in CATALOGUE}
    monkeypatch.setattr("dmd2.stages.download.load_catalogue", lambda path: unpinned)
    absent = [f"{folder}/vgg16-397923af.pth" for folder in ("mirror", "own")]
    server.files = {path: content for path, content in files.items() if path not in absent}
    with pytest.raises(UserError, match=r"^http.*/mirror/vgg16-397923af.pth: 404 .*; put it at .*$") as reported:
        fetch(WORKFLOW, "cifar10", f"{server.url}/mirror")
    assert "\n" not in str(reported.value)
    there = {path.name for path in FOLDER.iterdir() if path.suffix != ".json"}
    wanted = {"cifar-10-binary.tar.gz", "edm-cifar10-32x32-cond-vp.pkl", "inception-2015-12-05.pt", "cifar10-32x32.npz"}
    assert there == wanted
    assert {json.loads(record_of(name).read_text())["url"] for name in wanted} == {
        f"{server.url}/mirror/{name}" for name in wanted
    }
