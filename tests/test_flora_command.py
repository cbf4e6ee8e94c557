"""`flora PROGRAM ...` and `python -m flora PROGRAM ...` do what `python -m flora.PROGRAM ...` does."""

from __future__ import annotations

import configparser
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from flora.__main__ import PROGRAMS, main

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
