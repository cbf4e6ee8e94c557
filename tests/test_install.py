"""The package as people install it: a wheel, in an environment without the clone."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

import flora

ROOT = Path(__file__).parents[1]
# What a wheel is built of. Setuptools would leave its own folders in the clone.
SOURCES = ("flora", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that knows nothing of the clone; return what it prints."""
    hidden = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed} to build a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        (folder / name).symlink_to(ROOT / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", "dist"]
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=folder)
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    assert wheel.name == f"flora_clip-{flora.__version__}-py3-none-any.whl"
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "flora").rglob("*") if path.is_file()}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("flora/")}
    assert found == {name for name in files if "__pycache__" not in name}


def test_an_installed_wheel_runs_the_quickstart_anywhere(wheel: Path, tmp_path: Path) -> None:
    """What it requires is taken from this environment, so that nothing is downloaded."""
    environment, folder = tmp_path / "venv", tmp_path / "anywhere"
    folder.mkdir()
    venv.create(environment, with_pip=False)
    python, program = environment / "bin/python", environment / "bin/flora"
    install = [sys.executable, "-m", "pip", "--python", python, "install"]
    run(*install, "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A line of a .pth file adds a folder, but not what the .pth files in it add, such as the clone.
    Path(packages, "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import flora; print(flora.__file__)", cwd=folder)
    assert where.startswith(packages)
    assert run(program, "--version", cwd=folder) == f"flora-clip {flora.__version__}\n"
    said = run(program, "simulate", "quickstart", "rounds=1", "evaluation.num_local_only=0", cwd=folder)
    assert said.endswith("written to runs/quickstart\n")
    assert np.isfinite(json.loads((folder / "runs/quickstart/summary.json").read_text())["last_accuracy"])
    environment_json = json.loads((folder / "runs/quickstart/environment.json").read_text())
    assert environment_json["packages"]["flora-clip"] == flora.__version__


def test_the_version_is_in_the_changelog_and_nowhere_else_by_hand() -> None:
    assert f"\n## {flora.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    for name in ("setup.cfg", "pyproject.toml", "CITATION.cff", "README.md"):
        assert flora.__version__ not in (ROOT / name).read_text(), name


def test_the_citation_names_the_paper() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= content.keys()  # what the format requires
    assert all({"type", "title", "authors"} <= reference.keys() for reference in content["references"])
    assert content["references"][0]["identifiers"][0]["value"] == "arXiv:2404.15182"
