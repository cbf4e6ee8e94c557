"""The command line: `python -m flora.simulate CONFIG [key=value ...]`; from Python: `simulate(config)`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from flora import report, tree
from flora.config import ConfigError, ExperimentConfig, load_config
from flora.errors import UserError
from flora.experiment import Experiment, build_experiment, check_experiment
from flora.federated.evaluation import class_accuracy, client_accuracies, deciles, evaluate
from flora.federated.memory import peak_memory_bytes
from flora.federated.round import RoundResult, run_round, train_alone
from flora.listing import list_components
from flora.records import Evaluation, RoundRecord, ServerState, Summary
from flora.run_directory import RunDirectory
from flora.tree import State

# Unreadable images that are named on the terminal; log.txt names all.
MAX_SHOWN = 10


@dataclass(frozen=True, eq=False)
class RunResult:
    """What `simulate` returns: the summary, a record a round, the final adapter, and where it all was written."""

    summary: Summary
    records: tuple[RoundRecord, ...]
    adapter: State
    directory: Path


def simulate(
    config: ExperimentConfig, *, numbered: bool = False, echo: Callable[[str], object] | None = None
) -> RunResult:
    """Run an experiment into a new run directory.

    `numbered`: if a run of that name exists, use the first free of name-2, name-3, ...; else that is an error.
    `echo` is given the lines that go to the log. Raises `UserError` for anything that the user can mend; a directory
    in which not even round 0 was recorded is taken away again.
    """
    check_experiment(config)
    directory = RunDirectory.create(config.output, config.name, numbered=numbered)

    def log(line: str) -> None:
        directory.log(line)
        if echo is not None:
            echo(line)

    threads = torch.get_num_threads()
    try:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        started = time.perf_counter()
        experiment = build_experiment(config, progress=_progress, log=log)
        federation = experiment.federation
        for number, line in enumerate(experiment.unreadable):
            (log if number < MAX_SHOWN else directory.log)(f"left out: {line}")
        directory.write_start(
            config,
            device=federation.model.device,
            clients_per_block=federation.clients_per_block,
            clients=federation.clients,
            labels=federation.features.labels.cpu().numpy(),
            class_names=experiment.class_names,
        )
        result = _run(experiment, directory, started)
    except BaseException:
        directory.remove_if_nothing_ran()
        raise
    finally:
        torch.set_num_threads(threads)
    for line in report.lines(result.summary, config):
        directory.log(line)
    return result


def _run(experiment: Experiment, directory: RunDirectory, started: float) -> RunResult:
    config = experiment.config
    state = experiment.initial_state()
    records = [_measure(experiment, state, None)[0]]
    directory.append_round(records[0])
    clients = np.full(len(experiment.federation.clients), np.nan)
    with _bar("rounds", config.rounds, "round") as bar:
        for _ in range(config.rounds):
            state, result = run_round(experiment.federation, state)
            record, measured = _measure(experiment, state, result)
            clients = clients if measured is None else measured
            records.append(record)
            directory.append_round(record)
            bar.update()
            bar.set_postfix(_postfix(record, records))
    alone = _measure_alone(experiment, log=directory.log)
    directory.write_clients(_client_columns(experiment, clients, alone))
    directory.write_adapter(state.adapter, config)
    summary = report.summarise(
        records,
        name=directory.path.name,
        num_clients=len(experiment.federation.clients),
        alone=list(alone.values()),
        wall_seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory_bytes(experiment.federation.model.device),
        trainable_parameters=tree.count(state.adapter),
        backbone_parameters=experiment.backbone_parameters,
        num_unreadable=len(experiment.unreadable),
    )
    directory.write_summary(summary)
    return RunResult(summary, tuple(records), state.adapter, directory.path)


def _measure(
    experiment: Experiment, state: ServerState, result: RoundResult | None
) -> tuple[RoundRecord, np.ndarray | None]:
    """The record of the round that led to `state` (no result: round 0), evaluated if due; the clients' accuracies."""
    config, started = experiment.config.evaluation, time.perf_counter()
    due = state.round % config.every == 0 or state.round == experiment.config.rounds
    evaluation: Evaluation | None = None
    clients: np.ndarray | None = None
    if due:
        stack = tree.expand(state.adapter, 1)
        model, size = experiment.federation.model, config.batch_size
        evaluation = evaluate(model, stack, experiment.test, batch_size=size)[0]
        every = config.clients_every or experiment.config.rounds
        last = state.round == experiment.config.rounds
        if len(experiment.held_out) and (last or (state.round and state.round % every == 0)):
            own = evaluate(model, stack, experiment.held_out, batch_size=size)[0]
            clients = client_accuracies(own, experiment.held_out_sizes)
    tenths = None if clients is None else deciles(clients)
    seconds = time.perf_counter() - started
    labels = experiment.test.labels.cpu().numpy()
    return RoundRecord(
        round=state.round,
        accuracy=evaluation.accuracy if evaluation else None,
        loss=evaluation.loss if evaluation else None,
        train_loss=result.train_loss if result else None,
        num_clients=result.num_clients if result else 0,
        uplink_bytes=result.uplink_bytes if result else 0,
        downlink_bytes=result.downlink_bytes if result else 0,
        train_seconds=result.train_seconds if result else 0.0,
        eval_seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(experiment.federation.model.device),
        learning_rate=result.learning_rate if result else None,
        num_steps=result.num_steps if result else 0,
        num_examples=result.num_examples if result else 0,
        class_accuracy=class_accuracy(evaluation, labels, experiment.class_names) if evaluation else None,
        client_accuracy_mean=tenths[0] if tenths else None,
        client_accuracy_worst_decile=tenths[1] if tenths else None,
        client_accuracy_best_decile=tenths[2] if tenths else None,
    ), clients


