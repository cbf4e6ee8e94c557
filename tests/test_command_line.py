"""The program as its users meet it: what it prints, what it returns, what it leaves behind."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from helpers import load_clip
from PIL import Image

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.runs import loop as program
from flora.simulate import main, simulate

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted(str(path) for path in (ROOT / "experiments").rglob("*.yaml") if path.parent.name != "descriptions")
TIMES = ("train_seconds", "eval_seconds", "peak_memory_bytes")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config_file(tmp_path: Path, raw_config: dict[str, Any]) -> str:
    """The path of a YAML file without a name that runs one round in a blink."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in raw_config.items() if key != "name"} | {"rounds": 1}))
    return str(path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Where the config's runs go."""
    return tmp_path / "runs"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def log_lines(error: str) -> list[str]:
    """The lines on standard error that are only the log's."""
    known = (
        "frozen parameters on",
        "training and",
        "left out: ",
        "clients trained alone",
        "image features: ",
        "clients in one step",
    )
    is_round = re.compile(r"round \d+ of \d+: ")
    return [line for line in error.splitlines() if is_round.match(line) or any(words in line for words in known)]


@pytest.fixture
def refused(capsys: Capture, runs: Path) -> Callable[..., str]:
    """Runs the program, which must end with status 2 and one line on standard error, and leave nothing; that line."""

    def run(*arguments: str, left: list[str] | None = None) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line not in log_lines(captured.err)]
        assert captured.out == ""
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        assert len(lines[0]) < 1500
        assert names(runs) == (left or [])
        return lines[0]

    return run


# A run that goes well


def test_a_run(config_file: str, runs: Path, capsys: Capture) -> None:
    assert main([config_file, "rounds=2", "evaluation.num_local_only=2"]) == 0
    assert names(runs) == ["mine"]
    assert names(runs / "mine") == [
        "adapter.safetensors", "checkpoints", "clients.csv", "config.yaml", "confusion.csv", "environment.json",
        "examples.csv",
        "log.txt", "partition.json", "prompts.json", "reliability.csv", "rounds.jsonl", "summary.json",
    ]  # fmt: skip
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    titles = ["zero-shot", "last round", "best round", "on clients' own data", "one client alone", "together or alone"]
    titles += ["trained parameters", "sent up, down", "training, evaluation", "whole run"]
    assert lines[0] == ""
    assert [line[2:22].split("  ")[0].strip() for line in lines[1:11]] == titles
    assert lines[11] == ""
    assert lines[12].startswith("zero-shot ")
    dealt = "4 clients, dirichlet (concentration 0.5, minimum examples 3)"
    assert f" in 2 rounds; {dealt}; 2.7 KB up per client and round; no " in lines[12]
    assert lines[13:] == [f"written to {runs / 'mine'}"]
    # Not a terminal: no progress bars.
    assert captured.err.splitlines() == log_lines(captured.err)
    assert "%|" not in captured.err


def test_the_report_is_the_summary(config_file: str, runs: Path, capsys: Capture) -> None:
    main([config_file])
    summary = json.loads((runs / "mine" / "summary.json").read_text())
    out = capsys.readouterr().out
    assert f"  zero-shot             {100 * summary['zero_shot_accuracy']:.1f} %\n" in out
    assert f"  last round            {100 * summary['last_accuracy']:.1f} %   (the result)\n" in out
    assert f"-> {100 * summary['last_accuracy']:.1f} % in 1 round; 4 clients" in out
    assert f"{summary['trainable_parameters']:,} of {summary['backbone_parameters']:,}" in out


def test_pooled_clients_are_one_that_has_what_all_would(config_file: str, runs: Path) -> None:
    few_shots = "partition={name: few_shot, shots: 2}"
    dealt, pooled = ([config_file, few_shots, f"name={name}"] for name in ("dealt", "pooled"))
    assert main(dealt) == 0
    assert main([*pooled, "clients.centralized=true"]) == 0
    counts = {}
    for name in ("dealt", "pooled"):
        clients = json.loads((runs / name / "partition.json").read_text())["clients"]
        counts[name] = sum(client["num_train"] + client["num_held_out"] for client in clients)
        assert len(clients) == {"dealt": 4, "pooled": 1}[name]
    assert counts["dealt"] == counts["pooled"] == 2 * 3 * 4
    # Where examples belong to several clients the pool has each of them once.
    overlapping = "partition={name: few_shot_overlapping, shots: 12}"
    assert main([config_file, overlapping, "clients.centralized=true", "name=overlapping"]) == 0
    (client,) = json.loads((runs / "overlapping" / "partition.json").read_text())["clients"]
    assert 2 * 3 * 12 // 3 < client["num_train"] + client["num_held_out"] <= 60


