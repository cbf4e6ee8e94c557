"""`flora new` writes a configuration that is right as it is, says what it saw, and writes over nothing unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flora.__main__ import main
from flora.config.parse import load_config
from flora.simulate import main as simulate

Capture = pytest.CaptureFixture[str]


def write_images(folder: Path, number: int, size: tuple[int, int] = (20, 16)) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(str(folder)))
    for index in range(number):
        pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_and_run(tiny_model: str, *overrides: str) -> dict[str, Any]:
    """Check `my.yaml` as it is, run a round of it with a tiny model, and return what the file says."""
    assert simulate(["--check", "my.yaml"]) == 0
    small = ["rounds=1", f"backbone.model={tiny_model}", "backbone.weights=random"]
    assert simulate(["my.yaml", *small, *overrides]) == 0
    assert Path("runs/my/summary.json").is_file()
    content: dict[str, Any] = yaml.safe_load(Path("my.yaml").read_text())
    return content


def test_a_folder_of_class_folders(here: Path, tiny_model: str, capsys: Capture) -> None:
    write_images(here / "photos: of # mine/cat", 12)
    write_images(here / "photos: of # mine/fire\ntruck", 8, (40, 30))
    assert main(["new", "my.yaml", "--data", "photos: of # mine"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "images: 20, of which 16 to train on and 4 to test on, drawn at random",
        "classes: 2 (cat 12, fire truck 8)",
        "sizes: 20 x 16 (12), from 20 x 16 to 40 x 30; modes RGB",
        "clients: none named; the images will be dealt out to 4",
        "written to my.yaml; next: flora simulate my.yaml",
    ]
    content = check_and_run(tiny_model)
    assert content["data"]["root"] == "photos: of # mine"
    assert content["clients"] == {"number": 4}


def test_folders_of_clients_are_found(here: Path, tiny_model: str, capsys: Capture) -> None:
    for client in ("farm", "factory"):
        for label in ("cat", "dog"):
            write_images(here / "images" / client / label, 5)
    assert main(["new", "my.yaml"]) == 0
    assert "clients: 2 by training images (factory 9, farm 7)\n" in capsys.readouterr().out
    content = check_and_run(tiny_model)
    assert content["partition"] == "natural" and content["data"]["groups"] == "folder"
    assert load_config("my.yaml").clients.number is None


def test_folders_for_training_and_for_testing(here: Path, tiny_model: str, capsys: Capture) -> None:
    for part, number in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            write_images(here / "images" / part / label, number)
    assert main(["new", "my.yaml"]) == 0
    assert "images: 16, of which 12 to train on and 4 to test on\n" in capsys.readouterr().out
    assert "test_fraction" not in check_and_run(tiny_model)["data"]


def test_a_csv_file_with_clients_and_an_image_that_cannot_be_read(here: Path, tiny_model: str, capsys: Capture) -> None:
    for label in ("cat", "dog"):
        write_images(here / label, 6)
    (here / "dog/0.png").write_bytes(b"no image")
    rows = [f"{label}/{index}.png,{label},site{index % 2}" for label in ("cat", "dog") for index in range(6)]
    (here / "list.csv").write_text("\n".join(["path,label,client", *rows]))
    assert main(["new", "my.yaml", "--data", "list.csv"]) == 0
    said = capsys.readouterr().out
    assert 'warning: 1 can\'t be read, such as "dog/0.png"; data.unreadable: skip leaves them out\n' in said
    assert "clients: 2 by training images (" in said
    assert check_and_run(tiny_model, "data.unreadable=skip")["partition"] == "natural"


def test_without_images_it_says_where_to_put_them(capsys: Capture) -> None:
    assert main(["new", "my.yaml"]) == 0
    assert capsys.readouterr().out.startswith("no images yet: put them into a folder images,")
    assert simulate(["--check", "my.yaml"]) == 0


def test_it_writes_over_nothing_unless_it_is_asked(here: Path, capsys: Capture) -> None:
    file = here / "my.yaml"
    file.write_text("mine")
    assert main(["new", "my.yaml"]) == 2
    assert capsys.readouterr().err == "my.yaml: exists already; choose another name, or --force to write over it\n"
    assert file.read_text() == "mine"
    assert main(["new", "my.yaml", "--force"]) == 0
    assert simulate(["--check", "my.yaml"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["my.txt"], "my.txt: expected a name that ends in .yaml\n"),
        (["no/my.yaml"], "no/my.yaml: can't be written: No such file or directory\n"),
        (["my.yaml", "--data", "nowhere"], "data.root: nowhere: no such folder; expected"),
        (["my.yaml", "--data", "one"], "one: one class alone, 'cat'; expected two or more\n"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    here: Path, arguments: list[str], message: str, capsys: Capture
) -> None:
    write_images(here / "one/cat", 4)
    assert main(["new", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message) and said.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["one"]
