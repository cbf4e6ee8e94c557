"""Cached features are the computed ones, bit for bit; anything damaged or foreign is computed again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import adapt, write_model
from PIL import Image

from flora.clip.adapters.lora import Lora
from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.progress import Progress, Tell
from flora.data.datasets.base import ImageArrays, ImageFiles, Split
from flora.features import cache as cache_module
from flora.features.cache import CacheOptions, Entry, FeatureCache
from flora.features.features import Features
from flora.features.loading import load_features
from flora.features.unfinished import Part
from flora.simulate import simulate

PIXELS = np.random.default_rng(0).integers(0, 255, (23, 18, 18, 3), dtype=np.uint8)


def splits(pixels: np.ndarray = PIXELS, seed: int = 0) -> list[Split]:
    """Two splits of one source, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(pixels))
    source = ImageArrays(pixels, "noise")
    return [Split(source, part, np.zeros(len(part), dtype=np.int64)) for part in (order[:15], order[15:])]


def load(model: Any, options: CacheOptions, parts: list[Split] | None = None) -> tuple[list[Features], list[str]]:
    """The features, and what was logged."""
    lines: list[str] = []
    features, _ = load_features(
        parts or splits(),
        model,
        cache=options,
        skip_unreadable=False,
        tell=Tell(lambda title, total: lambda done: None, lines.append),
    )
    return features, lines


def numbers(features: list[Features]) -> list[torch.Tensor]:
    return [each.take(torch.arange(len(each)), torch.device("cpu")) for each in features]


def assert_equal(left: list[Features], right: list[Features]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(numbers(left), numbers(right), strict=True))


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "features").iterdir())


@pytest.mark.parametrize("memory_bytes", [None, 1], ids=["in memory", "memory-mapped"])
@pytest.mark.parametrize("towers", [("text",), ("vision",)], ids="-".join)
def test_a_second_run_reads_what_the_first_computed(tiny_model, tmp_path, towers, memory_bytes) -> None:  # type: ignore[no-untyped-def]
    options = CacheOptions(folder=str(tmp_path), memory_bytes=memory_bytes)
    lora = Lora(towers=towers, layers=(-1,))
    plain, _ = load(adapt(tiny_model, lora), CacheOptions(folder=None))
    first, said = load(adapt(tiny_model, lora), options)
    assert "to be computed once" in said[0]
    assert ("memory-mapped on disk" in said[0]) == (memory_bytes == 1)
    second, said = load(adapt(tiny_model, lora), options)
    assert said == [said[0]]
    assert "23 read from the cache" in said[0]
    assert_equal(plain, first)
    assert_equal(plain, second)
    assert len(entries(tmp_path)) == 1
    # Another split of the same images needs nothing new.
    other, said = load(adapt(tiny_model, lora), options, splits(seed=1))
    assert "read from the cache" in said[0]
    assert not torch.equal(numbers(other)[0], numbers(first)[0])


