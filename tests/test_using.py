"""A finished run's model predicts as the run's own evaluation did, on any images, and refuses what doesn't fit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flora import evaluate, predict
from flora.config.parse import parse_config
from flora.simulate import simulate

Capture = pytest.CaptureFixture[str]


def write_images(folder: Path, *, classes: int = 3, number: int = 16, deep: bool = False, clients: int = 0) -> str:
    """Noisy images, 16 px, each class around a colour of its own; with `deep` grey ones of 16 bits."""
    generator = np.random.default_rng(0)
    for place in range(classes):
        colour = generator.uniform(60, 190, 3)
        for index in range(number):
            client = f"site {index % clients}" if clients else "."
            path = folder / client / f"thing {place}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (colour + generator.normal(0, 40, (16, 16, 3))).clip(0, 255)
            if deep:
                Image.fromarray((pixels[..., 0] * 100).astype(np.uint16)).save(path)
            else:
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return str(folder)


def run_of(raw: dict[str, Any], images: Path, **changes: Any) -> Path:
    """A finished run on the images in a folder."""
    data = {"name": "image_folder", "root": str(images), "test_fraction": 0.5, **changes.pop("data", {})}
    return simulate(parse_config({**raw, "partition": "iid", "data": data, **changes})).directory


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return Path(write_images(tmp_path / "images"))


def images_of(run: Path, split: str = "test") -> dict[str, str]:
    """The run's test images with their classes."""
    with (run / "examples.csv").open(newline="") as file:
        return {row["image"]: row["class"] for row in csv.DictReader(file) if row["split"] == split}


