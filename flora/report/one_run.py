"""The sections of a page that shows one run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flora.evaluation.summary import describe, percent, shown, size
from flora.report import charts
from flora.report.audits import audits
from flora.report.charts import picture
from flora.report.elements import Cell, Html, bars, element, facts, folded, joined, section, table
from flora.report.reading import Absent, RunFiles, confusion_of, evaluations_of, numbers

# Rows of a table that the page shows.
MAX_ROWS = 500
MAX_PAIRS = 10


def sections(run: RunFiles) -> dict[str, Html]:
    """Return the sections by title; those with nothing in them are empty."""
    made = {
        "Result": (result(run),),
        "Over rounds": (grid(charts.curves(run)),),
        "Clients": _clients(run),
        "Classes": _classes(run),
        "On other data": (evaluations(run),),
        "Inside the rounds": (grid(*charts.other_metrics(run), kind="grid small"),),
        "Privacy audits": (audits(run),),
        "Settings": (settings(run), _environment(run)),
        "Go on": (commands(run),),
    }
    return {title: section(title, *content) for title, content in made.items()}


def grid(*content: Any, kind: str = "grid") -> Html:
    """Return pictures beside each other, or below each other where there is no room."""
    inside = joined(content)
    return element("div", inside, class_=kind) if inside else Html("")


def sentence(run: RunFiles) -> str:
    """Return what was run, in one sentence."""

    def named(key: str) -> str:
        part = run.setting(key)
        component: Any = run.config
        for name in key.split("."):
            component = getattr(component, name, None)
        if component is not None:
            return describe(component)
        return str(part.get("name", part)) if isinstance(part, Mapping) else str(part)

    number, rounds = len(run.json("partition.json").get("clients", [])), run.setting("rounds")
    who = f"{number} clients that train" if number != 1 else "one client that trains"
    parts = [
        f"{rounds} round{'s' if rounds != 1 else ''} of {named('server.strategy')} between {who} {named('adapter')} "
        f"on a frozen {run.setting('backbone.model')}",
        f"data {run.setting('data.name')}, dealt out by {named('partition')}",
        f"seed {run.setting('seed')}.",
    ]
    return "; ".join(parts)


def result(run: RunFiles) -> Html:
    """Return the headline: accuracies as bars, then what it cost."""
    if run.summary is None:
        points = run.points("accuracy")
        rows = [("zero-shot", points[0][1], "")] if points and points[0][0] == 0 else []
        rows += [(f"so far (round {points[-1][0]})", points[-1][1], "result")] if points else []
        return bars((name, value, percent(value), kind) for name, value, kind in rows)
    return joined([_bars(run), _tiles(run)])


def _bars(run: RunFiles) -> Html:
    together = "all images in one place" if run.setting("clients.centralized") is True else "together"
    if not run.records[-1].round:
        together = "the frozen model"
    common = [
        ("zero-shot", run.figure("zero_shot_accuracy"), ""),
        ("one client alone, mean", run.figure("local_only_accuracy_mean"), ""),
        ("one client alone, best", run.figure("local_only_accuracy_best"), ""),
        (f"{together}, last round", run.figure("last_accuracy") if run.records[-1].round else None, "result"),
        ("all images in one place", run.figure("centralized_accuracy"), ""),
        ("classes set aside, zero-shot", run.figure("zero_shot_new_accuracy"), ""),
        ("classes set aside, last round", run.figure("new_accuracy"), "result"),
        ("the classes that each client holds", run.figure("held_class_accuracy"), "result"),
        ("the classes that only others hold", run.figure("other_class_accuracy"), "result"),
    ]
    held_out = [
        ("alone", run.figure("held_out_local_only_accuracy"), ""),
        ("own adapters", run.figure("held_out_personal_accuracy") or run.figure("personal_accuracy_mean"), ""),
        (together, run.figure("held_out_federated_accuracy") or run.figure("client_accuracy_mean"), "result"),
        ("all images in one place", run.figure("held_out_centralized_accuracy"), ""),
        ("clients that never train, zero-shot", run.figure("zero_shot_unseen_accuracy"), ""),
        ("clients that never train", run.figure("unseen_accuracy"), "result"),
        ("clients that never train, one pass", run.figure("unseen_tuned_accuracy"), "result"),
    ]
    parts = []
    for title, rows in (("on the common test images", common), ("on the clients' own held-out images, mean", held_out)):
        lines = [(name, value, percent(value), kind) for name, value, kind in rows if value is not None]
        if lines:
            parts.append(element("div", element("h3", f"Accuracy {title}"), bars(lines)))
    return element("div", *parts, class_="grid")


def _tiles(run: RunFiles) -> Html:
    known = run.summary or {}
    trained, of_all = known.get("trainable_parameters"), known.get("backbone_parameters")
    rounds, best = known.get("rounds"), known.get("best_accuracy")
    pairs = [
        ("rounds", rounds),
        ("privacy spent", _privacy_spent(run)),
        (
            "best round, chosen on the test set",
            None if best is None or not rounds else f"{percent(best)} (round {known.get('best_round')})",
        ),
        ("trained parameters", None if not trained or not of_all else f"{trained:,} of {of_all:,}"),
        ("up per client and round", _shown("bytes", known.get("uplink_bytes_per_client_round"))),
        ("sent in all, up and down", _sum_shown(known)),
        ("simulated time", _shown("seconds", known.get("simulated_seconds"))),
        ("training", _shown("seconds", known.get("train_seconds"))),
        ("whole run", _shown("seconds", known.get("wall_seconds"))),
        ("peak memory", _shown("bytes", known.get("peak_memory_bytes"))),
        ("macro F1", _shown("fraction", known.get("macro_f1"))),
        ("calibration error", _shown("fraction", known.get("calibration_error"))),
        ("updates left out", known.get("num_rejected") or None),
    ]
    return facts((title, value) for title, value in pairs if value is not None)


def _privacy_spent(run: RunFiles) -> str | None:
    """The epsilon after the last round, at which delta and of what; None without differential privacy."""
    epsilon, mechanism = run.figure("epsilon"), run.setting("privacy.name")
    return None if epsilon is None else f"epsilon {epsilon:.3g} at delta {run.setting('privacy.delta')} ({mechanism})"


def _shown(unit: str, value: Any) -> str | None:
    return None if value is None else shown(unit, value)


def _sum_shown(known: Mapping[str, Any]) -> str | None:
    total = sum(known.get(f"total_{way}_bytes") or 0 for way in ("uplink", "downlink"))
    return size(total) if total else None


def _clients(run: RunFiles) -> tuple[Html, ...]:
    if run.summary is None:
        return (grid(picture("Who has what", lambda: charts.partition_map(run))),)
    return (
        fairness(run),
        grid(
            picture(
                "Accuracy on each client's own held-out images",
                lambda: charts.client_strip(run),
                "Below: how many training images each client has.",
            ),
            picture("Who has what", lambda: charts.partition_map(run), "Training images by class and client."),
            picture(
                "Who took part how often", lambda: charts.participation(run), "Rounds in which a client's update came."
            ),
        ),
        optional(lambda: folded("All clients", csv_table(run, "clients.csv"))),
        optional(lambda: folded("Domains of the test images", csv_table(run, "domains.csv"))),
    )


def optional(make: Callable[[], Html]) -> Html:
    """Return what `make` does; nothing if the run does not have what that takes."""
    try:
        return make()
    except Absent:
        return Html("")


def fairness(run: RunFiles) -> Html:
    """Return how evenly accuracies are spread over clients, as tiles."""

    def tiles() -> Html:
        accuracies = numbers(run.columns("clients.csv")["accuracy"])
        if np.isnan(accuracies).all():
            raise Absent("No client has held-out images.")
        pairs = [
            ("worst tenth of clients", percent(run.figure("client_accuracy_worst_decile"))),
            ("mean", percent(run.figure("client_accuracy_mean"))),
            ("best tenth", percent(run.figure("client_accuracy_best_decile"))),
            ("standard deviation", percent(run.figure("client_accuracy_std"))),
            ("Gini coefficient", f"{charts.gini(accuracies):.3f}"),
        ]
        return facts(pairs)

    try:
        return tiles()
    except (Absent, KeyError, ValueError):
        return Html("")


def csv_table(run: RunFiles, name: str) -> Html:
    """Return a CSV file as a table that can be sorted, its first rows if it is long. Raises `Absent`."""
    header, rows = run.table(name)
    cells = [[_cell(text) for text in row] for row in rows[:MAX_ROWS]]
    note = f"The first {MAX_ROWS} of {len(rows)} rows; {name} has all." if len(rows) > MAX_ROWS else ""
    titles = [title.replace("_", " ") for title in header]
    return joined([table(titles, cells, sortable=True), element("p", note) if note else ""])


def _cell(text: str) -> Any:
    try:
        value = float(text)
    except ValueError:
        return text
    return Cell(text if value.is_integer() and "." not in text else f"{value:.3f}", value)


def _classes(run: RunFiles) -> tuple[Html, ...]:
    if run.summary is None:
        return ()
    return (
        grid(
            picture(
                "Who is taken for whom",
                lambda: charts.confusion_map(run),
                "Percent of each class's test images, after the last round.",
            ),
            picture("The worst pairs", lambda: worst_pairs(run)),
            picture("Accuracy by class", lambda: charts.class_accuracies(run)),
            picture(
                "Is its confidence to be believed?",
                lambda: charts.reliability(run),
                "On the dotted line as often right as it is confident; below it, too sure of itself.",
            ),
        ),
    )


def worst_pairs(run: RunFiles) -> Html:
    """Return the classes that are most often taken for another, as a table."""
    names, counts = confusion_of(run)
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    totals = np.maximum(counts.sum(1), 1)
    order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    places = [divmod(int(place), len(names)) for place in order]
    rows = [
        (
            names[row],
            names[column],
            int(wrong[row, column]),
            Cell(percent(wrong[row, column] / totals[row]), wrong[row, column] / totals[row]),
        )
        for row, column in places
        if wrong[row, column]
    ]
    if not rows:
        raise Absent("No test image is taken for another class.")
    return table(["labelled", "taken for", "images", "of the class"], rows, sortable=True)


def evaluations(run: RunFiles) -> Html:
    """Return what `flora evaluate` wrote beside the run as a table, a row a record, and the names of damaged ones."""
    rows, damaged = [], []
    for name, content in evaluations_of(run).items():
        try:
            rows.append(_evaluation(name, content or {}))
        except (KeyError, TypeError, AttributeError, ValueError):
            damaged.append(name)
    titles = ["record", "data", "adapter", "images", "classes", "zero-shot", "adapted", "macro F1", "calibration error"]
    note = f"Left out, because damaged: {', '.join(f'evaluations/{name}.json' for name in damaged)}."
    return joined([table(titles, rows, sortable=True) if rows else "", element("p", note) if damaged else ""])


def _evaluation(name: str, content: Mapping[str, Any]) -> list[Any]:
    """The row of a record. Raises KeyError, TypeError, AttributeError or ValueError for a damaged one."""
    metrics, client = content["metrics"], content.get("client")
    figures = (content["zero_shot"]["accuracy"], *(metrics.get(key) for key in ("accuracy", "macro_f1")))
    return [
        name,
        content["config"]["data"]["name"],
        "the server's" if client is None else f"of client {client}",
        content["num_images"],
        len(content["class_names"]),
        *(Cell(percent(figure), figure) for figure in (*figures, metrics.get("calibration_error"))),
    ]


def settings(run: RunFiles) -> Html:
    """Return the configuration as it was, folded, but for passwords in addresses of trackers."""
    return optional(
        lambda: folded(
            "config.yaml: every setting",
            element("pre", re.sub(r"(://[^/@\s:]*):[^/@\s]+@", r"\1:...@", run.text("config.yaml"))),
        )
    )


def _environment(run: RunFiles) -> Html:
    def rows() -> Html:
        environment = run.json("environment.json")
        pairs = [(key.replace("_", " "), _plain(value)) for key, value in environment.items() if value is not None]
        return folded("Environment: versions, device, digests", table(["", ""], pairs))

    return optional(rows)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def commands(run: RunFiles) -> Html:
    """Return what can be done with the run now, as commands."""
    path, again = shlex.quote(str(run.path)), shlex.quote(f"{run.name}-again")
    lines = []
    if run.summary is None:
        title = "Go on" if run.was_interrupted else "Go on, if it has stopped"
        lines.append((title, f"python -m flora.simulate --resume {path}"))
    elif run.config is not None and not run.config.local.schedule.needs_num_rounds:
        rounds = 2 * run.config.rounds or 10
        lines.append(("More rounds", f"python -m flora.simulate --resume {path} rounds={rounds}"))
    lines.append(("The same with another seed", f"python -m flora.simulate {path}/config.yaml seed=1234 name={again}"))
    if run.summary is not None and run.records[-1].round:
        lines += [
            ("What it makes of your images", f"python -m flora.predict {path} photo.jpg"),
            ("How good it is on other data", f"python -m flora.evaluate {path} data=cifar10 data.download=true"),
        ]
    if run.summary is not None:
        lines.append(("A model that OpenCLIP loads", f"python -m flora.export {path} adapted"))
    return element(
        "dl",
        *(joined([element("dt", what), element("dd", element("code", line))]) for what, line in lines),
        class_="commands",
    )
