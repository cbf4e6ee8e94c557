"""Tiny-ImageNet in a small copy of its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from flora.data.tiny_imagenet import TinyImageNet
from flora.errors import UserError
from flora.rng import Rng


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
    assert f"Tiny-ImageNet: it is not there; expected {path}; unpack http" in str(caught.value)


@pytest.mark.parametrize("line", ["val_0.JPEG\tn09\n", "../../secret\tn01\n", "nonsense\n"])
def test_annotations_that_make_no_sense(root: Path, line: str) -> None:
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(UserError, match=r"val_annotations\.txt: expected an image and one of 2 classes, got"):
        TinyImageNet(root=str(root)).load(Rng(0))


def test_a_class_without_a_name(root: Path) -> None:
    (root / "tiny-imagenet-200" / "words.txt").write_text("n01\tgoldfish\n")
    with pytest.raises(UserError, match=r"words\.txt has no name for n02"):
        TinyImageNet(root=str(root)).load(Rng(0))