def predicted(capsys: Capture, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert predict.main([*arguments, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def summary_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return content


KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "both towers": {"adapter": {"name": "lora", "rank": 2, "towers": ["text", "vision"]}},
    "residual": {"server": {"strategy": "fedex_lora"}},
    "fused": {"evaluation": {"fusion": "entropy"}},
    "patches": {"evaluation": {"patches": {"alpha": 0.5}}, "adapter": {"name": "lora", "towers": ["vision"]}},
    "ensemble": {"prompts": {"templates": ["a photo of a {}.", "{}"], "class_names": {"thing 1": "frog"}}},
    "tokens": {"backbone": {"tokens": {"name": "text_relevance", "keep": 0.5}}, "adapter": {"towers": ["vision"]}},
    "head": {"adapter": "linear_head"},
    "prompt": {"adapter": "prompt_context"},
    "bf16": {"backbone": {"precision": "bf16"}},
    "rounded": {"cache": {"storage": "bfloat16"}, "adapter": {"name": "lora", "towers": ["text"]}},
    "full": {"adapter": "full"},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_predictions_are_those_of_the_runs_own_evaluation(
    raw_config: dict[str, Any], images: Path, changes: dict[str, Any], capsys: Capture
) -> None:
    changes = {**changes, "backbone": {**raw_config["backbone"], **changes.get("backbone", {})}}
    changes["evaluation"] = {"predictions": 3, **changes.get("evaluation", {})}
    run = run_of(raw_config, images, **changes)
    labels, summary = images_of(run), summary_of(run)
    names = {
        each.get("data_name", each["name"]): each["name"]
        for each in json.loads((run / "prompts.json").read_text())["classes"]
    }
    content = predicted(capsys, str(run), *labels)
    assert [each["image"] for each in content["predictions"]] == list(labels)
    right = [names[labels[each["image"]]] == each["predicted"] for each in content["predictions"]]
    assert np.mean(right) == pytest.approx(summary["last_accuracy"], abs=1e-12)
    with (run / "predictions.csv").open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file) if row["split"] == "test"}
    tolerance = 0.02 if "bf16" in str(changes) else 1e-4
    for each in content["predictions"]:
        first = each["probabilities"][each["predicted"]]
        assert float(rows[each["image"]]["probability"]) == pytest.approx(first, abs=tolerance)
        assert sum(each["probabilities"].values()) == pytest.approx(1, abs=1e-9)  # three classes, the top three
    assert evaluate.main([str(run)]) == 0
    record = json.loads((run / "evaluations" / "image_folder.json").read_text())
    assert record["metrics"]["accuracy"] == summary["last_accuracy"]
    assert record["zero_shot"]["accuracy"] == summary["zero_shot_accuracy"]
    assert record["images_sha256"]


@pytest.mark.parametrize(
    "changes",
    [
        {"server": {"strategy": "fedsa_lora"}},
        {"personal": "ditto"},
        {"adapter": {"name": "dual_lora", "rank": 2, "local_rank": 5}},
    ],
    ids=["fedsa", "ditto", "dual"],
)
def test_a_clients_own_adapter(
    raw_config: dict[str, Any], tmp_path: Path, changes: dict[str, Any], capsys: Capture
) -> None:
    images = Path(write_images(tmp_path / "images", number=24, clients=3))
    shared = {"clients": {"number": 3, "holdout_fraction": 0.5}, "local": {**raw_config["local"], "learning_rate": 0.1}}
    changes = {**shared, **changes, "evaluation": {"predictions": 1}}
    run = run_of({**raw_config, **changes}, images, data={"groups": "folder"}, partition="natural")
    with (run / "clients.csv").open(newline="") as file:
        clients = list(csv.DictReader(file))
    assert {client["name"] for client in clients} == {"site 0", "site 1", "site 2"}
    with (run / "examples.csv").open(newline="") as file:
        held_out = [row for row in csv.DictReader(file) if row["split"] == "held_out"]
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    own = {row["image"]: row for row in rows if row["split"] == "held_out"}
    assert {row["own_predicted"] for row in rows if row["split"] == "test"} == {""}
    assert any(row["own_predicted"] != row["predicted"] for row in own.values())
    for client in clients:
        labels = {row["image"]: row["class"] for row in held_out if row["name"] == client["name"]}
        content = predicted(capsys, str(run), *labels, "--client", client["name"])
        right = [labels[each["image"]] == each["predicted"] for each in content["predictions"]]
        assert np.mean(right) == pytest.approx(float(client["personal_accuracy"]), abs=1e-6)
        for each in content["predictions"]:
            row = own[each["image"]]
            assert (row["name"], row["own_predicted"]) == (client["name"], each["predicted"])
            assert float(row["own_probability"]) == pytest.approx(each["probabilities"][each["predicted"]], abs=2e-4)
    by_id = predicted(capsys, str(run), str(images), "--client", "1")
    by_name = predicted(capsys, str(run), str(images), "--client", "site 1")
    assert by_id["predictions"] == by_name["predictions"]
    assert by_id["predictions"] != predicted(capsys, str(run), str(images))["predictions"]
    assert predict.main([str(run), str(images), "--client", "sit 1"]) == 2
    assert capsys.readouterr().err == f"{run}: there is no client 'sit 1'; did you mean 'site 1'?\n"


@pytest.fixture
def run(raw_config: dict[str, Any], images: Path) -> Path:
    return run_of(raw_config, images)


def test_classes_that_nobody_trained_on(run: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    """What is predicted among new classes is what a run of those classes says with the same adapter."""
    image = str(next(images.rglob("*.png")))
    content = predicted(capsys, str(run), image, "--classes", "tractor, barn,field,sky", "--top", "4")
    assert content["classes"] == ["tractor", "barn", "field", "sky"]
    (answer,) = content["predictions"]
    assert next(iter(answer["probabilities"])) == answer["predicted"] and len(answer["probabilities"]) == 4
    names = tmp_path / "names.txt"
    names.write_text("tractor\nbarn\n\nfield\nsky\n")
    assert predicted(capsys, str(run), image, "--classes", str(names), "--top", "4") == content
    many = [f"a class with a rather long name {place}" for place in range(200)]
    assert predicted(capsys, str(run), image, "--classes", ",".join(many))["classes"] == many
    own = predicted(capsys, str(run), image)
    assert predicted(capsys, str(run), image, "--classes", ",".join(own["classes"])) == own
    assert evaluate.main([str(run), 'prompts.class_names=["tractor", "barn", "field"]']) == 0
    capsys.readouterr()
    metrics = json.loads((run / "evaluations" / "image_folder.json").read_text())["metrics"]
    labels = images_of(run)
    some = predicted(capsys, str(run), *labels, "--classes", "tractor,barn,field")
    new = dict(zip(own["classes"], ("tractor", "barn", "field"), strict=True))
    right = [new[labels[each["image"]]] == each["predicted"] for each in some["predictions"]]
    assert np.mean(right) == pytest.approx(metrics["accuracy"])


def test_a_table(run: Path, images: Path, capsys: Capture) -> None:
    capsys.readouterr()
    assert predict.main([str(run), str(images), "--top", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 48 and len({line.index("  ") for line in printed if "/1." in line}) == 1
    first = next(line for line in printed if line.startswith(str(images / "thing 0" / "0.png")))
    assert first.count("%") == 2 and "thing " in first.removeprefix(str(images))


def test_images_of_more_than_8_bits_are_scaled_as_the_runs_were(
    raw_config: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    images = Path(write_images(tmp_path / "images", deep=True))
    run = run_of(raw_config, images)
    assert json.loads((run / "environment.json").read_text())["value_range"] is not None
    labels = images_of(run)
    content = predicted(capsys, str(run), *labels)
    right = [labels[each["image"]] == each["predicted"] for each in content["predictions"]]
    assert np.mean(right) == pytest.approx(summary_of(run)["last_accuracy"])
    assert predicted(capsys, str(run), *labels, "data.value_range=[0, 30000]")["predictions"] != content["predictions"]


def test_images_that_cannot_be_read(run: Path, images: Path, capsys: Capture) -> None:
    broken = images / "thing 0" / "broken.png"
    broken.write_bytes(b"not an image")
    capsys.readouterr()
    assert predict.main([str(run), str(images)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"{broken}: can't be read as an image: of no format that is known here; set data.unreadable=skip" in said.err
    assert predict.main([str(run), str(images), "data.unreadable=skip", "--json"]) == 0
    said = capsys.readouterr()
    assert f"left out: {broken}" in said.err and len(json.loads(said.out)["predictions"]) == 48
    assert predict.main([str(run), str(broken), "data.unreadable=skip"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_does_not_fit_is_refused_in_one_line(
    raw_config: dict[str, Any], run: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    none = run_of({**raw_config, "name": "none", "rounds": 0}, images)
    head = run_of({**raw_config, "name": "head", "adapter": "linear_head"}, images)
    half = run_of({**raw_config, "name": "half"}, images)
    (half / "adapter.safetensors").unlink()
    image = str(next(images.rglob("*.png")))
    cases = [
        ([str(tmp_path / "nowhere"), image], "nowhere: there is no such run directory"),
        ([str(empty), image], "not a run directory: it has no adapter.safetensors"),
        ([str(none), image], "none: this run has no rounds"),
        ([str(half), image], "half: this run is not finished"),
        ([str(run)], "the following arguments are required"),
        ([str(run), "device=cpu"], "expected images or folders of images"),
        ([str(run), str(tmp_path / "no.jpg")], "no.jpg: no such file or folder"),
        ([str(run), str(empty)], "empty: no images below this folder"),
        ([str(run), image, "--client", "9"], "there is no client '9'; expected one of 0, 1, 2, 3"),
        ([str(run), image, "--client", "1"], "client 1 has kept no adapter of its own in this run"),
        ([str(run), image, "--classes", "cat"], "expected two or more different classes, got 'cat' alone"),
        ([str(run), image, "--classes", "cat,dog,cat"], "got 'cat' twice"),
        ([str(run), image, "--classes", image], "can't be read as text"),
        ([str(head), image, "--classes", "cat,dog"], "its adapter (linear_head) has weights for each of its 3 classes"),
        ([str(run), image, "--top", "0"], "expected a whole number above 0, got '0'"),
        ([str(run), image, "adapter.rank=3"], "adapter.rank: a finished run stays what it is"),
        ([str(run), image, "backbone.weights=nothing"], "'nothing' is neither a file nor a tag"),
    ]
    capsys.readouterr()
    for arguments, message in cases:
        assert predict.main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert said.out == "" and message in said.err and said.err.count("\n") == 1, (arguments, said.err)


def test_evaluation_on_another_data_set(run: Path, tmp_path: Path, capsys: Capture) -> None:
    other = write_images(tmp_path / "other", classes=5)
    capsys.readouterr()
    arguments = [str(run), f"data.root={other}", "evaluation.auroc=true"]
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    path = run / "evaluations" / "image_folder.json"
    assert printed.startswith("zero-shot ") and printed.endswith(f"of 5 classes (image_folder); written to {path}\n")
    record = json.loads(path.read_text())
    assert record["class_names"] == [f"thing {place}" for place in range(5)] and record["num_images"] == 40
    assert 0 < record["metrics"]["auroc"] < 1 and record["metrics"].keys() == record["zero_shot"].keys()
    # Not overwritten; the same again, under another name.
    assert evaluate.main(arguments) == 0
    assert evaluate.main([*arguments, "--name", "other set"]) == 0
    again = [json.loads((run / "evaluations" / f"{name}.json").read_text()) for name in ("image_folder-2", "other set")]
    assert all(each["metrics"] == record["metrics"] for each in again)
    capsys.readouterr()
    assert evaluate.main([*arguments, "--name", "other set"]) == 2
    assert "other set.json: exists already" in capsys.readouterr().err


def test_classes_set_aside_are_evaluated_too(raw_config: dict[str, Any], tmp_path: Path) -> None:
    images = Path(write_images(tmp_path / "images", classes=5))
    run = run_of(raw_config, images, split="base_to_new")
    assert evaluate.main([str(run)]) == 0
    metrics = json.loads((run / "evaluations" / "image_folder.json").read_text())["metrics"]
    summary = summary_of(run)
    assert metrics["new_accuracy"] == summary["new_accuracy"] and metrics["harmonic_mean"] == summary["harmonic_mean"]


def test_what_can_not_be_evaluated_is_refused_in_one_line(
    raw_config: dict[str, Any], run: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    head = run_of({**raw_config, "name": "head", "adapter": "linear_head"}, images)
    other, one = write_images(tmp_path / "other", classes=5), write_images(tmp_path / "one", classes=1)
    capsys.readouterr()
    for arguments, message in [
        ([str(head), f"data.root={other}"], "has weights for each of its 3 classes, and none for others"),
        ([str(run), f"data.root={one}"], "'thing 0' is the only class"),
        ([str(run), f"data.root={tmp_path / 'no'}"], "no"),
        ([str(run), "rounds=3"], "rounds: a finished run stays what it is"),
        ([str(run), "data=nothing"], "data.name: 'nothing' is not known"),
        ([str(run), "--name", "../x"], "--name: expected a plain file name, got '../x'"),
        ([str(run), "--client", "7"], "there is no client '7'"),
    ]:
        assert evaluate.main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert said.out == "" and message in said.err and said.err.count("\n") == 1, (arguments, said.err)
    assert not (run / "evaluations").exists() and not (head / "evaluations").exists()
