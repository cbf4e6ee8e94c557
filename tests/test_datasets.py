"""Images in folders and in CSV files, and the random split."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flora.core.errors import UserError
from flora.core.registry import OptionError, components, kind_of
from flora.core.rng import Rng
from flora.data.datasets.base import ImageArrays, ImageData, ImageFiles, Split, stratified_split, with_jpeg_side
from flora.data.datasets.folders import CsvFile, ImageFolder
from flora.data.datasets.glyphs import Glyphs

MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "LA")


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (5, 4)) -> Path:
    """Write a small image whose format follows from the name, and its folders; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


def make_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 5) -> Path:
    """Class folders with `count` images of different sizes each; return `root`."""
    for name in classes:
        for i in range(count):
            save(root / name / f"{i}.png", size=(3 + i, 4))
    return root


def make_csv(folder: Path, text: str, images: tuple[str, ...] = ("a.png", "b.png", "c.png", "d.png")) -> Path:
    """A CSV file and the images that it may list; return the file's path."""
    folder.mkdir(exist_ok=True)
    for name in images:
        save(folder / name)
    path = folder / "x.csv"
    path.write_text(text, encoding="utf-8")
    return path


def listing(data: ImageData, root: Path) -> list[list[tuple[str, str, str | None]]]:
    """Path, class name and client of all examples of both splits."""
    return [
        [
            (
                Path(split.name(i)).relative_to(root).as_posix(),
                data.class_names[split.labels[i]],
                None if split.groups is None else str(split.groups[i]),
            )
            for i in range(len(split))
        ]
        for split in (data.train, data.test)
    ]


