"""`python -m flora.report RUN [RUN ...]`: one page of a run, or of several side by side."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("report")  # what is imported from here on takes seconds

import sys
from collections.abc import Sequence
from pathlib import Path

from flora import catalogue  # noqa: F401  (registers the components)
from flora.core.command_line import run_program
from flora.core.errors import UserError
from flora.parsers import report_parser
from flora.report.page import PAGE_NAME, refuse_other_file, write_page
from flora.report.pictures import require_matplotlib
from flora.report.reading import RunFiles, is_run, read_files, runs_below

# Folders that an error names.
MAX_NAMED = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for anything that the user can mend."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = report_parser().parse(argv)
    paths: list[Path] = options.runs
    output = options.output or (paths[0] if len(paths) == 1 else Path()) / PAGE_NAME
    require_matplotlib()
    runs = list({run.path.resolve(): run for path in paths for run in _runs(path)}.values())
    refuse_other_file(output)
    write_page(runs, output)
    print(f"written to {output}")
    return 0


def _runs(path: Path) -> list[RunFiles]:
    """The run in a folder, or the finished ones among those below it, such as a sweep's; others are named."""
    below = [] if is_run(path) else runs_below(path)
    if not below:
        folders = [each for each in sorted(path.glob("*")) if runs_below(each)]
        if folders:
            names = ", ".join(map(str, folders[:MAX_NAMED])) + ", ..." * (len(folders) > MAX_NAMED)
            raise UserError(f"{path}: no runs in it, but in folders below it; name one of these, or several: {names}")
        return [read_files(path)]
    readable = []
    for each in below:
        try:
            readable.append(read_files(each))
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not readable:
        raise UserError(f"{path}: none of the {len(below)} runs in it can be shown")
    return readable


if __name__ == "__main__":
    sys.exit(main())
