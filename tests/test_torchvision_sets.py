"""torchvision's data sets: small copies of each layout, and the real ones where they are at hand."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets as tv

from flora.core.errors import UserError
from flora.core.registry import components, kind_of
from flora.core.rng import Rng
from flora.data.datasets import torchvision_sets as sets
from flora.data.datasets.class_names import COUNTRY211, EUROSAT
from flora.data.datasets.torchvision_base import TorchvisionSet, UnsplitFileSet

SHARED = Path(__file__).parents[2] / "shared" / "data"
Patch = pytest.MonkeyPatch
ALL = {name: known for name, known in components(kind_of(TorchvisionSet)).items() if issubclass(known, TorchvisionSet)}


def save(path: Path, size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def write(path: Path, text: str | bytes) -> str:
    """Write a file and its folders; return its MD5 sum."""
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.md5(data).hexdigest()


def make_class_folders(root: Path, names: tuple[str, ...], suffix: str = "jpg", count: int = 2) -> None:
    for name in names:
        for i in range(1, count + 1):
            save(root / name / f"image_{i:04d}.{suffix}")


def make_eurosat(root: Path, patch: Patch) -> None:
    make_class_folders(root / "eurosat/2750", tuple(EUROSAT))


def make_caltech101(root: Path, patch: Patch) -> None:
    folder = root / "caltech101/101_ObjectCategories"
    make_class_folders(folder, ("BACKGROUND_Google", "Faces", "Faces_easy", "cougar_body"))
    (folder / "Faces" / ".stray").write_text("")


def make_sun397(root: Path, patch: Patch) -> None:
    write(root / "SUN397/ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    for place in ("a/apartment_building/outdoor", "a/abbey"):
        for i in (2, 1):
            save(root / "SUN397" / place / f"sun_{i}.jpg")


def make_mnist(root: Path, patch: Patch, name: str = "MNIST") -> None:
    for part, labels in (("train", bytes([0, 9, 3])), ("t10k", bytes([9, 1]))):
        sizes = np.array([len(labels), 28, 28], dtype=">i4").tobytes()
        pixels = np.arange(len(labels), dtype=np.uint8).repeat(28 * 28).tobytes()
        write(root / name / "raw" / f"{part}-images-idx3-ubyte", bytes([0, 0, 8, 3]) + sizes + pixels)
        write(root / name / "raw" / f"{part}-labels-idx1-ubyte", bytes([0, 0, 8, 1]) + sizes[:4] + labels)


def make_fashion_mnist(root: Path, patch: Patch) -> None:
    make_mnist(root, patch, "FashionMNIST")


def make_cifar(root: Path, patch: Patch, reader: type[tv.CIFAR10], key: str, names: list[str]) -> None:
    def dump(file: str, content: object) -> str:
        return write(root / reader.base_folder / file, pickle.dumps(content))

    for attribute in ("train_list", "test_list"):
        files = [file for file, _ in getattr(reader, attribute)]
        content = {"data": np.tile(np.array([255, 0, 0], np.uint8).repeat(32 * 32), (2, 1)), key: [1, 0]}
        patch.setattr(reader, attribute, [[file, dump(file, content)] for file in files])
    meta = reader.meta
    patch.setattr(reader, "meta", {**meta, "md5": dump(meta["filename"], {meta["key"]: names})})


def make_cifar10(root: Path, patch: Patch) -> None:
    make_cifar(root, patch, tv.CIFAR10, "labels", ["airplane", "automobile"])


def make_cifar100(root: Path, patch: Patch) -> None:
    make_cifar(root, patch, tv.CIFAR100, "fine_labels", ["apple", "aquarium_fish"])


def make_svhn(root: Path, patch: Patch) -> None:
    from scipy.io import savemat

    split_list = {}
    for part in ("train", "test"):
        path = root / f"{part}_32x32.mat"
        savemat(path, {"X": np.zeros((32, 32, 3, 3), np.uint8), "y": np.array([[10], [1], [9]], np.uint8)})
        split_list[part] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    patch.setattr(tv.SVHN, "split_list", split_list)


def make_stl10(root: Path, patch: Patch) -> None:
    contents = {"X": bytes(2 * 3 * 96 * 96), "y": bytes([1, 10])}
    for attribute in ("train_list", "test_list"):
        files = [file for file, _ in getattr(tv.STL10, attribute)]
        sums = [[file, write(root / "stl10_binary" / file, contents[file[-5]])] for file in files]
        patch.setattr(tv.STL10, attribute, sums)


def make_fer2013(root: Path, patch: Patch) -> None:
    pixels = " ".join(["7"] * 48 * 48)
    rows = [[0, " ".join(pixels.split()), "Training"], [6, pixels, "PublicTest"], [3, pixels, "PrivateTest"]]
    path = root / "fer2013" / "fer2013.csv"
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["emotion", "pixels", "Usage"], *rows])
    sums = {**tv.FER2013._RESOURCES, "fer": (path.name, hashlib.md5(path.read_bytes()).hexdigest())}
    patch.setattr(tv.FER2013, "_RESOURCES", sums)


def make_oxford_pets(root: Path, patch: Patch) -> None:
    folder = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        ids = [f"Abyssinian_{part}", f"basset_hound_{part}"]
        rows = [f"{name} {label} {label} 1" for label, name in enumerate(ids, 1)]
        write(folder / "annotations" / f"{part}.txt", "\n".join(reversed(rows)) + "\n")
        for name in ids:
            save(folder / "images" / f"{name}.jpg")


def make_flowers102(root: Path, patch: Patch) -> None:
    from scipy.io import savemat

    folder = root / "flowers-102"
    make_class_folders(folder, ("jpg",))
    for i in range(1, 7):
        save(folder / "jpg" / f"image_{i:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([1, 102, 3, 4, 5, 60])})
    savemat(folder / "setid.mat", {"trnid": np.array([5, 2]), "valid": np.array([1, 4]), "tstid": np.array([6, 3])})
    files = {kind: (file, None) for kind, (file, _) in tv.Flowers102._file_dict.items()}
    patch.setattr(tv.Flowers102, "_file_dict", files)


def make_fgvc_aircraft(root: Path, patch: Patch) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    write(folder / "variants.txt", "707-320\nF-16A/B\n")
    for part in ("trainval", "test"):
        write(folder / f"images_variant_{part}.txt", f"{part}1 F-16A/B\n{part}0 707-320\n")
        for i in (0, 1):
            save(folder / "images" / f"{part}{i}.jpg")


def make_food101(root: Path, patch: Patch) -> None:
    for part in ("train", "test"):
        names = {name: [f"{name}/{part}"] for name in ("waffles", "apple_pie")}
        write(root / "food-101" / "meta" / f"{part}.json", json.dumps(names))
        for name in names:
            save(root / "food-101" / "images" / name / f"{part}.jpg")


def make_dtd(root: Path, patch: Patch) -> None:
    for part in ("train", "val", "test"):
        write(root / "dtd/dtd/labels" / f"{part}1.txt", f"polka-dotted/{part}.jpg\nbanded/{part}.jpg\n")
        for name in ("banded", "polka-dotted"):
            save(root / "dtd/dtd/images" / name / f"{part}.jpg")


def make_stanford_cars(root: Path, patch: Patch) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    record = [("fname", "O"), ("class", "O")]
    rows = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=record)
    for part, path in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        savemat(folder / path, {"annotations": rows})
        for name in ("00001.jpg", "00002.jpg"):
            save(folder / f"cars_{part}" / name)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


def make_country211(root: Path, patch: Patch) -> None:
    for part in ("train", "valid", "test"):
        make_class_folders(root / "country211" / part, ("AD", "XK"), count=1)


def make_rendered_sst2(root: Path, patch: Patch) -> None:
    for part in ("train", "valid", "test"):
        make_class_folders(root / "rendered-sst2" / part, ("negative", "positive"), "png", count=1)


# The class names (or some of them, by label) and the labels of both splits.
EXPECTED: dict[str, tuple[tuple[str, ...] | dict[int, str], list[int], list[int]]] = {
    "eurosat": ({0: "annual crop land", 9: "sea or lake"}, list(range(10)), list(range(10))),
    "caltech101": (("off-center face", "centered face", "cougar body"), [0, 1, 2], [0, 1, 2]),
    "sun397": (("abbey", "apartment building outdoor"), [0, 1], [0, 1]),
    "mnist": (tuple("0123456789"), [0, 9, 3], [9, 1]),
    "fashion_mnist": ({0: "t-shirt", 9: "ankle boot"}, [0, 9, 3], [9, 1]),
    "cifar10": (("airplane", "automobile"), [1, 0] * 5, [1, 0]),
    "cifar100": (("apple", "aquarium fish"), [1, 0], [1, 0]),
    "svhn": (tuple("0123456789"), [0, 1, 9], [0, 1, 9]),
    "stl10": ({0: "airplane", 9: "truck"}, [0, 9], [0, 9]),
    "fer2013": ({0: "angry", 3: "happy", 6: "neutral"}, [0], [6, 3]),
    "oxford_pets": (("Abyssinian", "Basset Hound"), [1, 0], [1, 0]),
    "flowers102": ({0: "pink primrose", 59: "pink-yellow dahlia", 101: "blackberry lily"}, [4, 101, 0, 3], [59, 2]),
    "fgvc_aircraft": (("707-320", "F-16A/B"), [1, 0], [1, 0]),
    "food101": (("apple pie", "waffles"), [1, 0], [1, 0]),
    "dtd": (("banded", "polka-dotted"), [1, 0, 1, 0], [1, 0]),
    "stanford_cars": (("AM General Hummer SUV 2000", "Acura RL Sedan 2012"), [1, 0], [1, 0]),
    "country211": (("Andorra", "Kosovo"), [0, 1, 0, 1], [0, 1]),
    "rendered_sst2": (("negative", "positive"), [0, 1, 0, 1], [0, 1]),
}


def make(name: str, root: Path, patch: Patch) -> TorchvisionSet:
    """A small copy of the data set's layout below `root`, and the component that reads it."""
    if ALL[name].needs_scipy and importlib.util.find_spec("scipy") is None:
        pytest.skip("scipy is not installed")
    builder: Callable[[Path, Patch], None] = globals()[f"make_{name}"]
    builder(root, patch)
    return ALL[name](root=str(root))


