"""Tiny-ImageNet in a small copy of its layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.error import URLError

import pytest
from PIL import Image
from torchvision.datasets import utils

from flora.core.errors import UserError
from flora.core.rng import Rng
from flora.data.datasets.class_names import TINY_IMAGENET
from flora.data.datasets.tiny_imagenet import MD5, SOURCE, TinyImageNet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-imagenet-200"
    for wnid in ("n02", "n01"):
        for number in range(2):
            path = folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64)).save(path)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for number, wnid in enumerate(("n01", "n02", "n01")):
        Image.new("L", (64, 64)).save(folder / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tEuropean fire salamander\nn03\tox\n")
    return tmp_path


def test_its_splits_and_names(root: Path) -> None:
    data = TinyImageNet(root=str(root)).load(Rng(0))
    assert data.class_names == ("European fire salamander", "goldfish")
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert [Path(data.train.name(i)).name for i in range(4)] == ["n02_0.JPEG", "n02_1.JPEG", "n01_0.JPEG", "n01_1.JPEG"]
    assert data.test.labels.tolist() == [1, 0, 1]
    assert Path(data.test.name(2)).name == "val_2.JPEG"
    assert data.test.open(0).size == (64, 64)


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", "val/val_annotations.txt", "train/n01"])
def test_what_is_missing_is_named(root: Path, name: str) -> None:
    path = root / "tiny-imagenet-200" / name
    path.rename(path.with_name("hidden"))
    with pytest.raises(UserError) as caught:
        TinyImageNet(root=str(root)).load(Rng(0))
    assert f"Tiny-ImageNet: it is not complete; expected {path}; unpack http" in str(caught.value)


@pytest.mark.parametrize("line", ["val_0.JPEG\tn09\n", "../../secret\tn01\n", "nonsense\n"])
def test_annotations_that_make_no_sense(root: Path, line: str) -> None:
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(UserError, match=r"val_annotations\.txt: expected an image and one of 2 classes, got"):
        TinyImageNet(root=str(root)).load(Rng(0))


def test_a_class_without_a_name(root: Path) -> None:
    (root / "tiny-imagenet-200" / "words.txt").write_text("n01\tgoldfish\n")
    with pytest.raises(UserError, match=r"words\.txt has no name for n02"):
        TinyImageNet(root=str(root)).load(Rng(0))


def test_a_name_that_means_something_else_is_replaced(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    (folder / "train" / "n02").rename(folder / "train" / "n02231487")
    (folder / "wnids.txt").write_text("n02231487\nn01\n")
    (folder / "words.txt").write_text("n01\tgoldfish\nn02231487\twalking stick, walkingstick, stick insect\n")
    annotations = folder / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("n02", "n02231487"))
    assert TinyImageNet(root=str(root)).load(Rng(0)).class_names == ("stick insect", "goldfish")


def test_the_replacing_names_are_distinct() -> None:
    assert len(set(TINY_IMAGENET.values())) == len(TINY_IMAGENET)


def failure(dataset: TinyImageNet) -> str:
    """The message of the `UserError` that loading raises, which is one line."""
    with pytest.raises(UserError) as caught:
        dataset.load(Rng(0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_says_how_to_get_it(tmp_path: Path) -> None:
    message = failure(TinyImageNet(root=str(tmp_path / "no")))
    assert message == (
        f"data.root: {tmp_path}/no: Tiny-ImageNet: it is not there; expected {tmp_path}/no/tiny-imagenet-200; "
        "set data.download=true to fetch it (or the right root)"
    )
    assert not (tmp_path / "no").exists()


def test_the_download_is_unpacked_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = shutil.make_archive(str(tmp_path / "made"), "zip", root, "tiny-imagenet-200")
    expected = TinyImageNet(root=str(root)).load(Rng(0))
    calls = []

    def download_url(url: str, folder: str, filename: str, md5: str) -> None:
        calls.append((url, md5))
        shutil.copy(archive, Path(folder) / filename)

    monkeypatch.setattr(utils, "download_url", download_url)
    dataset = TinyImageNet(root=str(tmp_path / "new" / "data"), download=True)
    for _ in range(2):
        data = dataset.load(Rng(0))
        assert data.class_names == expected.class_names
        assert data.train.labels.tolist() == expected.train.labels.tolist()
        assert data.test.open(0).size == (64, 64)
    assert calls == [(SOURCE, MD5)]
    found = {path.name for path in (tmp_path / "new" / "data").iterdir()}
    assert found == {"tiny-imagenet-200", "tiny-imagenet-200.zip"}


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found\nor corrupted."), EOFError()])
def test_a_failed_download_is_one_line(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_url(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(utils, "download_url", download_url)
    message = failure(TinyImageNet(root=str(tmp_path), download=True))
    reason = " ".join(str(error).split()) or "EOFError"
    expected = f"the download failed ({reason}); expected {tmp_path}/tiny-imagenet-200"
    assert message == f"data.root: {tmp_path}: Tiny-ImageNet: {expected}"
    assert not list(tmp_path.iterdir())


def test_a_broken_archive_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download_url(url: str, folder: str, filename: str, md5: str) -> None:
        (Path(folder) / filename).write_text("not a zip file")

    monkeypatch.setattr(utils, "download_url", download_url)
    assert "the download failed (File is not a zip file); expected" in failure(TinyImageNet(str(tmp_path), True))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]
