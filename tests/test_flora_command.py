"""`flora PROGRAM ...` and `python -m flora PROGRAM ...` do what `python -m flora.PROGRAM ...` does."""

from __future__ import annotations

import configparser
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flora.__main__ import PROGRAMS, main
from flora.config.parse import load_config
from flora.core.command_line import end_quietly_while_importing, run_program

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_there(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    through_flora = capsys.readouterr().out
    with pytest.raises(SystemExit):
        importlib.import_module(PROGRAMS[name][0]).main(["--help"])
    assert capsys.readouterr().out == through_flora


def test_a_run_through_it(tmp_path: Path, capsys: Capture) -> None:
    assert main(["simulate", "--check", str(ROOT / "experiments/quickstart.yaml")]) == 0
    assert capsys.readouterr().out.endswith("quickstart.yaml: ok\n")
    assert main(["simulate", "--check", str(tmp_path / "nothing.yaml")]) == 2


USAGE_ERRORS = [
    ["simulate"],
    ["simulate", "--resume"],
    ["simulate", "x.yaml", "--accept-lost-records"],
    ["simulate", "x.yaml", "--chekc"],
    ["export", "runs/x"],
    ["predict", "runs/x"],
    ["predict", "runs/x", "a.jpg", "--top", "no"],
    ["evaluate"],
    ["audit"],
    ["audit", "runs/x", "--references", "3"],
    ["report"],
    ["simulate", "--list", "--live"],
    ["benchmark", "--batch", "many"],
]
HELP = [[name, "--help"] for name in PROGRAMS]


# `flora PROGRAM`, and `python -m flora.PROGRAM` as the docs write it.
STARTS = [
    "from flora.__main__ import main; status = main(sys.argv[1:])",
    "import runpy; runpy.run_module('flora.' + sys.argv.pop(1), run_name='__main__', alter_sys=True)",
]


@pytest.mark.parametrize("start", STARTS, ids=["command", "module"])
@pytest.mark.parametrize("arguments", [*USAGE_ERRORS, *HELP], ids=" ".join)
def test_help_and_usage_errors_of_programs_import_nothing_heavy(arguments: list[str], start: str) -> None:
    code = (
        f"import sys\ntry: {start}\n"
        "except SystemExit as ended: status = ended.code\n"
        "assert not {'torch', 'open_clip', 'numpy', 'yaml'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == (2 if arguments in USAGE_ERRORS else 0), done.stderr
    assert (done.stderr.count("\n") == 1) == (arguments in USAGE_ERRORS), done.stderr


@pytest.mark.parametrize("start", STARTS, ids=["command", "module"])
def test_ctrl_c_while_pytorch_is_imported_is_one_line(start: str) -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"signal.signal(signal.SIGINT, signal.default_int_handler)\n{start}\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "simulate", "experiments/quickstart.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_is_an_exception_again_when_a_program_runs(capsys: Capture) -> None:
    def interrupted() -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        end_quietly_while_importing()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert run_program(interrupted) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


HEAVY = {"torch", "torch._dynamo", "torchvision", "open_clip", "timm", "numpy"}
# What a command line needs of these, and its exit status.
CONFIGURATIONS = [
    (["simulate", "--list"], {"torch", "numpy"}, 0),
    (["simulate", "quickstart", "--check", "clients.numbr=3"], {"torch", "numpy"}, 2),
    (["sweep", "quickstart", "rounds=1,many"], {"torch", "numpy"}, 2),
    (["simulate", "nothing.yaml"], set(), 2),
    (["sweep", "nothing.yaml", "seed=0,1"], set(), 2),
]


@pytest.mark.parametrize(
    ("arguments", "needed", "status"), CONFIGURATIONS, ids=[" ".join(each[0]) for each in CONFIGURATIONS]
)
def test_reading_configurations_imports_no_more_than_it_needs(
    arguments: list[str], needed: set[str], status: int
) -> None:
    code = (
        f"import sys\ntry: {STARTS[1]}\n"
        "except SystemExit as ended: status = ended.code\n"
        f"assert {HEAVY} & set(sys.modules) == {needed or 'set()'}, set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert (done.stderr.count("\n") == 1) == (status == 2), done.stderr


def test_the_shipped_quickstart_needs_no_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "quickstart", "--check"]) == 0
    assert capsys.readouterr().out == "quickstart: ok\n"
    assert load_config("quickstart") == load_config(ROOT / "experiments/quickstart.yaml")
    assert main(["simulate", "quickstat", "--check"]) == 2
    assert main(["simulate", "quickstart", "rounds=1", "evaluation.num_local_only=0"]) == 0
    assert (tmp_path / "runs/quickstart/summary.json").is_file()


def test_the_packages_names_are_all_there() -> None:
    import flora

    assert all(getattr(flora, name).__name__ in (name, "resume") for name in flora.__all__)
    assert set(flora.__all__) <= set(dir(flora))
    with pytest.raises(AttributeError, match="no attribute 'simulate_all'"):
        _ = flora.simulate_all


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["-h"], 0), ([], 2), (["simulte"], 2)])
def test_help_and_mistakes_import_nothing_heavy(arguments: list[str], status: int) -> None:
    code = (
        "import sys; from flora.__main__ import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'open_clip', 'numpy', 'yaml'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    text = done.stdout if status == 0 else done.stderr
    assert all(name in text for name in PROGRAMS)
    assert (text.count("\n") == 1) == (status == 2)


def test_the_console_script_is_it() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options.entry_points"]["console_scripts"].strip() == "flora = flora.__main__:main"


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flora", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: flora PROGRAM ...")
