"""The command lines of all programs: what they take, and what they refuse before anything heavy is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flora.core.command_line import Parser, end_quietly_while_importing, run_program, split_arguments
from flora.core.errors import UserError

EXPORT = (
    "Merge a run's adapter into its backbone, as a model that OpenCLIP or transformers loads, or write the adapter "
    "alone, as PEFT loads it."
)
SWEEP = (
    "Run every combination of some settings, each once, and tabulate what came out. Finished runs are skipped and "
    "stopped ones gone on with, so a sweep can be stopped and started as often as one likes."
)
PREDICT = (
    "Say what a finished run's model makes of images: the most probable of its classes, or of any that are named, as "
    "its own evaluation predicts them."
)
NEW = (
    "Write a commented configuration to start from with images of your own, and say what images there are: classes, "
    "sizes, clients."
)
EVALUATE = (
    "Evaluate a finished run's model on another data set, or again on its own: on the test images, with the prompts of "
    "that data set's classes. The record is written to RUN/evaluations."
)
AUDIT = (
    "Attack a finished run: which examples its adapters were trained on, which clients took part, which classes a "
    "client holds, and what its canaries say of epsilon. The record is written to RUN/audits."
)
REPORT = (
    "Write one page of a finished run, or of several side by side: a file that opens from the disk in any browser. A "
    "folder of runs, such as a sweep's, stands for all finished ones in it."
)
BENCHMARK = (
    "Time a local step, from full fine-tuning to ours, as ratios within one run. Weights and images are random, because"
    " cost is what is measured. Each variant runs in a process of its own, the variants take turns, and the median of"
    " the repeats is shown."
)


def simulate_parser() -> Parser:
    """Return what `flora simulate` takes."""
    parser = Parser(
        prog="python -m flora.simulate",
        description="Federated adaptation of a frozen CLIP model, simulated in one process, or in several by torchrun.",
        epilog="example: python -m flora.simulate experiments/quickstart.yaml rounds=5 clients.number=20",
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG [key=value ...]", help="a YAML file, then overrides")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run whose directory is given in place of CONFIG"
    )
    parser.add_argument(
        "--accept-lost-records",
        action="store_true",
        help="with --resume: go on although lines of rounds.jsonl are damaged",
    )
    parser.add_argument("--report", action="store_true", help="write report.html into the run directory at the end")
    parser.add_argument("--live", action="store_true", help="write it anew after each round, too")
    parser.add_argument("--check", action="store_true", help="only validate one or more files; nothing is loaded")
    parser.add_argument("--list", action="store_true", help="print every component with its options")
    return parser


def check_simulate(options: argparse.Namespace) -> None:
    """Raise `UserError` if the arguments of `simulate` don't go together."""
    paths, _ = split_arguments(options.arguments)
    if (options.report or options.live) and (options.list or options.check):
        raise UserError("--report and --live are for a run; see --help")
    if options.list:
        return
    if options.accept_lost_records and not options.resume:
        raise UserError("--accept-lost-records belongs to --resume; see --help")
    if options.resume and len(paths) != 1:
        raise UserError(f"expected one run directory, got {len(paths)}; see --help")
    if not paths or (len(paths) > 1 and not options.check):
        if not paths:
            raise UserError("expected a config file, such as quickstart; see --help")
        found = ", ".join([*map(repr, paths[:3]), *(["..."] if len(paths) > 3 else [])])
        raise UserError(f"expected one config file, then key=value with quotes around spaces, got {found}; see --help")


def export_parser() -> Parser:
    """Return what `flora export` takes."""
    parser = Parser(
        prog="python -m flora.export",
        description=EXPORT,
        epilog="example, where the backbone was moved: "
        "python -m flora.export runs/mine adapted backbone.weights=/data/clip.safetensors",
    )
    parser.add_argument("run", type=Path, help="a finished run's folder, such as runs/quickstart")
    parser.add_argument(
        "path", type=Path, help="the folder to write, or a file that ends in .safetensors; it must not exist"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="where the backbone is now, if it was moved"
    )
    parser.add_argument("--client", help="take the own adapter of this client (name or id) in place of the server's")
    parser.add_argument(
        "--to",
        choices=("openclip", "peft", "huggingface"),
        default="openclip",
        help="a merged model for OpenCLIP (the default), the adapter for PEFT on a CLIPModel of transformers, or such "
        "a model with the adapter merged in",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="type of the numbers (default: fp32)"
    )
    return parser


