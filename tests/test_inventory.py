"""What is written down at a run's start: the prompts as they were used, and whose each image is."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flora.clip.frozen import FrozenClip
from flora.clip.towers.text import TextTower
from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.simulate import RunResult, resume, simulate

Run = Callable[..., RunResult]


@pytest.fixture
def run(raw_config: dict[str, Any]) -> Run:
    """Runs the tiny experiment with some of its sections replaced."""
    return lambda **changes: simulate(parse_config({**raw_config, "rounds": 1, **changes}))


def read(result: RunResult, name: str) -> Any:
    return json.loads((result.directory / name).read_text())


def texts(prompts: dict[str, Any]) -> list[str]:
    return [text for each in prompts["classes"] for text in each["prompts"]]


# Prompts


def test_the_prompts_are_those_that_the_model_got(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    real = TextTower.prompts

    def watched(tower: TextTower, *arguments: Any) -> Any:
        clip: FrozenClip = tower._clip
        object.__setattr__(
            clip, "tokenize", lambda texts, tokenize=clip.tokenize: given.extend(texts) or tokenize(texts)
        )
        return real(tower, *arguments)

    monkeypatch.setattr(TextTower, "prompts", watched)
    options = {"templates": ["a photo of {}.", "{} at night"], "class_names": {"thing 1": 'häm "ster"'}}
    prompts = read(run(prompts=options), "prompts.json")
    assert texts(prompts) == given
    assert prompts == {
        "templates": options["templates"],
        "learned_context": None,
        "max_tokens": 77,
        "classes": [
            {"name": "thing 0", "prompts": ["a photo of thing 0.", "thing 0 at night"]},
            {"name": 'häm "ster"', "data_name": "thing 1",
             "prompts": ['a photo of häm "ster".', 'häm "ster" at night']},
            {"name": "thing 2", "prompts": ["a photo of thing 2.", "thing 2 at night"]},
        ],
        "cut_off": [],
    }  # fmt: skip


def test_prompts_of_the_data_set_and_of_new_classes(run: Run) -> None:
    prompts = read(run(data={"name": "patterns", "num_classes": 4}, split="base_to_new"), "prompts.json")
    assert texts(prompts) == ["a photo of a thing 0.", "a photo of a thing 1."]
    assert prompts["new_classes"] == [
        {"name": f"thing {index}", "prompts": [f"a photo of a thing {index}."]} for index in (2, 3)
    ]


@pytest.mark.parametrize(("options", "number"), [({}, 4), ({"words": None, "num_tokens": 6}, 6)])
def test_of_a_learned_context_what_is_fixed(run: Run, options: dict[str, Any], number: int) -> None:
    prompts = read(run(adapter={"name": "prompt_context", **options}), "prompts.json")
    assert prompts["learned_context"] == {"num_vectors": number, "starts_from": options.get("words", "a photo of a")}
    assert texts(prompts) == [f"[learned context] thing {index}." for index in range(3)]


def test_prompts_that_the_model_does_not_read_to_their_end(run: Run) -> None:
    longest = "a photo of a " + "very " * 90
    prompts = read(run(prompts={"templates": ["a {}", "{} " + longest]}), "prompts.json")
    assert prompts["cut_off"] == [f"thing {index} {longest}" for index in range(3)]


def test_a_run_goes_on_with_the_prompts_that_it_began_with(run: Run) -> None:
    directory = run().directory
    before = (directory / "prompts.json").read_text()
    resume(directory, ["rounds=2"])
    assert (directory / "prompts.json").read_text() == before
    (directory / "prompts.json").write_text(before.replace("a photo of a thing 0", "a picture of a thing 0"))
    with pytest.raises(UserError, match=r"prompts\.json: the prompts are not those that this run began with"):
        resume(directory, ["rounds=3"])
    (directory / "prompts.json").unlink()  # as in a run of a version that did not write it
    resume(directory, ["rounds=3"])
    assert (directory / "prompts.json").read_text() == before


# Examples


def examples(result: RunResult) -> list[dict[str, str]]:
    with (result.directory / "examples.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_images(root: Path, *, clients: int = 3, number: int = 12) -> None:
    """Natural clients' images, `root/CLIENT/CLASS/*.png`, one of which is no image."""
    generator = np.random.default_rng(0)
    for client in range(clients):
        for label in ("cat", "dog"):
            folder = root / f"site {client}" / label
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    (root / "site 1" / "dog" / "3.png").write_text("no image")