def _measure_alone(experiment: Experiment, log: Callable[[str], object]) -> dict[int, float]:
    """Test accuracy, by client, of `evaluation.num_alone` clients that train without the others."""
    number, federation = experiment.config.evaluation.num_alone, experiment.federation
    if not number:
        return {}
    chosen = np.unique(np.linspace(0, len(federation.clients) - 1, number).round().astype(int))
    started = time.perf_counter()
    with _bar("alone", experiment.config.rounds, "round") as bar:
        adapters = train_alone(federation, experiment.initial_adapter, chosen, advance=bar.update)
    results: list[Evaluation] = []
    for start in range(0, len(chosen), federation.clients_per_block):
        block = {name: tensor[start : start + federation.clients_per_block] for name, tensor in adapters.items()}
        size = max(1, experiment.config.evaluation.batch_size // len(next(iter(block.values()))))
        results += evaluate(federation.model, block, experiment.test, batch_size=size)
    log(f"{len(chosen)} clients trained alone in {time.perf_counter() - started:.1f} s")
    return {int(client): result.accuracy for client, result in zip(chosen, results, strict=True)}


def _client_columns(experiment: Experiment, accuracies: np.ndarray, alone: dict[int, float]) -> dict[str, list[Any]]:
    clients = experiment.federation.clients
    return {
        "client": list(range(len(clients))),
        "num_train": [len(client.train) for client in clients],
        "num_held_out": [len(client.held_out) for client in clients],
        "accuracy": ["" if np.isnan(accuracy) else f"{accuracy:.6f}" for accuracy in accuracies],
        "alone_accuracy": [f"{alone[index]:.6f}" if index in alone else "" for index in range(len(clients))],
    }


def _bar(title: str, total: int, unit: str) -> Any:
    """A progress bar on standard error; silent where that is not a terminal."""
    return tqdm(total=total, desc=title, unit=unit, disable=None, dynamic_ncols=True)


def _progress(title: str, total: int) -> Callable[[int], object]:
    bar = _bar(title, total, "image")

    def advance(number: int) -> None:
        bar.update(number)
        if bar.n >= total:
            bar.close()

    return advance


def _postfix(record: RoundRecord, records: Sequence[RoundRecord]) -> dict[str, str]:
    last = next((each.accuracy for each in reversed(records) if each.accuracy is not None), None)
    return {
        "accuracy": "-" if last is None else f"{last:.1%}",
        "loss": f"{record.train_loss:.3f}" if record.train_loss is not None else "-",
        "clients/s": f"{record.num_clients / max(record.train_seconds, 1e-9):.1f}",
    }


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m flora.simulate",
        description="Federated adaptation of a frozen CLIP model, simulated in one process.",
        epilog="example: python -m flora.simulate experiments/quickstart.yaml rounds=5 clients.number=20",
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG [key=value ...]", help="a YAML file, then overrides")
    parser.add_argument("--check", action="store_true", help="only validate one or more files; nothing is loaded")
    parser.add_argument("--list", action="store_true", help="print every component with its options")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for anything the user can mend, 130 for Ctrl-C."""
    try:
        options = _parser().parse_args(argv)
        paths = [argument for argument in options.arguments if "=" not in argument or os.path.isfile(argument)]
        overrides = [argument for argument in options.arguments if argument not in paths]
        if options.list:
            print(list_components())
            return 0
        if not paths or (len(paths) > 1 and not options.check):
            raise UserError(
                f"expected {'a config file' if not paths else 'one config file'}, got {len(paths)}; see --help"
            )
        for path in paths:
            _main_one(path, overrides, check=options.check)
    except UserError as error:
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of `--list | head` has gone
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _main_one(path: str, overrides: Sequence[str], *, check: bool) -> None:
    config = load_config(path, overrides)
    try:
        if check:
            check_experiment(config)
            print(f"{path}: ok")
            return
        named = any(override.partition("=")[0].strip() == "name" for override in overrides)
        result = simulate(config, numbered=not named, echo=lambda line: tqdm.write(line, file=sys.stderr))
    except (ConfigError, BrokenPipeError):
        raise
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.filename or config.output}: {error.strerror or error}") from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split()) or "no memory left"
        raise UserError(f"{path}: out of memory: {reason}; lower clients.per_block or the batch sizes") from None
    print("\n".join(report.lines(result.summary, dataclasses.replace(config, name=result.directory.name))))
    print(f"written to {result.directory}")


if __name__ == "__main__":
    sys.exit(main())
