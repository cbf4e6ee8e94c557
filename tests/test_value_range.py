"""Images of more than 8 bits: one range for all of a data set, whoever names it."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adapt
from PIL import Image

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.progress import Tell
from flora.core.registry import OptionError
from flora.data.augmentation import NoAugmentation
from flora.data.datasets.base import ImageData, ImageFiles, Split
from flora.data.datasets.folders import CsvFile, ImageFolder
from flora.data.rgb import to_rgb
from flora.data.value_range import ValueRange, with_one_range
from flora.features.cache import CacheOptions
from flora.features.live import live_features
from flora.features.loading import load_features
from flora.simulate import resume, simulate

# Eight images of very different brightness: a range of each one's own would make them alike.
GREY = np.random.default_rng(0).integers(0, 256, (8, 20, 20)) * np.arange(1, 9)[:, None, None] // 8
GREY[0, 0, 0], GREY[7, 0, 0] = 0, 255
QUIET: dict[str, Any] = {"progress": lambda title, total: lambda done: None}

Writer = Callable[[Path, np.ndarray], Path]


def png(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def tiff(path: Path, values: np.ndarray, **tags: Any) -> Path:
    Image.fromarray(values).save(path.with_suffix(".tif"), tiffinfo={int(name[1:]): tags[name] for name in tags})
    return path.with_suffix(".tif")


def data_of(paths: Sequence[Path]) -> ImageData:
    """The first half of the files to train on, the others to test on."""
    source, half = ImageFiles(paths), len(paths) // 2
    splits = [
        Split(source, np.arange(start, start + half), np.zeros(half, dtype=np.int64))
        for start in (0, len(paths) - half)
    ]
    return ImageData(*splits, ("thing",))


def scaled(
    paths: Sequence[Path], given: tuple[float, float] | None = None
) -> tuple[ImageData, ValueRange | None, list[str]]:
    """The data with one range, that range, and what was logged."""
    lines: list[str] = []
    data = data_of(paths)
    return *with_one_range(data, given, whole=data, log=lines.append, **QUIET), lines


def pixels(data: ImageData) -> np.ndarray:
    """All images as they go into the model, one channel."""
    return np.stack(
        [np.asarray(to_rgb(split.open(i)))[..., 0] for split in (data.train, data.test) for i in range(len(split))]
    )


def in_16_bits(values: np.ndarray) -> np.ndarray:
    return (values * 257).astype(np.uint16)


def in_12_bits(values: np.ndarray) -> np.ndarray:
    return np.rint(values * 4095 / 255).astype(np.uint16)


def in_10_bits(values: np.ndarray) -> np.ndarray:
    return np.rint(values * 1023 / 255).astype(np.uint16)


def like_sentinel(values: np.ndarray) -> np.ndarray:
    return np.rint(values * 10_000 / 255).astype(np.uint16)


def in_floats(values: np.ndarray) -> np.ndarray:
    return (values / 255).astype(np.float32)


def in_32_bits(values: np.ndarray) -> np.ndarray:
    return (values * 1000 - 90_000).astype(np.int32)


@pytest.mark.parametrize(
    ("write", "encode"),
    [
        (png, in_16_bits), (png, in_12_bits), (png, in_10_bits), (png, like_sentinel),
        (tiff, in_16_bits), (tiff, like_sentinel), (tiff, in_floats), (tiff, in_32_bits),
    ],
)  # fmt: skip
def test_another_encoding_of_the_same_images_gives_the_same_pixels(
    tmp_path: Path, write: Writer, encode: Callable[[np.ndarray], np.ndarray]
) -> None:
    data, _, lines = scaled([write(tmp_path / str(i), encode(image)) for i, image in enumerate(GREY)])
    assert np.array_equal(pixels(data), GREY)
    assert lines[0].startswith("8 images of more than 8 bits: [") and "found over all of them" in lines[0]


@pytest.mark.parametrize("hole", [-9999.0, np.inf, -np.inf, np.nan, -3.4028235e38, 1e36])
def test_what_was_not_measured_is_left_out_of_the_range_and_black(tmp_path: Path, hole: float) -> None:
    images = in_floats(GREY)
    images[3, 5, 5] = hole
    data, value_range, _ = scaled([tiff(tmp_path / str(i), image) for i, image in enumerate(images)])
    expected = GREY.copy()
    expected[3, 5, 5] = 0
    assert value_range is not None and value_range.limits == (0.0, 1.0)
    assert np.array_equal(pixels(data), expected)


def test_a_fill_value_among_the_others_is_a_value(tmp_path: Path) -> None:
    depths = np.array([[-9999, -9500], [-400, 0]], dtype=np.int32)
    data, value_range, _ = scaled([tiff(tmp_path / str(i), depths) for i in range(2)])
    assert value_range == ValueRange(-9999.0, 0.0)
    assert pixels(data)[0].tolist() == [[0, 13], [245, 255]]


def test_a_tag_names_what_was_not_measured(tmp_path: Path) -> None:
    values = like_sentinel(GREY)
    values[2, 1, 1] = 65535
    data, value_range, lines = scaled([tiff(tmp_path / str(i), each, _42113="65535") for i, each in enumerate(values)])
    expected = GREY.copy()
    expected[2, 1, 1] = 0
    assert value_range == ValueRange(0.0, 10_000.0, (65535.0,))
    assert np.array_equal(pixels(data), expected)
    assert any("65535 and what is not finite count as no data, and become black" in line for line in lines)


@pytest.mark.parametrize("names", [("_340", "_341"), ("_280", "_281")])
def test_tags_name_the_range_of_all_files_and_the_widest_counts(tmp_path: Path, names: tuple[str, str]) -> None:
    limits = [(100, 2000), (0, 4000), (50, 300), (7, 4095)]
    tags = [dict(zip(names, each, strict=True)) for each in limits]
    values = np.array([[0, 4095 * 100 // 255], [4095, 5000]], dtype=np.uint16)
    data, value_range, lines = scaled([tiff(tmp_path / str(i), values, **tag) for i, tag in enumerate(tags)])
    assert value_range is not None and value_range.limits == (0.0, 4095.0)
    assert pixels(data)[0].tolist() == [[0, 100], [255, 255]]
    assert "by the files' tags" in lines[0] and "reach from 0 to 5000 and are clipped to [0, 4095]" in lines[1]


def test_a_range_that_only_some_files_name_is_not_that_of_all(tmp_path: Path) -> None:
    paths = [tiff(tmp_path / "0", in_12_bits(GREY[7]), _341=9), tiff(tmp_path / "1", in_12_bits(GREY[0]))]
    assert scaled(paths)[1] == ValueRange(0.0, 4095.0)


def test_the_option_comes_first(tmp_path: Path) -> None:
    values = np.array([[0, 100], [200, 300]], dtype=np.uint16)
    paths = [tiff(tmp_path / str(i), values, _340=5, _341=70) for i in range(2)]
    data, value_range, lines = scaled(paths, (100, 355))
    assert value_range == ValueRange(100.0, 355.0)
    assert pixels(data)[0].tolist() == [[0, 0], [100, 200]]
    assert "(data.value_range)" in lines[0]


def test_a_small_part_of_what_is_possible_is_a_warning(tmp_path: Path) -> None:
    paths = [png(tmp_path / str(i), in_12_bits(image)) for i, image in enumerate(GREY)]
    assert "warning: data.value_range: the images use [0, 4095], less than a quarter of [0, 65535]; expected" in str(
        scaled(paths)[2]
    )
    assert "less than a quarter of [0, 65535]; much of what they show is lost" in str(scaled(paths, (0, 65535))[2])
    assert len(scaled(paths, (0, 4095))[2]) == 1
    whole = [png(tmp_path / str(i), in_16_bits(image)) for i, image in enumerate(GREY)]
    assert len(scaled(whole)[2]) == 1


def test_constant_images_keep_their_grey(tmp_path: Path) -> None:
    paths = [png(tmp_path / str(i), np.full((3, 3), level, dtype=np.uint16)) for i, level in enumerate((0, 100, 255))]
    data, _, _ = scaled([*paths, paths[1]])
    assert [image[0, 0] for image in pixels(data)] == [0, 100, 255, 100]
    data, value_range, lines = scaled([paths[1]] * 2)
    assert value_range == ValueRange(100.0, 100.0) and not pixels(data).any()
    assert any("all values are 100" in line for line in lines)
    nothing = [tiff(tmp_path / str(i), np.full((3, 3), np.nan, dtype=np.float32)) for i in range(2)]
    assert not pixels(scaled(nothing)[0]).any()


def test_integers_and_floating_point_numbers_share_no_range(tmp_path: Path) -> None:
    paths = [png(tmp_path / "0", in_16_bits(GREY[0])), tiff(tmp_path / "1", in_floats(GREY[1]))]
    with pytest.raises(UserError, match=r"data.value_range: some images have integers .* expected \[LOW, HIGH\]"):
        scaled(paths)
    assert scaled(paths, (0, 1))[1] == ValueRange(0.0, 1.0)


def test_a_16_bit_pgm_file_names_its_range_itself(tmp_path: Path) -> None:
    paths = []
    for index, image in enumerate(GREY):
        paths.append(tmp_path / f"{index}.pgm")
        paths[-1].write_bytes(b"P5 20 20 1023\n" + in_10_bits(image // 4).astype(">u2").tobytes())
    assert np.array_equal(pixels(scaled(paths)[0]), GREY // 4)


def test_16_bits_a_channel_are_said_to_be_read_as_8(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = np.full((2, 2, 3), 0x1234, dtype=">u2")
    header, body = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), b"".join(b"\0" + row.tobytes() for row in rows)
    path = tmp_path / "x.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    )
    data, value_range, lines = scaled([path, path])
    assert value_range is None and pixels(data)[0, 0, 0] == 0x12
    assert lines == [
        "warning: data: 2 colour images have 16 bits a channel; the upper 8 are read, as of the range [0, 65535]"
    ]


def test_images_of_8_bits_and_their_cache_are_what_they_were(tmp_path: Path) -> None:
    paths = [png(tmp_path / str(i), image.astype(np.uint8)) for i, image in enumerate(GREY)]
    data, value_range, lines = scaled(paths)
    assert value_range is None and not lines
    assert isinstance(data.train.source, ImageFiles)
    assert np.array_equal(pixels(data), GREY)
    assert "is not used" in scaled(paths, (0, 9))[2][0]
    assert np.array_equal(pixels(scaled(paths, (0, 9))[0]), GREY)


def test_features_of_all_kinds_see_the_same_range_and_the_cache_knows_it(tmp_path: Path, tiny_model: str) -> None:
    model = adapt(tiny_model)
    plain = data_of([png(tmp_path / f"plain-{i}", image.astype(np.uint8)) for i, image in enumerate(GREY)])
    deep = [tiff(tmp_path / str(i), in_floats(image)) for i, image in enumerate(GREY)]
    options = CacheOptions(folder=str(tmp_path / "cache"))

    def stored(data: ImageData, said: list[str]) -> torch.Tensor:
        (features,), _ = load_features(
            [data.train], model, cache=options, skip_unreadable=False, tell=Tell(QUIET["progress"], said.append)
        )
        return features.take(torch.arange(len(features)), torch.device("cpu"))

    expected = stored(plain, [])
    for given, is_equal in (((0.0, 1.0), True), ((0.0, 2.0), False), ((0.0, 1.0), True)):
        data, said = scaled(deep, given)[0], []
        assert torch.equal(stored(data, said), expected) == is_equal
        live, _ = live_features(data.train, model, NoAugmentation(), skip_unreadable=False, **QUIET)
        assert torch.allclose(live.take(torch.arange(4), torch.device("cpu")), stored(data, said), atol=1e-6)
    assert "read from the cache" in said[0]


def test_a_run_records_its_range_and_goes_on_with_no_other(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    for index in range(24):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index:02}"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiff(path, like_sentinel(GREY[index % 8]))
    raw_config |= {"data": {"name": "image_folder", "root": str(tmp_path / "images")}, "partition": "iid", "rounds": 1}
    run = simulate(parse_config(raw_config)).directory
    assert json.loads((run / "environment.json").read_text())["value_range"] == [0.0, 10_000.0]
    assert "[0, 10000] becomes black to white" in (run / "log.txt").read_text()
    resume(run, ["rounds=2"])
    with pytest.raises(UserError, match=r"data.value_range: null then, \[0.0, 4000.0\] now"):
        resume(run, ["rounds=3", "data.value_range=[0, 4000]"])
    tiff(tmp_path / "images" / "a" / "00", like_sentinel(GREY[0]) + 9)  # the same name and size
    tiff(tmp_path / "images" / "b" / "07", like_sentinel(GREY[7]) + 9)
    tiff(tmp_path / "images" / "b" / "15", like_sentinel(GREY[7]) + 9)
    with pytest.raises(UserError, match=r"values of images range over \[0.0, 10000.0\] then, \[0.0, 10009.0\] now"):
        resume(run, ["rounds=3"])


@pytest.mark.parametrize("wrong", [(1.0,), (1.0, 1.0), (2.0, 1.0), (0.0, np.inf), (0.0, 1.0, 2.0)])
def test_a_range_has_two_limits(wrong: tuple[float, ...]) -> None:
    for kind in (lambda: ImageFolder("x", value_range=wrong), lambda: CsvFile("x", value_range=wrong)):
        with pytest.raises(
            OptionError, match=r"value_range: expected (\[LOW, HIGH\] with LOW below HIGH|a finite number)"
        ):
            kind()