def test_it_is_written_whose_each_image_is_and_what_for(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    data = {"name": "image_folder", "root": str(tmp_path / "images"), "groups": "folder", "unreadable": "skip"}
    result = run(data=data, partition="natural", clients={"number": None, "holdout_fraction": 0.25})
    rows = examples(result)
    assert len({row["image"] for row in rows}) == len(rows) == 3 * 2 * 12 - 1
    for row in rows:
        client, label = Path(row["image"]).parts[-3:-1]
        assert row["class"] == label
        assert row["name"] == ("" if row["split"] == "test" else client)
    partition = read(result, "partition.json")
    counts = Counter((row["client"], row["split"]) for row in rows)
    assert counts.pop(("", "test")) == partition["num_test"]
    for each in partition["clients"]:
        assert counts.pop((str(each["client"]), "train")) == each["num_train"]
        assert counts.pop((str(each["client"]), "held_out")) == each["num_held_out"]
    assert not counts


def test_images_of_several_clients_and_of_none(run: Run) -> None:
    shots = run(partition={"name": "few_shot_overlapping", "shots": 2}, clients={"number": 9}, name="shots")
    rows = [row for row in examples(shots) if row["split"] in ("train", "held_out", "unused")]
    by_image: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    assert any(len(each) > 1 for each in by_image.values())
    for each in by_image.values():
        assert len({row["client"] for row in each}) == len(each)
        assert len(each) == 1 or all(row["client"] for row in each)
    few = run(partition={"name": "few_shot_chunks", "shots": 1}, clients={"number": 2}, name="few")
    rows = examples(few)
    assert any(row["split"] == "unused" for row in rows)
    assert all((row["client"] == "") == (row["split"] in ("unused", "test")) for row in rows)


def test_classes_that_were_set_aside_are_there(run: Run) -> None:
    rows = examples(run(data={"name": "patterns", "num_classes": 4}, split="base_to_new"))
    classes = {split: {row["class"] for row in rows if row["split"] == split} for split in ("train", "test", "new")}
    assert classes["train"] == classes["test"]
    assert classes["new"]
    assert not classes["new"] & classes["test"]


# Accuracy by domain


def test_accuracy_by_domain_is_that_of_the_test_images_of_each(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    data = {"name": "image_folder", "root": str(tmp_path / "images"), "groups": "folder", "unreadable": "skip"}
    result = run(data=data, partition="natural", clients={"number": None}, evaluation={"every": 1})
    tests = Counter(Path(row["image"]).parts[-3] for row in examples(result) if row["split"] == "test")
    for record in result.records:
        found = record.domain_accuracy
        assert found is not None
        assert found.keys() == tests.keys() == {"site 0", "site 1", "site 2"}
        weighted = sum(accuracy * tests[name] for name, accuracy in found.items()) / sum(tests.values())
        assert weighted == pytest.approx(record.accuracy, abs=1e-12)
        assert all(
            accuracy * tests[name] == pytest.approx(round(accuracy * tests[name])) for name, accuracy in found.items()
        )
    assert result.summary.domain_accuracy == result.records[-1].domain_accuracy
    assert "by domain" in (result.directory / "log.txt").read_text()


def test_without_domains_there_is_no_such_figure(run: Run) -> None:
    result = run()
    assert result.summary.domain_accuracy is None
    assert "by domain" not in (result.directory / "log.txt").read_text()
