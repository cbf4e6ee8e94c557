"""Clients that the data name: folders and a CSV file from the command line, and what a run says of them by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import yaml
from PIL import Image

from flora import export
from flora.communication.network import CsvNetwork
from flora.config.parse import parse_config
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.simulate import main

CLIENTS = {"farm": 6, "clinic": 4, "mill 2": 5}
Capture = pytest.CaptureFixture[str]


def write_images(root: Path, clients: dict[str, int] = CLIENTS) -> Path:
    """`root/CLIENT/CLASS/*.png`: so many images of each of two classes, a bright and a dark one."""
    generator = np.random.default_rng(0)
    for client, number in clients.items():
        for label, brightness in (("day", 170), ("night", 60)):
            folder = root / client / label
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.normal(brightness, 30, (16, 16, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def run(tmp_path: Path, raw_config: dict[str, Any], images: Path) -> Callable[..., Path]:
    """Runs the program on the images by folder, which must go well; the run directory."""
    path = tmp_path / "mine.yaml"
    raw = {key: value for key, value in raw_config.items() if key not in ("name", "clients")}
    raw |= {"rounds": 1, "data": {"name": "image_folder", "root": str(images), "groups": "folder"}}
    path.write_text(yaml.safe_dump(raw | {"partition": "natural"}))

    def start(*overrides: str, status: int = 0) -> Path:
        assert main([str(path), *overrides]) == status
        names = [each.partition("=")[2] for each in overrides if each.startswith("name=")]
        return tmp_path / "runs" / (names or ["mine"])[0]

    return start


def partition(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "partition.json").read_text())
    return content


def names(directory: Path) -> list[str]:
    return [client["name"] for client in partition(directory)["clients"]]


def test_folders_name_the_clients(run: Callable[..., Path]) -> None:
    directory = run()
    assert names(directory) == ["clinic", "farm", "mill 2"]
    assert partition(directory)["clients_without_training_images"] == []
    assert yaml.safe_load((directory / "config.yaml").read_text())["clients"]["number"] is None
    assert names(run("clients.number=3", "name=given")) == names(directory)
    assert names(run("preset=averaging", "split=official", "name=preset")) == names(directory)


def test_a_csv_file_names_the_clients(run: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    rows = [f"{path},{path.parts[-2]},{path.parts[-3]}" for path in sorted(images.rglob("*.png"))]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["path,label,client", *rows]))
    assert names(run(f"data={{name: csv, path: {table}}}")) == ["clinic", "farm", "mill 2"]


def test_another_number_than_the_data_name_is_an_error(run: Callable[..., Path], capsys: Capture) -> None:
    run("clients.number=4", status=2)
    assert "clients.number: the data name 3 clients, got 4; null takes them" in capsys.readouterr().err.splitlines()[-1]


def test_pooled_clients_of_the_data_are_one_without_a_name(run: Callable[..., Path]) -> None:
    (client,) = partition(run("clients.centralized=true"))["clients"]
    assert "name" not in client


def test_clients_that_the_split_swallows_are_counted_and_named(
    run: Callable[..., Path], images: Path, capsys: Capture
) -> None:
    """Of a client with one image of a class, that goes to the test images for some seed; the others stay in order."""
    write_images(images, {f"tiny {index}": 1 for index in range(6)})
    everybody = {"clinic", "farm", "mill 2", *(f"tiny {index}" for index in range(6))}
    swallowed = []
    for seed in range(4):
        directory = run(f"seed={seed}", "data.test_fraction=0.5", f"name=seed{seed}")
        left_out = partition(directory)["clients_without_training_images"]
        assert names(directory) == sorted(everybody.difference(left_out))
        swallowed.append(len(left_out))
        line = f"{len(left_out)} of the 9 clients that the data name have no training image and take no part: "
        assert (line + ", ".join(left_out) in capsys.readouterr().err) == bool(left_out)
    assert len(set(swallowed)) > 1


def test_what_needs_the_number_of_clients_is_checked_when_the_data_are_known(
    run: Callable[..., Path], capsys: Capture
) -> None:
    for override, message in (
        ("evaluation.num_local_only=4", "evaluation.num_local_only: expected at most 3, the clients there are, got 4"),
        ("clients.cohort.number=5", "clients.cohort.number: expected at most the number of clients, 3, got 5"),
        ("clients.ranks=[1,2]", "clients.ranks: expected 3 numbers, one for each client, got 2"),
    ):
        run(override, "server.strategy=hetlora", status=2)
        captured = capsys.readouterr().err.splitlines()
        assert message in captured[-1]
        assert not any("image features" in line for line in captured)  # found before they are computed


@pytest.mark.parametrize("name", ["iid", "dirichlet", "pathological"])
def test_other_partitions_need_a_number(raw_config: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError, match=rf"^clients\.number: expected a number: {name} takes none from the data"):
        parse_config({**raw_config, "partition": name, "clients": {"number": None}})
    assert parse_config({**raw_config, "partition": name, "clients": None}).clients.number == 10


def test_the_network_by_name(run: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    """Rows in any order; a client that the split swallowed may have one, and one that is missing is named."""
    table = tmp_path / "lines.csv"
    table.write_text("dropout,client\n0,mill 2\n1,farm\n0,clinic\n0,swallowed\n")
    found = CsvNetwork(path=str(table)).profiles(3, Rng(0), names=("clinic", "farm", "mill 2"))
    assert found.dropout.tolist() == [0, 1, 0]
    run(f"network={{name: csv, path: {table}}}")
    table.write_text("dropout,client\n0,mill 2\n0,Farm\n0,clinic\n")
    run(f"network={{name: csv, path: {table}}}", "name=second", status=2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"network.path: {table}: no row for client 'farm'; did you mean 'Farm'?" in line


def test_the_network_by_id_where_clients_are_made(tmp_path: Path) -> None:
    table = tmp_path / "lines.csv"
    table.write_text("client,dropout\n2,0.2\n0,0\n1,0.1\n")
    assert CsvNetwork(path=str(table)).profiles(3, Rng(0)).dropout.tolist() == [0, 0.1, 0.2]
    for number, content, message in (
        (4, "client,dropout\n2,0.2\n0,0\n1,0.1\n", "no row for client '3'; expected one of 0, 1, 2"),
        (2, "client,dropout\n0,0.2\n0,0\n", "line 3: client '0' is in line 2 already"),
    ):
        table.write_text(content)
        with pytest.raises(Exception, match=message):
            CsvNetwork(path=str(table)).profiles(number, Rng(0))


def test_a_clients_own_adapter_by_name(run: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    directory = run("personal=ditto")
    by_name, by_id, other = (tmp_path / f"{each}.safetensors" for each in ("name", "id", "other"))
    for file, client in ((by_name, "mill 2"), (by_id, "2"), (other, "farm")):
        assert export.main([str(directory), str(file), "--client", client]) == 0
    weights = [safetensors.torch.load_file(file) for file in (by_name, by_id, other)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert any(not weights[0][name].equal(weights[2][name]) for name in weights[0])
    capsys.readouterr()
    assert export.main([str(directory), str(tmp_path / "x.safetensors"), "--client", "Mill 2"]) == 2
    assert capsys.readouterr().err == f"{directory}: there is no client 'Mill 2'; did you mean 'mill 2'?\n"


def test_a_run_of_named_clients_goes_on(run: Callable[..., Path]) -> None:
    directory = run()
    assert main(["--resume", str(directory), "rounds=2"]) == 0
    with (directory / "clients.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3