def failure(dataset: ImageFolder | CsvFile) -> str:
    """The message of the `UserError` that loading raises, which is one line."""
    with pytest.raises(UserError) as caught:
        dataset.load(Rng(0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_image_files_open_in_their_own_mode_and_size(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode in ("CMYK", "I;16") else "png"
    image = ImageFiles([save(tmp_path / f"x.{suffix}", mode, (6, 3))]).open(0)
    assert (image.mode, image.size) == (mode, (6, 3))
    assert image.convert("RGB").getpixel((5, 2)) is not None


@pytest.mark.parametrize("suffix", ["png", "ppm", "jpg", "gif", "bmp"])
def test_a_damaged_image_file_raises_oserror_whatever_the_decoder_raises(tmp_path: Path, suffix: str) -> None:
    whole = save(tmp_path / f"x.{suffix}", size=(40, 40)).read_bytes()
    damaged = tmp_path / f"damaged.{suffix}"
    for length in (0, 4, 10, 20, len(whole) // 2):
        damaged.write_bytes(whole[:length])
        with pytest.raises(OSError):
            ImageFiles([damaged]).open(0)


def test_image_arrays_open_grey_and_colour() -> None:
    grey = ImageArrays(np.full((2, 3, 4), 7, dtype=np.uint8), "digits")
    colour = ImageArrays(np.zeros((2, 3, 3, 4), dtype=np.uint8).transpose(0, 2, 3, 1), "photos")
    assert (grey.open(1).mode, grey.open(1).size, grey.open(1).getpixel((0, 0))) == ("L", (4, 3), 7)
    assert (colour.open(0).mode, colour.open(0).size) == ("RGB", (4, 3))
    assert (grey.name(1), len(grey)) == ("digits[1]", 2)


def test_subset_keeps_images_labels_and_groups_together() -> None:
    source = ImageArrays(np.arange(4, dtype=np.uint8)[:, None, None], "x")
    split = Split(source, np.array([3, 1, 0, 2]), np.array([30, 10, 0, 20]), np.array(["d", "b", "a", "c"]))
    part = split.subset(np.array([0, 3])).subset(np.array([False, True]))
    assert (len(part), part.name(0), part.labels[0], part.open(0).getpixel((0, 0))) == (1, "x[2]", 20, 2)
    assert part.groups is not None and part.groups.tolist() == ["c"]


# --- the random split -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_stratified_split_is_disjoint_complete_and_proportional(labels: list[int], fraction: float, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    train, test = stratified_split(array, fraction, Rng(seed))
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    for label in set(labels):
        total, num_test = labels.count(label), int((array[test] == label).sum())
        if total > 1:
            assert num_test == min(max(round(total * fraction), 1), total - 1)
        else:
            assert num_test == round(fraction)
    again = stratified_split(array, fraction, Rng(seed))
    assert np.array_equal(again[0], train) and np.array_equal(again[1], test)


def test_stratified_split_depends_on_the_seed_and_each_class_on_its_own_examples() -> None:
    labels = np.repeat([0, 1], 20)
    splits = [stratified_split(labels, 0.5, Rng(seed))[1] for seed in (0, 1)]
    assert not np.array_equal(*splits)
    longer = stratified_split(np.concatenate([labels, np.full(20, 2)]), 0.5, Rng(0))[1]
    assert np.array_equal(longer[longer < 40], splits[0])


# --- image_folder ---------------------------------------------------------------------------------------------------


def test_the_data_sets_are_registered_under_their_names() -> None:
    known = components(kind_of(ImageFolder))
    assert known["image_folder"] is ImageFolder and known["csv"] is CsvFile


def test_folder_is_split_at_random_by_class_and_the_seed_decides(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ("wild cat", "Dog", "ant_hill"), count=10)
    data = ImageFolder(str(root), test_fraction=0.3).load(Rng(0))
    assert data.class_names == ("Dog", "ant_hill", "wild cat")
    assert data.train.labels.dtype == np.int64 and data.train.groups is None
    assert np.bincount(data.train.labels).tolist() == [7, 7, 7] and np.bincount(data.test.labels).tolist() == [3, 3, 3]
    train, test = listing(data, root)
    assert len({*train, *test}) == 30 and all(path.startswith(name + "/") for path, name, _ in train + test)
    assert data.test.open(0).size[1] == 4
    assert listing(ImageFolder(str(root), test_fraction=0.3).load(Rng(0)), root) == [train, test]
    assert listing(ImageFolder(str(root), test_fraction=0.3).load(Rng(1)), root) != [train, test]


def test_folder_finds_nested_images_of_all_types_and_ignores_the_rest(tmp_path: Path) -> None:
    wanted = ["a/0.JPG", "a/1.jpeg", "a/deep/er/2.Png", "a/3.bmp", "a/4.gif", "b/5.webp", "b/6.tif", "b/7.TIFF"]
    for name in wanted:
        save(tmp_path / name)
    for name in ("b/8.ppm", "b/9.pgm"):
        wanted.append(name)
        save(tmp_path / name, "L" if name.endswith("pgm") else "RGB")
    for name in ("a/.hidden.png", "a/.thumbs/x.png", ".git/x.png", "stray.png"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = ImageFolder(str(tmp_path)).load(Rng(0))
    train, test = listing(data, tmp_path)
    assert sorted(path for path, _, _ in train + test) == sorted(wanted)
    assert data.class_names == ("a", "b")
    assert all(split.open(i).size == (5, 4) for split in (data.train, data.test) for i in range(len(split)))


@pytest.mark.parametrize("name", ["test", "val", "valid"])
def test_folder_with_train_and_another_folder_takes_them_as_splits(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path / "train", count=3)
    make_folder(tmp_path / name, ("dog",), count=2)
    if name == "test":
        make_folder(tmp_path / "val", ("bird",))  # not read beside a test folder
    train, test = listing(ImageFolder(str(tmp_path)).load(Rng(0)), tmp_path)
    assert train == [(f"train/{label}/{i}.png", label, None) for label in ("cat", "dog") for i in range(3)]
    assert test == [(f"{name}/dog/{i}.png", "dog", None) for i in range(2)]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert ImageFolder(str(make_folder(tmp_path, ("bus", "train")))).load(Rng(0)).class_names == ("bus", "train")


def test_folder_level_names_the_client(tmp_path: Path) -> None:
    make_folder(tmp_path / "zurich", ("cat",), count=4)
    make_folder(tmp_path / "Bern", ("cat", "dog"), count=4)
    data = ImageFolder(str(tmp_path), groups="folder").load(Rng(0))
    assert data.class_names == ("cat", "dog")
    train, test = listing(data, tmp_path)
    assert len(train + test) == 12
    assert all(path.startswith(f"{client}/{label}/") for path, label, client in train + test)


def test_folder_level_names_the_client_below_train_and_test(tmp_path: Path) -> None:
    make_folder(tmp_path / "train" / "c1", ("cat",), count=1)
    make_folder(tmp_path / "train" / "c0", ("dog",), count=1)
    make_folder(tmp_path / "test" / "c9", ("dog",), count=1)
    train, test = listing(ImageFolder(str(tmp_path), groups="folder").load(Rng(0)), tmp_path)
    assert train == [("train/c0/dog/0.png", "dog", "c0"), ("train/c1/cat/0.png", "cat", "c1")]
    assert test == [("test/c9/dog/0.png", "dog", "c9")]


def test_folder_errors_name_the_option_and_the_place(tmp_path: Path) -> None:
    missing = failure(ImageFolder(str(tmp_path / "no")))
    assert missing.startswith(f"data.root: {tmp_path}/no: no such folder; expected {tmp_path}/no/CLASS/image")
    assert "CLIENT/CLASS/image" in failure(ImageFolder(str(tmp_path / "no"), groups="folder"))
    assert failure(ImageFolder(str(tmp_path))).startswith(f"data.root: {tmp_path}: no class folders")
    assert failure(ImageFolder(str(tmp_path), groups="folder")).startswith(f"data.root: {tmp_path}: no client folders")
    make_folder(tmp_path / "train")
    assert "there is a folder train, but none called test" in failure(ImageFolder(str(tmp_path)))
    make_folder(tmp_path / "test", ("bird",))
    assert f"{tmp_path}/test: class 'bird' is not in {tmp_path}/train" in failure(ImageFolder(str(tmp_path)))
    assert f"{tmp_path}/train/cat: no class folders" in failure(ImageFolder(str(tmp_path), groups="folder"))


def test_folder_errors_name_an_empty_class_and_an_empty_client(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    (tmp_path / "a" / "fish").mkdir()
    (tmp_path / "a" / "fish" / "x.svg").write_text("")
    assert f"data.root: {tmp_path}/a: class 'fish' has no images (looked for .bmp" in failure(
        ImageFolder(str(tmp_path / "a"))
    )
    make_folder(tmp_path / "b" / "c0", ("cat", "dog"))
    make_folder(tmp_path / "b" / "c1", ("cat",))
    (tmp_path / "b" / "c1" / "dog").mkdir()  # c0 has dogs: no fault
    assert ImageFolder(str(tmp_path / "b"), groups="folder").load(Rng(0)).class_names == ("cat", "dog")
    (tmp_path / "b" / "c2" / "cat").mkdir(parents=True)
    assert "client 'c2' has no images" in failure(ImageFolder(str(tmp_path / "b"), groups="folder"))
    assert "data.test_fraction: 0.2 of 1 images leaves the test split empty" in failure(
        ImageFolder(str(make_folder(tmp_path / "c", ("cat",), count=1)))
    )


def test_options_out_of_bounds_are_refused() -> None:
    with pytest.raises(OptionError, match="test_fraction: expected a number above 0 and below 1"):
        ImageFolder("x", test_fraction=1.0)
    with pytest.raises(OptionError, match="groups: expected one of none, folder"):
        ImageFolder("x", groups="client")


def test_no_folder_is_read_twice_whatever_links_lead_to_it(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "root", count=4)
    elsewhere = make_folder(tmp_path / "elsewhere", ("more", "others"), count=2)
    (root / "cat" / "loop").symlink_to(root)  # to all classes
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "cat" / "friends").symlink_to(root / "dog")
    (root / "dog" / "enemies").symlink_to(root / "cat")  # a cycle with the one before
    (root / "dog" / "up").symlink_to(tmp_path)
    (root / "dog" / "more").symlink_to(elsewhere / "more")
    (root / "dog" / "again").symlink_to(elsewhere)
    (elsewhere / "others" / "back").symlink_to(root / "cat")
    (root / "cat" / "broken").symlink_to(root / "cat" / "broken")
    data = ImageFolder(str(root)).load(Rng(0))
    found = sorted(path for part in listing(data, root) for path, _, _ in part)
    own = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)]
    assert found == sorted([*own, *(f"dog/again/{name}/{i}.png" for name in ("more", "others") for i in range(2))])
    (remark,) = data.remarks
    assert f"left out: 7 links to folders that are read elsewhere (the first is {root}/cat/friends)" in remark


def test_a_link_may_be_a_class_but_not_another_ones(tmp_path: Path) -> None:
    make_folder(tmp_path / "pool", ("cat", "dog"))
    root = make_folder(tmp_path / "root", ("ant",))
    (root / "cat").symlink_to(tmp_path / "pool" / "cat")
    assert ImageFolder(str(root)).load(Rng(0)).class_names == ("ant", "cat")
    (root / "aunt").symlink_to(root / "ant")
    assert f"class 'aunt' has no images ({root}/aunt is a link to a folder that is read elsewhere)" in failure(
        ImageFolder(str(root))
    )


def test_training_images_are_not_tested_on_through_a_link(tmp_path: Path) -> None:
    make_folder(tmp_path / "train")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    assert f"{tmp_path}/test: class 'cat' has no images ({tmp_path}/test/cat is a link to" in failure(
        ImageFolder(str(tmp_path))
    )


def test_what_is_no_regular_file_is_left_out_and_never_opened(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "root")
    os.mkfifo(root / "cat" / "x.jpg")
    (root / "dog" / "y.jpg").symlink_to(root / "cat" / "x.jpg")
    data = ImageFolder(str(root)).load(Rng(0))
    assert len(data.train) + len(data.test) == 10
    assert f"left out: 2 pipes or devices (the first is {root}/cat/x.jpg)" in data.remarks[0]
    with pytest.raises(OSError, match="not a regular file"):
        ImageFiles([root / "cat" / "x.jpg"]).open(0)
    assert "not a regular file" in failure(CsvFile(str(root / "cat" / "x.jpg")))


def test_what_systems_put_beside_data_is_no_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for name in ("__MACOSX/cat/._0.png", "@eaDir/0.png", "cat/@eaDir/0.png", ".ipynb_checkpoints/0.png", "cat/._1.png"):
        save(root / name)
    (root / "cat" / "Thumbs.db").write_text("")
    data = ImageFolder(str(root)).load(Rng(0))
    assert data.class_names == ("cat", "dog") and len(data.train) + len(data.test) == 10 and not data.remarks


def test_images_of_types_that_are_not_read_are_said_to_be(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for name in ("cat/a.HEIC", "cat/b.heic", "dog/c.avif", "dog/d.txt"):
        (root / name).write_text("")
    (remark,) = ImageFolder(str(root)).load(Rng(0)).remarks
    assert remark == (
        "data.root: left out: images of types that are not read: 1 .avif, 2 .heic; convert them to JPEG or PNG"
    )


def test_clients_that_are_taken_for_classes_are_doubted(tmp_path: Path) -> None:
    for client in ("photo", "sketch"):
        make_folder(tmp_path / "pacs" / client)
    (remark,) = ImageFolder(str(tmp_path / "pacs")).load(Rng(0)).remarks
    assert "the class folders (photo, sketch ...) hold no images themselves, but folders (cat, dog ...)" in remark
    assert "set data.groups=folder" in remark
    assert not ImageFolder(str(tmp_path / "pacs"), groups="folder").load(Rng(0)).remarks
    for label in ("cat", "dog"):  # as Tiny-ImageNet has them
        make_folder(tmp_path / "nested" / label, ("images",))
    assert not ImageFolder(str(tmp_path / "nested")).load(Rng(0)).remarks


# --- csv ------------------------------------------------------------------------------------------------------------


def test_csv_with_all_columns_in_any_order(tmp_path: Path) -> None:
    text = (
        "\ufeffsplit, note ,client,label,path\r\n"
        'test,,k2,dog,d.png\r\n\r\ntrain,"x, y",k1, cat ,b.png\r\ntrain,,k2,dog,./a.png\r\n'
    )
    train, test = listing(CsvFile(str(make_csv(tmp_path, text))).load(Rng(0)), tmp_path)
    assert train == [("a.png", "dog", "k2"), ("b.png", "cat", "k1")]
    assert test == [("d.png", "dog", "k2")]


def test_csv_doesnt_depend_on_the_order_of_its_rows(tmp_path: Path) -> None:
    names = tuple(f"{i:02d}.png" for i in range(20))
    rows = [f"{name},{'ab'[i % 2]},client{i % 3}" for i, name in enumerate(names)]
    path = make_csv(tmp_path, "\n".join(["path,label,client", *rows]), names)
    first = CsvFile(str(path)).load(Rng(0))
    assert (len(first.train), len(first.test)) == (16, 4) and first.class_names == ("a", "b")
    random.Random(0).shuffle(rows)
    path.write_text("\n".join(["path,label,client", *rows]))
    assert listing(CsvFile(str(path)).load(Rng(0)), tmp_path) == listing(first, tmp_path)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [(("train", "val", "test", "train"), ["c.png"]), (("train", "val", "valid", "train"), ["b.png", "c.png"])],
)
def test_csv_validation_rows_are_the_test_split_only_without_one(
    tmp_path: Path, marks: tuple[str, ...], expected: list[str]
) -> None:
    rows = [f"{name}.png,x,{mark}" for name, mark in zip("abcd", marks, strict=True)]
    data = CsvFile(str(make_csv(tmp_path, "\n".join(["path,label,split", *rows])))).load(Rng(0))
    train, test = ([path for path, _, _ in part] for part in listing(data, tmp_path))
    assert (train, test) == (["a.png", "d.png"], expected)


def test_csv_paths_start_from_root_or_are_absolute(tmp_path: Path) -> None:
    images = tmp_path / "images"
    path = make_csv(tmp_path / "lists", f"path,label\nsub/a.png,1\n{images}/b.png,01\nc.png,1\nd.png,01\n", ())
    for name in ("sub/a.png", "b.png", "c.png", "d.png"):
        save(images / name)
    data = CsvFile(str(path), root=str(images), test_fraction=0.5).load(Rng(0))
    assert data.class_names == ("01", "1")
    assert sorted(name for part in listing(data, images) for name, _, _ in part) == [
        *("b.png", "c.png", "d.png", "sub/a.png")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.csv: the file is empty"),
        ("path,label\n", "x.csv: no rows below the header"),
        ("path,class\na.png,x\n", "x.csv line 1: no column 'label'; found path, class"),
        ("path:label\na.png:x\n", "x.csv line 1: no column 'path'; found path:label"),
        ("Path,LABEL,path\na.png,x,y\n", "x.csv line 1: the column 'path' is there twice; found Path, LABEL, path"),
        (
            "path,label\nno.png,x\na.png,x\nnone.png,y\n",
            "x.csv: 2 image files are not there: 'ROOT/no.png' (line 2), 'ROOT/none.png' (line 4); or set",
        ),
        ("path,label,label\na.png,x,y\n", "x.csv line 1: the column 'label' is there twice"),
        ("path,label\na.png,x\n\nb.png,\n", "x.csv line 4: nothing in the column 'label'"),
        ("path,label\n ,x\n", "x.csv line 2: nothing in the column 'path'"),
        ("path,label,client\na.png,x,k\nb.png,x\n", "x.csv line 3: nothing in the column 'client'"),
        ("path,label,split\na.png,x,\n", "x.csv line 2: nothing in the column 'split'"),
        ("path,label\na.png,x,y\n", "x.csv line 2: 3 cells, but the header has 2 columns"),
        ("path,label,split\na.png,x,tets\n", "x.csv line 2: unknown split 'tets'; did you mean 'test'?"),
        ("path,label\na.png,x\nb.png,y\n./a.png,y\n", "a.png' is listed in line 2 already"),
        ("path,label\na.png,x\nnone.png,y\n", "x.csv line 3: no such image file: "),
        ("path,label,split\na.png,x,train\n", "x.csv: no row is marked test, val or valid in the column 'split'"),
        ("path,label,split\na.png,x,val\n", "x.csv: no row is marked train in the column 'split'"),
        (
            "path,label,split\na.png,x,train\nd.png,y,test\nc.png,z,test\n",
            "x.csv line 3: label 'y' is not in the train split",
        ),
        ('path,label\na.png,"x\nb.png,y\n', "x.csv line 3: unexpected end of data"),
        ("path,label\na.png,x\nb.png,y\n", "data.test_fraction: 0.2 of 2 images leaves the test split empty"),
    ],
)
def test_csv_errors_name_the_file_and_the_line(tmp_path: Path, text: str, message: str) -> None:
    found = failure(CsvFile(str(make_csv(tmp_path, text))))
    assert message.replace("ROOT", str(tmp_path)) in found and found.startswith("data.")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_is_read_as_its_header_is_written(tmp_path: Path, separator: str, encoding: str) -> None:
    rows = [("Label", " PATH", "Split", "note"), ("a,b;c|d", "a.png", "train", ""), ("é", "b.png", "train", "x")]
    rows += [("é", "c.png", "test", ""), ("a,b;c|d", "d.png", "test", "")]
    path = make_csv(tmp_path, "")
    quoted = [[f'"{cell}"' if separator in cell else cell for cell in row] for row in rows]
    path.write_bytes("\n".join(separator.join(row) for row in quoted).encode(encoding))
    data = CsvFile(str(path)).load(Rng(0))
    assert listing(data, tmp_path) == [
        [("a.png", "a,b;c|d", None), ("b.png", "é", None)], [("c.png", "é", None), ("d.png", "a,b;c|d", None)]
    ]  # fmt: skip


def test_csv_test_rows_need_no_client(tmp_path: Path) -> None:
    text = "path,label,client,split\na.png,x,k,train\nb.png,y,m,train\nc.png,x,,test\nd.png,y,,val\n"
    train, test = listing(CsvFile(str(make_csv(tmp_path, text))).load(Rng(0)), tmp_path)
    assert train == [("a.png", "x", "k"), ("b.png", "y", "m")] and test == [("c.png", "x", None)]


def test_csv_files_that_are_missing_may_be_left_out_as_unreadable_ones(tmp_path: Path) -> None:
    path = make_csv(tmp_path, "path,label\na.png,x\nnone.png,x\nb.png,y\nc.png,y\n")
    data = CsvFile(str(path), unreadable="skip").load(Rng(0))
    assert len(data.train) + len(data.test) == 4
    place = next(i for split in (data.train, data.test) for i in range(len(split)) if "none" in split.name(i))
    with pytest.raises(OSError, match="No such file"):
        (data.train if "none" in data.train.name(place) else data.test).open(place)


def test_csv_errors_without_a_readable_file(tmp_path: Path) -> None:
    assert failure(CsvFile(str(tmp_path / "no.csv"))) == f"data.path: {tmp_path}/no.csv: No such file or directory"
    assert "Is a directory" in failure(CsvFile(str(tmp_path)))
    path = make_csv(tmp_path, "path,label\na.png,x\n")
    assert failure(CsvFile(str(path), root=str(tmp_path / "no"))).startswith(
        f"data.root: {tmp_path}/no: no such folder"
    )
    path.write_bytes("path,label\na.png,é\n".encode("latin-1"))
    assert "expected text in UTF-8" in failure(CsvFile(str(path)))


# --- glyphs ---------------------------------------------------------------------------------------------------------


def test_glyphs_show_how_many_are_drawn() -> None:
    bars: dict[tuple[str, int], list[int]] = {}
    glyphs = Glyphs(num_train=5, num_test=3, characters="abc")
    data = glyphs.load_with_progress(Rng(0), lambda title, total: bars.setdefault((title, total), []).append)
    assert {key: sum(steps) for key, steps in bars.items()} == {("drawing glyphs", 8): 8}
    again = glyphs.load(Rng(0))
    for split, other in ((data.train, again.train), (data.test, again.test)):
        assert np.array_equal(np.asarray(split.open(2)), np.asarray(other.open(2)))


@pytest.mark.parametrize(
    ("side", "expected"), [(None, (512, 304)), (305, (512, 304)), (100, (256, 152)), (9, (64, 38))]
)
def test_large_jpegs_are_decoded_at_a_part_of_their_size(
    tmp_path: Path, side: int | None, expected: tuple[int, int]
) -> None:
    paths = [save(tmp_path / name, size=(512, 304)) for name in ("x.jpg", "x.png")]
    split = Split(ImageFiles(paths), np.arange(2), np.arange(2))
    data = with_jpeg_side(ImageData(split, split.subset(np.arange(1)), ("a", "b")), side)
    assert data.train.source is data.test.source
    assert [data.train.open(i).size for i in range(2)] == [expected, (512, 304)]
    is_same = data.train.source.fingerprint(np.arange(2)) == split.source.fingerprint(np.arange(2))
    assert is_same == (side is None)