def test_zero_rounds_are_zero_shot(config_file: str, runs: Path, capsys: Capture) -> None:
    assert main([config_file, "rounds=0"]) == 0
    assert len((runs / "mine" / "rounds.jsonl").read_text().splitlines()) == 1
    assert " in 0 rounds; " in capsys.readouterr().out


def test_a_second_run_gets_a_name_of_its_own(config_file: str, runs: Path, capsys: Capture) -> None:
    assert main([config_file, "rounds=0"]) == main([config_file, "rounds=0"]) == 0
    assert names(runs) == ["mine", "mine-2"]
    assert f"written to {runs / 'mine-2'}" in capsys.readouterr().out
    assert json.loads((runs / "mine-2" / "summary.json").read_text())["name"] == "mine-2"


def test_a_name_that_was_asked_for_is_never_changed(
    config_file: str, runs: Path, capsys: Capture, refused: Callable[..., str]
) -> None:
    assert main([config_file, "rounds=0", "name=été 1"]) == 0
    before = (runs / "été 1" / "log.txt").read_text()
    message = refused(config_file, "rounds=0", "name=été 1", left=["été 1"])
    assert message == f"{config_file}: name: {runs / 'été 1'} exists already; choose another name or remove it"
    assert (runs / "été 1" / "log.txt").read_text() == before