def predict_parser() -> Parser:
    """Return what `flora predict` takes."""
    parser = Parser(
        prog="python -m flora.predict",
        description=PREDICT,
        epilog="example: python -m flora.predict runs/own_images photo.jpg --classes cat,dog,tractor",
    )
    parser.add_argument("run", type=Path, help="a finished run's folder, such as runs/own_images")
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="IMAGE_OR_FOLDER [key=value]",
        help="images, or folders with images anywhere below; settings of the run that say where things are now",
    )
    parser.add_argument("--client", help="use the own adapter of this client (name or id) in place of the server's")
    parser.add_argument("--top", type=_count, default=3, help="classes shown of each image (default: %(default)s)")
    parser.add_argument(
        "--classes", help="other classes than the run's: a list with commas, or a text file with a line for each"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    return parser


def new_parser() -> Parser:
    """Return what `flora new` takes."""
    parser = Parser(
        prog="python -m flora.new", description=NEW, epilog="example: python -m flora.new my.yaml --data photos"
    )
    parser.add_argument("file", type=Path, help="the configuration to write, such as my.yaml")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="a folder with a folder of images for each class, or a CSV file (default: images, if it is there)",
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there already")
    return parser


def evaluate_parser() -> Parser:
    """Return what `flora evaluate` takes."""
    parser = Parser(
        prog="python -m flora.evaluate",
        description=EVALUATE,
        epilog="example: python -m flora.evaluate runs/mine data=dtd data.root=/data",
    )
    parser.add_argument("run", type=Path, help="a finished run's folder, such as runs/quickstart")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="the data (data=...), its split, its prompts"
    )
    parser.add_argument("--client", help="use the own adapter of this client (name or id) in place of the server's")
    parser.add_argument("--name", help="of the record in RUN/evaluations (default: the data set's, and a number)")
    return parser


ATTACKS = ("membership", "clients", "updates", "canaries")


def audit_parser() -> Parser:
    """Return what `flora audit` takes."""
    parser = Parser(
        prog="python -m flora.audit", description=AUDIT, epilog="example: python -m flora.audit runs/quickstart"
    )
    parser.add_argument("run", type=Path, help="a finished run's folder, such as runs/quickstart")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="where data and backbone are now")
    parser.add_argument(
        "--references",
        type=_even,
        default=8,
        metavar="N",
        help="runs with half of the examples, or of the clients, that the likelihood ratio attacks compare with: an "
        "even number; 0: no such attack (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=_counts,
        metavar="N,N,...",
        help="the rounds whose adapters and updates are attacked (default: the last, and all that checkpoints have)",
    )
    parser.add_argument(
        "--examples", type=_count, default=10_000, help="of clients that are attacked at most (default: %(default)s)"
    )
    parser.add_argument(
        "--only", type=_attacks, default=ATTACKS, metavar="ATTACK,...", help=f"some of {', '.join(ATTACKS)}"
    )
    parser.add_argument(
        "--delta",
        type=_share,
        help="that the canaries' epsilon goes with (default: that of the run's guarantee, or 1e-5)",
    )
    parser.add_argument("--name", help="of the record in RUN/audits (default: audit, and a number)")
    return parser


def _attacks(text: str) -> tuple[str, ...]:
    """Names of attacks, with commas between them. Raises `ArgumentTypeError` for another text."""
    names = tuple(text.split(","))
    for name in names:
        if name not in ATTACKS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(ATTACKS)}, got {name!r}")
    return names


def _even(text: str) -> int:
    """An even number, 0 included. Raises `ArgumentTypeError` for another text."""
    if not text.isdecimal() or int(text) % 2:
        raise argparse.ArgumentTypeError(f"expected an even number, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    """Whole numbers above 0, with commas between them. Raises `ArgumentTypeError` for another text."""
    return sorted({_count(part) for part in text.split(",")})


def _share(text: str) -> float:
    """A number of at least 0 and below 1. Raises `ArgumentTypeError` for another text."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a number at least 0 and below 1, got {text!r}")
    return number


