"""Images that a source names but has not, or has twice, are reported and not lost."""

import zipfile
from pathlib import Path

import pytest
from trees import class_zip, data_of, edm_zip, files_of, write_tree

from dmd2.datasets.sources import open_source
from dmd2.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    write_tree(tmp_path / "tree", ["n1/a.png", "n1/b.png", "n2/a.png"])
    return tmp_path / "tree"


@pytest.mark.parametrize("name", ["n3", "n1/part", "n1/deep/part"])
def test_a_link_to_a_folder_that_is_gone_is_refused(name: str, tree: Path) -> None:
    (tree / "n1" / "deep").mkdir()
    (tree / name).symlink_to(tree / "gone")
    with pytest.raises(UserError, match=rf"{name}: a link to .*, where nothing is"):
        open_source(data_of("image_folder", tree))


def test_other_links_that_lead_somewhere_are_no_error(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("no image")
    (tree / "n1" / "notes").symlink_to(tmp_path / "notes")
    (tree / "n1" / ".cache").symlink_to(tmp_path / "gone")
    assert len(open_source(data_of("image_folder", tree))) == 3


@pytest.mark.parametrize("name", ["n2/part", "n2/c.png"])
def test_a_symbolic_link_in_a_zip_is_refused(name: str, tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    class_zip(tree, path)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo(name)
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "../../elsewhere")
    with pytest.raises(UserError, match=rf"{name} is a symbolic link; pack the files themselves"):
        open_source(data_of("image_zip", path))


def test_a_name_that_a_zip_has_twice_is_told(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    class_zip(tree, path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("n1/a.png", files_of(tree)[0][1])
    source = open_source(data_of("image_zip", path))
    assert len(source) == 3
    assert "1 replaced by a later one of that name (first: n1/a.png)" in str(source.passed_over)


def test_images_that_edms_list_has_and_the_zip_has_not_are_refused(tree: Path, tmp_path: Path) -> None:
    images = [(content, label) for label, (_, content) in zip((0, 1, 1), files_of(tree), strict=True)]
    edm_zip(images, tmp_path / "whole.zip")
    with zipfile.ZipFile(tmp_path / "whole.zip") as whole, zipfile.ZipFile(tmp_path / "part.zip", "w") as part:
        for name in whole.namelist():
            if not name.endswith("2.png"):
                part.writestr(name, whole.read(name))
    assert len(open_source(data_of("image_zip", tmp_path / "whole.zip"))) == 3
    with pytest.raises(
        UserError, match=r"dataset.json lists 00000/img00000002.png and 0 more that are no images in it"
    ):
        open_source(data_of("image_zip", tmp_path / "part.zip"))
