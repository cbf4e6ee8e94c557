"""The command `flora`, also `python -m flora`: it runs the program that its first argument names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import flora
from flora.core.command_line import end_quietly_while_importing, run_program
from flora.parsers import understand

# Imported when they are asked for: PyTorch takes seconds, and help should not.
PROGRAMS = {
    "new": ("flora.new", "write a configuration to start from with images of your own"),
    "simulate": ("flora.simulate", "run an experiment, or go on with one"),
    "sweep": ("flora.sweep.__main__", "run every combination of some settings, and tabulate the results"),
    "report": ("flora.report.__main__", "show a run, or several side by side, as a page"),
    "predict": ("flora.predict", "say what a run's model makes of images"),
    "evaluate": ("flora.evaluate", "evaluate a run's model on another data set"),
    "audit": ("flora.audit.__main__", "attack a run: what it gives away of its clients and their examples"),
    "export": ("flora.export", "merge a run's adapter into its backbone, as a model that OpenCLIP loads"),
    "benchmark": ("flora.benchmark.__main__", "time a local step against the loops that others write"),
}
USAGE = "usage: flora PROGRAM ...\n\n" + "\n".join(f"  {name:<10} {about}" for name, (_, about) in PROGRAMS.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program that the first argument names on the others; return its exit status, 2 if there is none."""
    name, *arguments = [*(sys.argv[1:] if argv is None else argv)] or [""]
    if name in ("-h", "--help"):
        print(f"{USAGE}\n\nflora PROGRAM --help says more; flora --version says which this is")
        return 0
    if name == "--version":
        print(f"flora-clip {flora.__version__}")
        return 0
    if name not in PROGRAMS:
        found = repr(name) if name else "nothing"
        print(f"flora: expected one of {', '.join(PROGRAMS)}, got {found}; see --help", file=sys.stderr)
        return 2
    status = run_program(lambda: understand(name, arguments))
    if status == 0:
        end_quietly_while_importing()
        status = importlib.import_module(PROGRAMS[name][0]).main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