@pytest.mark.parametrize(("storage", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("memory_bytes", [None, 1], ids=["in memory", "memory-mapped"])
def test_features_of_16_bits_are_those_of_the_stem_rounded(
    tiny_model: str, tmp_path: Path, storage: str, dtype: torch.dtype, memory_bytes: int | None
) -> None:
    """They take half the room, an entry of their own, and come out in the type that the model computes in."""
    plain, _ = load(adapt(tiny_model, precision="fp32"), CacheOptions(folder=str(tmp_path)))
    options = CacheOptions(folder=str(tmp_path), storage=storage, memory_bytes=memory_bytes)
    for said_first in ("to be computed once", "read from the cache"):
        features, said = load(adapt(tiny_model, precision="fp32"), options)
        assert said_first in said[0]
        for one, other in zip(numbers(plain), numbers(features), strict=True):
            assert other.dtype == torch.float32
            assert torch.equal(one.to(dtype).float(), other)
        part = features[0].subset(np.array([3, 1]))
        assert torch.equal(part.take(torch.arange(2), torch.device("cpu")), numbers(features)[0][[3, 1]])
    sizes = sorted((entry / "stem.bin").stat().st_size for entry in entries(tmp_path))
    assert sizes[1] == 2 * sizes[0]


def test_the_key_holds_what_the_numbers_depend_on(tiny_model: str, tmp_path: Path) -> None:
    options = CacheOptions(folder=str(tmp_path))
    load(adapt(tiny_model), options)
    changed = PIXELS.copy()
    changed[3, 0, 0, 0] ^= 1
    model = adapt(tiny_model)
    with torch.no_grad():
        model.clip.visual.conv1.weight[0, 0, 0, 0] += 1
    for number, (other, parts) in enumerate(
        [
            (adapt(tiny_model), splits(changed)),
            (adapt(tiny_model, Lora(towers=("vision",))), splits()),
            (model, splits()),
        ]
    ):
        _, said = load(other, options, parts)
        assert "to be computed once" in said[0]
        assert len(entries(tmp_path)) == number + 2


def truncate(entry: Path) -> None:
    os.truncate(entry / "stem.bin", 100)


def flip(entry: Path) -> None:
    content = bytearray((entry / "stem.bin").read_bytes())
    content[17] ^= 4
    (entry / "stem.bin").write_bytes(content)


def replace(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(entry: Path) -> None:
        description = json.loads((entry / "entry.json").read_text())["entry"] | changes
        sha256 = cache_module._digest(description)
        (entry / "entry.json").write_text(json.dumps({"entry": description, "sha256": sha256}))

    return change


DAMAGES = {
    "truncated": truncate,
    "a bit flipped": flip,
    "numbers missing": lambda entry: (entry / "stem.bin").unlink(),
    "description missing": lambda entry: (entry / "entry.json").unlink(),
    "description cut": lambda entry: os.truncate(entry / "entry.json", 60),
    "description changed": lambda entry: replace(entry / "entry.json", '"float64"', '"int64"'),
    "digests missing": lambda entry: (entry / "images.bin").unlink(),
    "a pipe": lambda entry: ((entry / "entry.json").unlink(), os.mkfifo(entry / "entry.json")),
    "description is a list": lambda entry: (entry / "entry.json").write_text("[]"),
    "foreign": edit(key={"weights": "other"}),
    "another format": edit(format="flora-features-0"),
    "another shape": edit(shape=[23, 8]),
    "an unknown type": edit(dtype="float7"),
    "a type that is none": edit(dtype="nn"),
    "too few rows": edit(readable=[0, 1]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_computed_again(tiny_model: str, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    options = CacheOptions(folder=str(tmp_path))
    first, _ = load(adapt(tiny_model), options)
    damage(entries(tmp_path)[0])
    again, said = load(adapt(tiny_model), options)
    assert "damaged" in said[0]
    assert "to be computed once" in said[1]
    assert_equal(first, again)
    assert "read from the cache" in load(adapt(tiny_model), options)[1][0]


def test_without_room_the_features_stay_in_memory_or_the_run_ends(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    features, said = load(adapt(tiny_model), CacheOptions(folder=str(tmp_path)))
    assert "not used: No space left on device" in said[1]
    assert len(features) == 2
    with pytest.raises(UserError, match=r"cache.folder: .* don't fit into memory, and not here: No space left"):
        load(adapt(tiny_model), CacheOptions(folder=str(tmp_path), memory_bytes=1))
    assert entries(tmp_path) == []
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "not used" in load(adapt(tiny_model), CacheOptions(folder=str(blocked)))[1][1]


def test_features_that_fit_nowhere_are_an_error(tiny_model: str) -> None:
    with pytest.raises(UserError, match=r"cache.folder: features of \(23, 16\) are larger than cache.memory_bytes"):
        load(adapt(tiny_model), CacheOptions(folder=None, memory_bytes=1))


def test_an_interrupted_fill_leaves_nothing(tiny_model: str, tmp_path: Path) -> None:
    model = adapt(tiny_model)

    class Broken(ImageArrays):
        def open(self, index: int):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    parts = [Split(Broken(PIXELS, "noise"), np.arange(5), np.zeros(5, dtype=np.int64))]
    with pytest.raises(KeyboardInterrupt):
        load(model, CacheOptions(folder=str(tmp_path)), parts)
    assert entries(tmp_path) == []


def test_a_run_with_cached_features_is_the_same_run(raw_config: dict[str, Any], home: Path) -> None:
    results = [simulate(parse_config({**raw_config, "name": name})) for name in ("first", "second")]
    assert "read from the cache" in (results[1].directory / "log.txt").read_text()
    assert (home / ".cache/flora/features").is_dir()
    for name in results[0].adapter:
        assert torch.equal(results[0].adapter[name], results[1].adapter[name])


@pytest.mark.parametrize("towers", [("text",), ("vision",), ("text", "vision")], ids="-".join)
def test_the_frozen_stems_leave_memory(tiny_model: str, towers: tuple[str, ...]) -> None:
    model = adapt(tiny_model, Lora(towers=towers, layers=(-1,)))
    features, _ = load(model, CacheOptions(folder=None))
    stem = numbers(features)[0]
    with torch.no_grad():
        before = model.image_features(stem, 1), model.class_features(2)
        size = sum(parameter.numel() for parameter in model.clip.model.parameters())
        model.release_stems()
        assert sum(parameter.numel() for parameter in model.clip.model.parameters()) < size / 10
        assert torch.equal(model.image_features(stem, 1), before[0])
        assert torch.equal(model.class_features(2), before[1])


def test_the_key_holds_the_architecture(tmp_path: Path) -> None:
    """The same weights in another architecture: quick_gelu and the number of heads leave no trace in the weights."""
    keys = []
    variants = [{}, {"quick_gelu": True}, {"vision": {"head_width": 8}}, {"vision": {"pool_type": "avg"}}]
    for number, changes in enumerate(variants):
        path = write_model(tmp_path / f"{number}.json", **changes)  # type: ignore[arg-type]
        keys.append(json.dumps(adapt(path).vision.stem_key(), sort_keys=True))
    assert len(set(keys)) == 4


def test_a_changed_file_of_the_same_size_and_time_is_noticed(tiny_model: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.bmp" for index in range(3)]
    for index, path in enumerate(paths):
        Image.fromarray(PIXELS[index]).save(path)
    parts = [Split(ImageFiles(paths), np.arange(3), np.zeros(3, dtype=np.int64))]
    options = CacheOptions(folder=str(tmp_path / "cache"))
    load(adapt(tiny_model), options, parts)
    times = paths[1].stat()
    Image.fromarray(PIXELS[9]).save(paths[1])
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "to be computed once" in load(adapt(tiny_model), options, parts)[1][0]


def test_whatever_byte_of_an_entry_changes_no_result_does(tmp_path: Path) -> None:
    key = {"weights": "some"}
    said: list[str] = []
    store = FeatureCache(CacheOptions(folder=str(tmp_path)), said.append)
    stem, problems = torch.arange(6.0).view(3, 2), {1: "1.png: can't be read"}

    def write() -> Entry:
        with store.create(key, (4, 2), torch.float32, in_memory=True, trust=lambda images: True) as writer:
            writer.append(Part(4, [0, 2, 3], stem, [bytes([number] * 16) for number in range(3)], problems))
            return writer.finish()

    def assert_whole(entry: Entry) -> None:
        assert torch.equal(entry.stem, stem) and entry.readable.tolist() == [0, 2, 3] and entry.problems == problems
        assert np.array_equal(entry.digests, np.repeat(np.arange(3), 16).reshape(3, 16))

    assert_whole(write())
    (folder,) = entries(tmp_path)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(whole) == ["entry.json", "images.bin", "stem.bin"]
    silent = 0
    for name, content in whole.items():
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 1 << place % 8
            (folder / name).write_bytes(changed)
            said.clear()
            entry = store.read(key, in_memory=True)
            if entry is None:
                assert "damaged" in said[0] and str(folder) in said[0]
                folder.mkdir()
                for other, bytes_ in whole.items():
                    (folder / other).write_bytes(bytes_)
            else:
                assert_whole(entry)
                silent += 1
                (folder / name).write_bytes(content)
    assert silent < 20  # one kind of white space for another


class Counted(ImageArrays):
    """Images that remember which of them were opened; those in `broken` can't be."""

    opened: ClassVar[list[int]] = []
    broken: ClassVar[set[int]] = set()

    def open(self, index: int) -> Image.Image:
        self.opened.append(index)
        if index in self.broken:
            raise OSError("no")
        return super().open(index)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Split]:
    """All images in one split; four of them go through the stem at once."""
    monkeypatch.setattr("flora.features.reading.STEM_BATCH_SIZE", 4)
    monkeypatch.setattr(Counted, "opened", [])
    monkeypatch.setattr(Counted, "broken", set())
    return [Split(Counted(PIXELS, "noise"), np.arange(23), np.zeros(23, dtype=np.int64))]


def load_some(
    model: Any,
    options: CacheOptions,
    parts: list[Split],
    *,
    skip_unreadable: bool = True,
    progress: Progress = lambda title, total: lambda done: None,
) -> tuple[list[Features], list[str]]:
    """The features, and what was logged."""
    lines: list[str] = []
    tell = Tell(progress, lines.append)
    return load_features(parts, model, cache=options, skip_unreadable=skip_unreadable, tell=tell)[0], lines  # type: ignore[return-value]


def stop_after(number: int) -> Callable[[str, int], Callable[[int], None]]:
    """A progress bar at which the user presses Ctrl-C when so many images are done."""

    def progress(title: str, total: int) -> Callable[[int], None]:
        done = [0]

        def advance(more: int) -> None:
            done[0] += more
            if done[0] > number:
                raise KeyboardInterrupt

        return advance

    return progress


@pytest.mark.parametrize("memory_bytes", [None, 1], ids=["in memory", "memory-mapped"])
@pytest.mark.parametrize("damage", [False, True], ids=["whole", "damaged"])
def test_a_run_that_was_stopped_among_the_features_is_gone_on_with(
    tiny_model: str, tmp_path: Path, counted: list[Split], memory_bytes: int | None, damage: bool
) -> None:
    Counted.broken.add(5)
    model = adapt(tiny_model)
    plain, _ = load_some(model, CacheOptions(folder=None), counted)
    options = CacheOptions(folder=str(tmp_path), memory_bytes=memory_bytes)
    with pytest.raises(KeyboardInterrupt):
        load_some(model, options, counted, progress=stop_after(8))
    (unfinished,) = entries(tmp_path)
    if damage:  # a byte of row 4: the second batch
        content = bytearray((unfinished / "stem.bin").read_bytes())
        content[4 * 128 + 9] ^= 1
        (unfinished / "stem.bin").write_bytes(content)
    Counted.opened.clear()
    features, said = load_some(model, options, counted)
    num_kept = 4 if damage else 12
    assert f"going on after {num_kept} images" in said[1]
    assert set(Counted.opened) - {5} == set(range(num_kept, 23)) - {5}
    assert_equal(plain, features)
    assert features[0].split_indices.tolist() == [i for i in range(23) if i != 5]
    assert np.array_equal(features[0].digests, plain[0].digests)
    again, said = load_some(model, options, counted)
    assert "22 read from the cache" in said[0]
    assert_equal(plain, again)
    assert [path.name.startswith("unfinished") for path in entries(tmp_path)] == [False]


@pytest.mark.parametrize("memory_bytes", [None, 1], ids=["in memory", "memory-mapped"])
def test_two_processes_may_compute_the_same_features(
    tiny_model: str, tmp_path: Path, counted: list[Split], memory_bytes: int | None
) -> None:
    model, options = adapt(tiny_model), CacheOptions(folder=str(tmp_path), memory_bytes=memory_bytes)
    others = []

    def meanwhile(title: str, total: int) -> Callable[[int], None]:
        others.extend(load_some(model, options, counted)[0])
        return lambda done: None

    features, _ = load_some(model, options, counted, progress=meanwhile)
    assert_equal(features, others)
    assert len(entries(tmp_path)) == 1
    assert "read from the cache" in load_some(model, options, counted)[1][0]


def test_an_image_that_cannot_be_read_does_not_switch_the_cache_off(
    tiny_model: str, tmp_path: Path, counted: list[Split]
) -> None:
    model, options = adapt(tiny_model), CacheOptions(folder=str(tmp_path))
    Counted.broken.update({7, 2})
    first, _ = load_some(model, options, counted)
    Counted.opened.clear()
    second, said = load_some(model, options, counted)
    assert "21 read from the cache" in said[0]
    assert set(Counted.opened) == {2, 7}  # whether they still can't be
    assert_equal(first, second)
    with pytest.raises(UserError, match=r"2 images can't be read: noise\[2\]: .*; noise\[7\]: .*unreadable=skip"):
        load_some(model, options, counted, skip_unreadable=False)
    Counted.broken.remove(2)  # a disk that answers again: the file has not changed
    third, said = load_some(model, options, counted)
    assert "can be by now" in said[0]
    assert len(third[0]) == 22
    assert "22 read from the cache" in load_some(model, options, counted)[1][0]


def test_all_images_that_cannot_be_read_are_named(tiny_model: str, tmp_path: Path, counted: list[Split]) -> None:
    Counted.broken.update({3, 9, 22})
    options = CacheOptions(folder=str(tmp_path))
    seen: list[int] = []
    with pytest.raises(
        UserError, match=r"3 images .*: noise\[3\].*; noise\[9\].*; noise\[22\]: can't be read .*: no; set"
    ):
        load_some(adapt(tiny_model), options, counted, skip_unreadable=False, progress=lambda title, total: seen.append)
    assert sum(seen) == 23
