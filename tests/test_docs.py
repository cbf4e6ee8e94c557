"""Every command that the documents show is understood by the program that it is for."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flora import evaluate, export, new, predict, simulate
from flora.audit import __main__ as audit
from flora.benchmark import __main__ as benchmark
from flora.config.parse import load_config
from flora.core import command_line
from flora.evaluation import metrics
from flora.report import __main__ as report
from flora.report.reading import RunFiles
from flora.runs.finished import Classes, FinishedRun
from flora.sweep import __main__ as sweep

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PROGRAM = r"(\.venv/bin/)?(python|torchrun( --\S+)*) -m flora"
EXPERIMENTS = sorted(path for path in (ROOT / "experiments").rglob("*.yaml") if path.parent.name != "descriptions")


def commands(text: str) -> Iterator[str]:
    """The command lines of a Markdown page: lines of its code blocks, and inline code that runs one of the modules."""
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(rf"{PROGRAM}|make ", line.strip()):
                yield line.strip()
    for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(rf"{PROGRAM}|make [a-z]", code):
            yield " ".join(code.split())


def arguments_of(command: str) -> tuple[str, list[str]]:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        return words[0], words[1:]
    start = words.index("-m") + 1
    return words[start], words[start + 1 :]


SHOWN = sorted({command for page in PAGES for command in commands(page.read_text())})
FLORA = [command for command in SHOWN if not command.startswith("make") and "..." not in command]
MAKE = [command for command in SHOWN if command.startswith("make")]


def test_there_are_commands() -> None:
    assert len(FLORA) > 10
    assert len(MAKE) > 5


def write_files(text: str, folder: Path) -> None:
    """The Python files that a page shows: code blocks whose first line is `# name.py`."""
    for name, content in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.DOTALL):
        (folder / name).write_text(content)


@pytest.fixture(autouse=True)
def metrics_of_this_file_alone() -> Iterator[None]:
    """Forget the metrics that the pages' files declare."""
    known = (metrics.METRICS, metrics.COMPUTED, metrics.FIGURES)
    before: list[dict[str, Any]] = [dict(each) for each in known]
    yield
    for each, were in zip(known, before, strict=True):
        each.clear()
        each.update(were)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A newcomer's working directory: the experiments, and the files that the pages show."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for page in PAGES:
        write_files(page.read_text(), tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "imported", [])
    # Files of the same names lie in other tests' folders.
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [path.stem for path in tmp_path.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.fixture
def understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Programs that stop where they would begin to work; what they have understood."""
    seen: list[Any] = []
    unmeasured = benchmark.Measurements({}, [])

    def check(path: str, overrides: list[str], extras: object, **options: Any) -> None:
        if not options["resuming"]:
            assert simulate.main(["--check", path, *overrides]) == 0
        seen.append(path)

    def merged(*arguments: Any) -> export.MergedModel:
        seen.append(arguments)
        return export.MergedModel("tiny", {"weight": torch.zeros(2)}, {}, {})

    def finished(path: Path, overrides: list[str]) -> FinishedRun:
        return FinishedRun(path, load_config(ROOT / "experiments/quickstart.yaml", overrides), {})

    def evaluated(run: FinishedRun, client: str | None) -> dict[str, Any]:
        seen.append(run)
        figures = {"accuracy": 0.5}
        return {"num_images": 1, "class_names": [], "zero_shot": figures, "metrics": figures}

    for program in (predict, evaluate, export):
        monkeypatch.setattr(program, "read_run", finished)
    monkeypatch.setattr(FinishedRun, "classes", lambda run: Classes(("a", "b"), (), {}))
    monkeypatch.setattr(predict, "image_files", lambda paths: paths)
    monkeypatch.setattr(predict, "_answers", lambda *arguments: seen.append(arguments) or iter(()))  # type: ignore[func-returns-value]
    monkeypatch.setattr(evaluate, "evaluated", evaluated)
    monkeypatch.setattr(evaluate, "write_json", lambda folder, name, *arguments, **options: folder / name)
    monkeypatch.setattr(audit, "audited", lambda *arguments, **options: seen.append(arguments))
    monkeypatch.setattr(audit, "audit", lambda *arguments: {"guarantee": {}})
    monkeypatch.setattr(audit, "write_json", lambda folder, name, *arguments, **options: folder / name)
    monkeypatch.setattr(export, "peft_adapter", lambda *arguments: seen.append(arguments) or {})  # type: ignore[func-returns-value]
    monkeypatch.setattr(export, "huggingface_files", lambda *arguments: {})
    monkeypatch.setattr(new, "look", lambda path: seen.append(path))
    monkeypatch.setattr(report, "read_files", lambda path: RunFiles(path, {}, None, (), {}))
    monkeypatch.setattr(report, "write_page", lambda *arguments: seen.append(arguments))
    monkeypatch.setattr(simulate, "_run_one", check)
    monkeypatch.setattr(sweep, "run_all", lambda runs, *arguments, **options: seen.append(runs))
    monkeypatch.setattr(export, "merged_model", merged)
    monkeypatch.setattr(
        benchmark, "run_variants", lambda setting, *arguments, **options: seen.append(setting) or unmeasured
    )  # type: ignore[func-returns-value]
    monkeypatch.setattr(benchmark, "compare_experiments", lambda setting, **options: seen.append(setting))
    monkeypatch.setattr(benchmark, "profile_round", lambda *arguments: seen.append(arguments) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(benchmark, "compare_processes", lambda *arguments: seen.append(arguments) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(benchmark, "compare_methods", lambda *arguments: seen.append(arguments) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(benchmark, "compare_sweeps", lambda *arguments: seen.append(arguments) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(benchmark, "compare_secure_sums", lambda numbers: seen.append(numbers) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(benchmark, "compare_planning", lambda setting: seen.append(setting) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(
        benchmark, "compare_images", lambda settings, *arguments, **options: seen.append(settings) or []
    )  # type: ignore[func-returns-value]
    return seen


def understand(command: str, seen: list[Any]) -> None:
    name, arguments = arguments_of(command)
    programs = {"new": new, "predict": predict, "evaluate": evaluate, "export": export, "audit": audit}
    programs |= {"simulate": simulate, "sweep": sweep, "benchmark": benchmark, "report": report}
    program = programs[name.split(".")[1]]
    with_placeholders = {"RUN": "runs/mine", "FOLDER": "adapted", "NAME": "7"}
    expanded = [
        found for each in arguments for found in (sorted(map(str, Path().glob(each))) if "*" in each else [each])
    ]
    assert program.main([with_placeholders.get(each, each) for each in expanded]) == 0  # type: ignore[attr-defined]
    assert seen or arguments[0] in ("--list", "--help")


def without_the_maker_s_files(command: str) -> str:
    """The tables' commands name a model and data of those who made them: here others stand for them."""
    for found, instead in (
        ("../shared/weights/ViT-Ti-8-48.json", "quickstart"),
        ("../shared/weights/ViT-Ti-8-48.safetensors", "builtin"),
    ):
        command = command.replace(found, instead)
    return command


@pytest.mark.parametrize("command", FLORA)
def test_every_command_is_understood(command: str, understood: list[Any]) -> None:
    understand(without_the_maker_s_files(command), understood)


@pytest.mark.parametrize("command", MAKE)
def test_every_make_command_is_understood(command: str, understood: list[Any]) -> None:
    """`make --dry-run` says what would be run; that is then looked at as the others are."""
    command = without_the_maker_s_files(command)
    done = subprocess.run(
        ["make", "--dry-run", *shlex.split(command, comments=True)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.replace("\\\n", " ").splitlines():
        if re.match(r"\.venv/bin/python -m flora\.", line):
            understand(line, understood)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_yaml_block_is_a_valid_configuration(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        assert simulate.main(["--check", str(path)]) == 0


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [*PAGES, ROOT / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_modules_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"`(flora(?:\.[a-z_]+)+)(?:\.[A-Z]\w*)?(?:\(\w*\))?`", text):
        parts = module.split(".")
        assert any((ROOT / "/".join(parts[:n])).with_suffix(".py").exists() or (ROOT / "/".join(parts)).is_dir()
                   for n in (len(parts), len(parts) - 1)), module  # fmt: skip
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", text)) - {"test_accuracy", "test_fraction"}:  # a column, an option
        assert f"def {name}(" in tests, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


EXTENSIONS = [
    command for command in commands((ROOT / "docs/extending.md").read_text()) if "flora.simulate experiments" in command
]


@pytest.mark.parametrize("command", sorted(set(EXTENSIONS)))
def test_the_examples_of_extensions_run(command: str, folder: Path, tiny_model: str) -> None:
    small = ["rounds=1", f"backbone.model={tiny_model}", "backbone.weights=random"]
    _, arguments = arguments_of(command)
    assert simulate.main([*arguments, *small]) == 0
    assert (folder / "runs" / "quickstart" / "summary.json").is_file()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_need_nothing_but_what_is_here_or_can_be_downloaded(path: Path) -> None:
    assert "../" not in path.read_text()


def test_the_folder_of_the_clone_may_be_the_working_directory_s_neighbour(tmp_path: Path) -> None:
    """From the folder that holds the clone, where Python takes the clone for a package without files of its own."""
    clone = tmp_path / "flora"
    clone.symlink_to(ROOT)
    command = [sys.executable, "-m", "flora.simulate", "--check", "flora/experiments/quickstart.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "flora/experiments/quickstart.yaml: ok\n"), done.stderr