def failure(dataset: TorchvisionSet) -> str:
    """The message of the `UserError` that loading raises, which is one line."""
    with pytest.raises(UserError) as caught:
        dataset.load(Rng(0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_data_set_is_tested() -> None:
    assert set(ALL) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_names_labels_and_images(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    dataset = make(name, tmp_path, monkeypatch)
    names, train, test = EXPECTED[name]
    data = dataset.load(Rng(0))
    if isinstance(names, dict):
        assert {label: data.class_names[label] for label in names} == names
    else:
        assert data.class_names == names
    assert (data.train.labels.tolist(), data.test.labels.tolist()) == (train, test)
    assert len(set(data.class_names)) == len(data.class_names)
    for split in (data.train, data.test):
        assert split.labels.dtype == np.int64 and split.groups is None
        assert all(split.open(i).convert("RGB").size[0] >= 5 for i in range(len(split)))
    if isinstance(dataset, UnsplitFileSet):
        assert not {data.train.name(i) for i in range(len(train))} & {data.test.name(i) for i in range(len(test))}


def test_cifar_colours_are_in_order(tmp_path: Path, monkeypatch: Patch) -> None:
    assert make("cifar10", tmp_path, monkeypatch).load(Rng(0)).train.open(3).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("name", EXPECTED)
def test_missing_data_say_what_was_expected_and_how_to_get_it(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    message = failure(ALL[name](root=str(tmp_path / "no")))
    assert message.startswith(f"data.root: {tmp_path}/no: {ALL[name].title} is not there; expected {tmp_path}/no/")
    assert "data.download=true" in message or "http" in message
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("File not found\nor corrupted."), EOFError()])
def test_a_failed_download_is_one_line_with_the_reason(tmp_path: Path, monkeypatch: Patch, error: Exception) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("torchvision.datasets.eurosat.download_and_extract_archive", fail)
    message = failure(sets.EuroSat(root=str(tmp_path), download=True))
    assert message.startswith(f"data.root: {tmp_path}: EuroSAT: the download failed (")
    assert any(reason in message for reason in ("no network", "File not found or corrupted.", "EOFError"))


def test_download_is_not_asked_for_where_torchvision_has_none(tmp_path: Path, monkeypatch: Patch) -> None:
    assert "torchvision can't download it" in failure(sets.Fer2013(root=str(tmp_path), download=True))
    assert "its site is gone" in failure(sets.StanfordCars(root=str(tmp_path), download=True))
    make_fer2013(tmp_path, monkeypatch)
    assert len(sets.Fer2013(root=str(tmp_path), download=True).load(Rng(0)).test) == 2


def test_download_leaves_data_alone_that_are_there(tmp_path: Path, monkeypatch: Patch) -> None:
    make_dtd(tmp_path, monkeypatch)
    assert len(sets.Dtd(root=str(tmp_path), download=True).load(Rng(0)).train) == 4


def test_damaged_data_are_one_line(tmp_path: Path, monkeypatch: Patch) -> None:
    make_cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"not a pickle: torchvision checks the sum first")
    assert "CIFAR-10: it can't be read (Dataset not found or corrupted" in failure(sets.Cifar10(root=str(tmp_path)))
    make_dtd(tmp_path, monkeypatch)
    write(tmp_path / "dtd/dtd/labels/val1.txt", "banded/val.jpg\n")
    assert "DTD: its splits don't have the same classes" in failure(sets.Dtd(root=str(tmp_path)))


def test_scipy_is_asked_for_by_name(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install scipy" in failure(sets.Flowers102(root=str(tmp_path), download=True))


def test_country_names_are_distinct() -> None:
    assert len(set(COUNTRY211.values())) == len(COUNTRY211) >= 211
    assert all(len(code) == 2 and code.isupper() and name for code, name in COUNTRY211.items())


REAL = [("eurosat", 10, 21_600, 5_400), ("fashion_mnist", 10, 60_000, 10_000), ("caltech101", 101, 6_941, 1_736)]


@pytest.mark.parametrize(("name", "num_classes", "num_train", "num_test"), REAL)
def test_real_data(name: str, num_classes: int, num_train: int, num_test: int) -> None:
    if not (SHARED / ALL[name].layout[0]).exists():
        pytest.skip(f"the real {ALL[name].title} is not at {SHARED}")
    data = ALL[name](root=str(SHARED)).load(Rng(0))
    assert (len(data.class_names), len(data.train), len(data.test)) == (num_classes, num_train, num_test)
    for split in (data.train, data.test):
        assert np.unique(split.labels).tolist() == list(range(num_classes))
        assert all(min(split.open(i).size) >= 28 for i in range(0, len(split), 997))