def test_the_same_seed_twice_is_the_same_run(config_file: str, runs: Path) -> None:
    options = ["rounds=2", "adapter.dropout=0.3", "clients.cohort.fraction=0.5", "adapter.towers=[text, vision]"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # the global generators take no part
        np.random.rand(3)
        assert main([config_file, *options, f"name={name}", f"seed={seed}"]) == 0
    a, b, c = ((runs / name / "adapter.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    for file in ("partition.json", "clients.csv"):
        assert (runs / "a" / file).read_bytes() == (runs / "b" / file).read_bytes()
    records = []
    for name in "ab":
        lines = (runs / name / "rounds.jsonl").read_text().splitlines()
        records.append([{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines])
    assert records[0] == records[1]


def test_a_run_from_python(raw_config: dict[str, Any], capsys: Capture) -> None:
    config = parse_config(raw_config)
    result = simulate(config)
    assert capsys.readouterr() == ("", "")
    assert result.directory.name == "test"
    assert [record.round for record in result.records] == [0, 1, 2]
    assert result.summary.last_accuracy == result.records[-1].accuracy
    with pytest.raises(UserError, match="exists already"):
        simulate(config)
    assert simulate(config, numbered=True).directory.name == "test-2"


def test_a_run_leaves_the_number_of_threads_alone(config_file: str) -> None:
    before = torch.get_num_threads()
    assert main([config_file, "rounds=0", f"threads={before + 1}"]) == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=full"],
        ["adapter.targets=[q, k, v, out, fc, proj]", "adapter.towers=[vision]", "adapter.layers=[-1]"],
        ["backbone.precision=bf16"],
        ["partition=iid", "clients.number=48", "clients.cohort.number=1"],
        ["clients.holdout_fraction=0", "local.optimizer=sgd", "local.objective=contrastive"],
        ["data.num_classes=2"],
        ["prompts.templates=['{}', 'a {}']", "prompts.class_names=[a, b, 'c {} {x} %s']"],
        ["local.batch_size=1000000", "evaluation.batch_size=1000000"],
        ["clients.per_block=9223372036854775807", "seed=9223372036854775807"],
        ["clients.cohort.fraction=1e-300", "local.clip_norm=1e-300", "local.learning_rate=1e-300"],
        ["local.optimizer_state=kept", "local.schedule=cosine", "local.schedule.warmup_rounds=9223372036854775807"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_odd_but_possible_runs(config_file: str, overrides: list[str]) -> None:
    assert main([config_file, *overrides]) == 0


# --check and --list


def test_check_takes_several_files(
    config_file: str, runs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    files = [*EXPERIMENTS, config_file]
    assert main(["--check", *files]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"{path}: ok" for path in files]
    assert captured.err == ""
    assert not runs.exists()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: Path(path).stem)
def test_every_experiment_is_valid_and_says_what_it_is_for(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--check", path]) == 0
    first, second = Path(path).read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith("# make ") or "python -m flora.simulate" in second


def test_check_finds_what_is_wrong(config_file: str, tmp_path: Path, capsys: Capture) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(Path(config_file).read_text().replace("rank: 2", "rank: 99"))
    assert main(["--check", config_file, str(wrong)]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"{config_file}: ok\n"
    assert captured.err.startswith(f"{wrong}: adapter.rank: expected at most the width of the text tower of ")
    assert captured.err.endswith(", 32, got 99\n")
    assert captured.err.count("\n") == 1


def test_check_loads_neither_model_nor_data(config_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "built", None)
    assert main(["--check", config_file, "data={name: image_folder, root: nowhere}"]) == 0


def test_list(capsys: Capture) -> None:
    assert main(["--list"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "PARTITIONER: " in captured.out
    assert "  fedavg: " in captured.out


# What users get wrong


def test_arguments_that_make_no_sense(config_file: str, refused: Callable[..., str]) -> None:
    assert refused() == "expected a config file, such as quickstart; see --help"
    assert refused("--check") == "expected a config file, such as quickstart; see --help"
    assert refused("rounds=3") == "expected a config file, such as quickstart; see --help"
    one = "expected one config file, then key=value with quotes around spaces, got"
    assert refused(config_file, "rounds") == f"{one} {config_file!r}, 'rounds'; see --help"
    assert refused("a", "adapter={name:", "lora,", "rank:", "2}") == f"{one} 'a', 'lora,', 'rank:', ...; see --help"
    assert refused(config_file, "--rounds=3") == "unrecognized arguments: --rounds=3; see --help"
    assert refused("--chekc", config_file) == "unrecognized arguments: --chekc; see --help"
    assert refused(config_file, "=3") == "command line: expected key=value with a dotted key, got '=3'"
    assert refused(config_file, "rounds=[").startswith("command line: rounds: not valid YAML: ")
    assert refused(config_file, "roundz=3") == "command line: roundz: unknown key; did you mean 'rounds'?"


def test_a_missing_file(config_file: str, refused: Callable[..., str], tmp_path: Path) -> None:
    missing = str(tmp_path / "mien.yaml")
    assert refused(missing) == f"{missing}: No such file or directory; did you mean '{config_file}'?"


def test_a_value_longer_than_any_file_name(config_file: str, refused: Callable[..., str]) -> None:
    assert refused(config_file, "rounds=" + "9" * 9000).startswith("command line: rounds: not valid YAML: Exceeds")
    assert "File name too long" in refused(config_file, "name=" + "n" * 300)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.model=ViT-B-23"], "backbone.model: 'ViT-B-23' is not known; did you mean 'ViT-B-32'?"),
        (["backbone.model=RN50"], "backbone.model: RN50 has a ResNet vision tower, which is not supported; "),
        (["backbone.weights=null"], "backbone.weights: needed: a pretrained tag, a .safetensors file or `random`"),
        (["backbone.weights=gone.safetensors"], "backbone.weights: 'gone.safetensors' is neither a file nor a tag of "),
        (["adapter.rank=33"], "adapter.rank: expected at most the width of the text tower of "),
        (["adapter.layers=[2]"], "adapter.layers: expected blocks from -2 to 1 (2 in the tower), got 2"),
        (["adapter=full", "clients.per_block=3"], "clients.per_block: expected at most 1 with this adapter, got 3"),
        (["clients.number=61"], "clients.number: expected 1 to 60 (the training examples), got 61"),
        (["clients.number=1000000"], "clients.number: expected 1 to 60 (the training examples), got 1000000"),
        (["clients.number=50", "partition.minimum_examples=0"], "partition: "),
        (["clients.number=50", "partition.minimum_examples=0", "local.steps=2"], "partition: "),
        (["clients.number=50", "partition.minimum_examples=0", "clients.cohort=by_size"], "partition: "),
        (["clients.cohort.number=5"], "clients.cohort.number: expected at most the number of clients, 4, got 5"),
        (
            ["evaluation.num_local_only=5"],
            "evaluation.num_local_only: expected at most 4, the clients there are, got 5",
        ),
        (
            ["partition=pathological", "partition.classes_per_client=4"],
            "partition.classes_per_client: expected at most ",
        ),
        (["partition={name: shards, shards_per_client: 99}"], "partition.shards_per_client: "),
        (["partition=natural"], "partition: the data name no clients, which natural needs; "),
        (["data.num_classes=61"], "data: class 'thing 60' has no training image: "),
        (["data={name: eurosat, root: /nowhere}"], "data.root: /nowhere: EuroSAT is not there; expected /nowhere/"),
        (
            ["data={name: image_folder, root: /nowhere}"],
            "data.root: /nowhere: no such folder; expected /nowhere/CLASS/",
        ),
        (["data={name: image_folder, root: ~nobody9/x}"], "data.root: ~nobody9/x: no such folder; "),
        (["data={name: csv, path: /nowhere.csv}"], "data.path: /nowhere.csv: No such file or directory"),
        (["prompts.class_names=[a, b]"], "prompts.class_names: expected 3 names, one a class, got 2"),
        (["prompts.class_names.thing 7=b"], "prompts.class_names: no class is called 'thing 7'; expected any of "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_cannot_be_met(
    config_file: str, refused: Callable[..., str], overrides: list[str], message: str
) -> None:
    assert refused(config_file, *overrides).startswith(f"{config_file}: {message}")


def test_cuda_where_there_is_none(
    config_file: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = "was asked for, but there is no CUDA device here; expected auto or cpu"
    assert refused(config_file, "device=cuda") == f"{config_file}: device: cuda {message}"
    assert refused(config_file, "device=cuda:7") == f"{config_file}: device: cuda:7 {message}"
    assert main([config_file, "rounds=0", "device=auto"]) == 0


def test_weights_of_another_model(
    config_file: str, refused: Callable[..., str], tmp_path: Path, tiny_model: str
) -> None:
    state = load_clip(tiny_model).model.state_dict()
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({**state, "visual.proj": torch.zeros(5, 5)}, path)
    message = refused(config_file, f"backbone.weights={path}")
    assert message.startswith(f"{config_file}: backbone.weights: {path} doesn't fit the model: ")
    safetensors.torch.save_file({**state, "visual.proj": state["visual.proj"] * torch.nan}, path)
    assert "round 0: loss not finite: " in refused(config_file, f"backbone.weights={path}")
    torch.save(state, tmp_path / "w.pt")
    message = refused(config_file, f"backbone.weights={tmp_path / 'w.pt'}")
    assert "only .safetensors files are read (pickled weights can run code)" in message


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six images of each of two classes; one file of the first class is none."""
    root = tmp_path / "images"
    for place, name in enumerate(("cat", "dog {x}")):
        (root / name).mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", (20, 30), (40 * index, 200 * place, 0)).save(root / name / f"{index}.png")
    (root / "cat" / "6.png").write_text("no image")
    return root


def test_an_image_that_cannot_be_read_is_an_error(
    config_file: str, refused: Callable[..., str], image_folder: Path
) -> None:
    bad = image_folder / "cat" / "6.png"
    data = f"data={{name: image_folder, root: {image_folder}}}"
    message = refused(config_file, data, "partition=iid", "clients.number=2")
    assert message.startswith(f"{config_file}: {bad}: can't be read as an image: ")
    assert message.endswith("set data.unreadable=skip to leave such images out")
    bad.rename(image_folder / "cat" / "6\n.png")
    assert "6 .png: can't be read" in refused(config_file, data, "partition=iid", "clients.number=2")


def test_an_image_that_cannot_be_read_is_skipped_on_request(
    config_file: str, image_folder: Path, runs: Path, capsys: Capture
) -> None:
    data = f"data={{name: image_folder, root: {image_folder}, unreadable: skip}}"
    assert main([config_file, data, "partition=iid", "clients.number=2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out: " in line]
    assert len(lines) == 2
    assert lines[0].endswith(" images can't be read")
    assert lines[0].startswith("left out: 1 of ")
    assert lines[1].startswith(f"left out: {image_folder / 'cat' / '6.png'}: can't be read as an image: ")
    assert lines[1] in (runs / "mine" / "log.txt").read_text()
    partition = json.loads((runs / "mine" / "partition.json").read_text())
    summary = json.loads((runs / "mine" / "summary.json").read_text())
    assert partition["class_names"] == ["cat", "dog {x}"]
    assert summary["num_clients"] == 2
    assert summary["num_unreadable"] == 1


def test_a_class_without_a_readable_image(config_file: str, refused: Callable[..., str], image_folder: Path) -> None:
    for path in (image_folder / "cat").iterdir():
        path.write_text("no image")
    data = f"data={{name: image_folder, root: {image_folder}, unreadable: skip}}"
    message = refused(config_file, data, "partition=iid", "clients.number=2")
    assert message.startswith(f"{config_file}: data: class 'cat' has no training image: ")


def test_a_link_back_to_its_own_folder_is_not_followed(config_file: str, image_folder: Path, capsys: Capture) -> None:
    (image_folder / "cat" / "6.png").unlink()
    (image_folder / "cat" / "loop").symlink_to(image_folder)
    (image_folder / "cat" / "self").symlink_to(image_folder / "cat")
    data = f"data={{name: image_folder, root: {image_folder}}}"
    assert main([config_file, data, "partition=iid", "clients.number=2", "rounds=0"]) == 0
    assert "10 training and 2 test images, 2 classes" in capsys.readouterr().err


def test_an_output_that_is_no_folder(config_file: str, refused: Callable[..., str]) -> None:
    for output in (config_file, f"{config_file}/below", "/dev/null"):
        message = refused(config_file, f"output={output}")
        assert message.startswith(f"{config_file}: output: {output}")


def test_a_read_only_output(config_file: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert refused(config_file).endswith("/mine can't be made: Read-only file system")


@pytest.mark.parametrize("file", ["config.yaml", "partition.json", "rounds.jsonl", "log.txt"])
def test_a_disk_that_is_full_from_the_start(
    config_file: str, refused: Callable[..., str], runs: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    real_open = Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name in (file, f"{file}.part"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    expected = f"{config_file}: {runs / 'mine' / file}: can't be written: No space left on device"
    assert refused(config_file) == expected


def test_a_disk_that_is_full_at_the_end(
    config_file: str, refused: Callable[..., str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "adapter.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    message = refused(config_file, left=["mine"])
    assert message.endswith("/mine/adapter.safetensors: can't be written: No space left on device")
    # What was measured stays; nothing is half-written and there is no summary of a run that did not finish.
    assert names(runs / "mine") == [
        "checkpoints", "clients.csv", "config.yaml", "confusion.csv", "environment.json", "examples.csv",
        "log.txt", "partition.json",
        "prompts.json", "reliability.csv", "rounds.jsonl",
    ]  # fmt: skip


def test_a_client_that_diverges(config_file: str, refused: Callable[..., str], runs: Path) -> None:
    message = refused(config_file, "local.learning_rate=1e30", "local.optimizer=sgd", "rounds=5", left=["mine"])
    assert "; lower local.learning_rate or set local.clip_norm" in message or "not finite" in message
    for line in (runs / "mine" / "rounds.jsonl").read_text().splitlines():
        json.loads(line)


def test_memory_that_runs_out(config_file: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise MemoryError("Unable to allocate 7.3 TiB")

    monkeypatch.setattr(program, "built", fail)
    assert refused(config_file).startswith(f"{config_file}: out of memory: Unable to allocate 7.3 TiB; ")


def test_an_interrupt(config_file: str, runs: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "built", interrupt)
    assert main([config_file]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert names(runs) == []


def test_a_defect_of_ours_is_not_hidden(config_file: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(program, "built", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main([config_file])
    assert names(runs) == []


# The same from Python


def test_a_bad_config_from_python_makes_no_folder(raw_config: dict[str, Any], runs: Path) -> None:
    config = parse_config(raw_config)
    with pytest.raises(UserError, match="num_local_only"):
        simulate(dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, num_local_only=9)))
    wrong = copy.deepcopy(raw_config)
    wrong["clients"]["number"] = 100
    with pytest.raises(UserError, match=r"clients\.number"):
        simulate(parse_config(wrong))
    assert names(runs) == []


# The real thing


def test_the_program_in_a_process_of_its_own() -> None:
    """A mistake ends in status 2 and one line; a reader of --list that has seen enough is no mistake."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flora.simulate"]
    wrong = subprocess.run(
        [*command, "experiments/nowhere.yaml"], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("experiments/nowhere.yaml: No such file or directory")
    assert wrong.stderr.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    piped = subprocess.run(
        [*command, "--list"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, timeout=120
    )
    os.close(writer)
    assert piped.stderr == ""
