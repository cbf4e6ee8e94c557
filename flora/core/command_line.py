"""What the command lines share: a parser, a user's own components, and an end in one line, whatever happens."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from flora.core.errors import UserError
from flora.core.interrupts import Interrupted

# The files that `--import` has brought into the program that runs, as they were named.
imported: list[str] = []
# What an error of the system says that has to do with a stream, not with a file.
_STREAM_ERRORS = (errno.ENOSPC, errno.EBADF, errno.EIO, errno.EFBIG, errno.EDQUOT)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; `--import` is understood by every program."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--import", dest="imports", action="append", default=[], metavar="FILE",
            help="a Python file of yours that registers components; may be given again",
        )  # fmt: skip

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The options of a command line, in any order; the files of `--import` are imported."""
        options = self.parse_intermixed_args(argv)
        for path in options.imports:
            import_components(path)
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def import_components(path: str) -> None:
    """Import a Python file, so that what it registers is known; under its own name, which processes to come find, too.

    Raises `UserError` if it can't be imported.
    """
    file = Path(path).resolve()
    if file.suffix != ".py" or not file.is_file() or not file.stem.isidentifier():
        raise UserError(f"--import: expected a Python file called name.py, got {path!r}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(file.stem)
    except Exception as error:
        raise UserError(f"--import: {path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if Path(module.__file__ or "").resolve() != file:
        raise UserError(f"--import: {path}: there is another module called {file.stem}; rename the file")
    if path not in imported:
        imported.append(path)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths and overrides: what has a `=` and is no existing file is an override."""
    paths = [argument for argument in arguments if "=" not in argument or os.path.exists(argument)]
    return paths, [argument for argument in arguments if argument not in paths]


def end_quietly_while_importing() -> None:
    """Let Ctrl-C end the process in one line, with status 130, until `run_program` has taken over."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(128 + number)


def run_program(body: Callable[[], int]) -> int:
    """Return the exit status of `body`, and say in one line on standard error what ended it.

    0, 2 for anything the user can mend, 130 for Ctrl-C, 143 for SIGTERM, 141 if the reader of a pipe has gone. Text
    that a stream can't encode is escaped; what can't be written to standard error is left out.
    """
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with _forgiving_streams():
        try:
            status = body()
            sys.stdout.flush()
            return status
        except UserError as error:
            return _end(str(error), 2)
        except BrokenPipeError:  # the reader of `... | head` has gone
            _close(sys.stdout)
            return 141
        except KeyboardInterrupt:
            return _end("interrupted", 130)
        except Interrupted as interrupted:
            return _end(f"stopped by {interrupted}", interrupted.exit_status)
        except OSError as error:
            if error.filename is not None or error.errno not in _STREAM_ERRORS:
                raise
            _close(sys.stdout)
            return _end(f"standard output: {error.strerror}", 2)
        except Exception as error:
            reason = out_of_memory_reason(error)
            if reason is None:
                raise
            return _end(reason, 2)
        finally:
            imported.clear()


def out_of_memory_reason(error: Exception) -> str | None:
    """Return what to say of an error that means that the system gives no more memory or threads; None for others."""
    from flora.core.memory import is_out_of_memory  # PyTorch, which a usage error has no need of

    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return "the system allows no more threads (ulimit -u, or a container's limit)"
    if is_out_of_memory(error):
        return f"out of memory: {text or 'no memory left'}; lower clients.per_block or the batch sizes"
    return None


def _end(line: str, status: int) -> int:
    print(" ".join(line.splitlines()), file=sys.stderr)
    return status


def _close(stream: TextIO) -> None:
    """Let what is still in a stream's buffer go nowhere, so that Python's own last flush of it can't fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Forgiving:
    """A stream that loses what can't be written instead of ending the program."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            _close(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _close(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _forgiving_streams() -> Iterator[None]:
    """Standard output and error as they can be used whatever they are: closed, full, or unable to write a letter."""
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (closed below)
    try:
        for stream in before:
            if stream is not None and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        sys.stdout = nowhere if before[0] is None else before[0]
        sys.stderr = _Forgiving(nowhere if before[1] is None else before[1])
        yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
        nowhere.close()