def _count(text: str) -> int:
    """A whole number above 0. Raises `ArgumentTypeError` for another text."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def sweep_parser() -> Parser:
    """Return what `flora sweep` takes."""
    parser = Parser(prog="python -m flora.sweep", description=SWEEP)
    parser.add_argument("arguments", nargs="*", metavar="CONFIG ... key=v1,v2 ...", help="YAML files, then the grid")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"), help="the sweep's folder (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="for all runs, and no part of their names"
    )
    parser.add_argument("--jobs", default="1", help="runs at once, sharing the CPU's cores (%(default)s)")
    parser.add_argument(
        "--fold",
        default="auto",
        metavar="auto|off|N",
        help="how many runs train together in one process, where they can share their steps (%(default)s)",
    )
    parser.add_argument("--reference", help="the method that the ratios refer to (full, if there is one)")
    parser.add_argument(
        "--choose",
        metavar="KEY",
        help="a swept key: write to chosen.json which value is best on validation images, for each method and data set",
    )
    parser.add_argument(
        "--skip-refused", action="store_true", help="leave out, and name, what the rules of combinations refuse"
    )
    parser.add_argument(
        "--chosen", type=Path, metavar="FILE", help="set what such searches have chosen; with --choose: add to the file"
    )
    return parser


def report_parser() -> Parser:
    """Return what `flora report` takes."""
    parser = Parser(
        prog="python -m flora.report",
        description=REPORT,
        epilog="example: python -m flora.report runs/quickstart",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a finished run's folder, or a sweep's")
    parser.add_argument(
        "--output", type=Path, help="the file to write (report.html in the folder; of several, where you are)"
    )
    return parser


def benchmark_parser() -> Parser:
    """Return what `flora benchmark` takes."""
    parser = Parser(prog="python -m flora.benchmark", description=BENCHMARK)
    parser.add_argument("--model", help="OpenCLIP name or JSON config (default: ViT-B-16; --images: three)")
    parser.add_argument("--classes", type=int, default=10, help="number of classes, 1 to 100 (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="images in a step (default: 32; 8 with --tokens)")
    parser.add_argument("--clients", type=int, default=32, help="clients in a block (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: %(default)s)")
    parser.add_argument("--tower", choices=("text", "vision"), default="text", help="the adapted one (default: text)")
    parser.add_argument("--layers", type=int, default=0, help="adapt the last N blocks only (default: all)")
    parser.add_argument("--targets", default="q,v", help="adapted matrices (default: %(default)s)")
    parser.add_argument("--objective", choices=("cross_entropy", "contrastive"), default="cross_entropy")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp64"), help="(default: fp32; --images: and bf16)")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each variant (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of client-rounds in each process (default: %(default)s)"
    )
    parser.add_argument(
        "--variants", help="comma-separated names of variants, such as full,naive,ours (default: all but private)"
    )
    parser.add_argument("--json", type=Path, help="write every measurement to this file, too")
    _add_other_comparisons(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def _add_other_comparisons(parser: Parser) -> None:
    """Add what `flora benchmark` measures in place of the variants of a step."""
    parser.add_argument("--whole", action="store_true", help="time a whole small experiment instead")
    parser.add_argument(
        "--tokens",
        metavar="R,R,...",
        help="compare numbers of patches that each block of the vision tower merges instead",
    )
    parser.add_argument(
        "--images",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="time the first pass over a folder's JPEG files (none: some are made) against OpenCLIP's encode_image "
        "instead",
    )
    parser.add_argument("--profile", metavar="CONFIG", help="show where the time of a round of an experiment goes")
    parser.add_argument("--sweep", metavar="CONFIG", help="time a sweep's runs one after another, and together")
    parser.add_argument(
        "--processes", metavar="CONFIG", help="compare a process on each core with one process on all of them instead"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="CONFIG",
        help="compare a local step of each experiment with the loop that its method's authors write instead",
    )
    parser.add_argument("--secure-sums", metavar="N,N,...", help="time secure sums over so many clients instead")
    parser.add_argument("--planning", action="store_true", help="plan rounds of a million virtual clients instead")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="of the experiment that CONFIG names; --sweep's grid",
    )


def understand(program: str, arguments: Sequence[str]) -> int:
    """Return 0, or raise `UserError` if a program does not understand its arguments; --help prints it and exits."""
    options = PARSERS[program]().parse_intermixed_args(arguments)
    if program == "simulate":
        check_simulate(options)
    if program in ("simulate", "sweep"):
        _check_file(options)
    return 0


def _check_file(options: argparse.Namespace) -> None:
    """Raise `UserError` if the one config file of a command line is not there, or no YAML."""
    from flora.config.plain_yaml import read_yaml, shipped  # which --help has no need of

    paths, _ = split_arguments(options.arguments)
    if len(paths) == 1 and not getattr(options, "resume", False) and not getattr(options, "list", False):
        read_yaml(shipped(Path(paths[0])))


def first_look(program: str) -> None:
    """Answer --help, and end with 2 for arguments that a program does not understand, before it imports PyTorch."""
    status = run_program(lambda: understand(program, sys.argv[1:]))
    if status:
        sys.exit(status)
    end_quietly_while_importing()


PARSERS: dict[str, Callable[[], Parser]] = {
    "new": new_parser,
    "simulate": simulate_parser,
    "sweep": sweep_parser,
    "predict": predict_parser,
    "evaluate": evaluate_parser,
    "audit": audit_parser,
    "report": report_parser,
    "export": export_parser,
    "benchmark": benchmark_parser,
}
