"""`python -m flora.predict RUN IMAGE_OR_FOLDER ...`: what a finished run's model says of images."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("predict")  # what is imported from here on takes seconds

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flora import catalogue  # noqa: F401  (registers the components)
from flora.core.command_line import run_program, split_arguments
from flora.core.errors import UserError
from flora.core.files import read_text
from flora.core.progress import image_progress
from flora.evaluation.predicting import most_probable, predict
from flora.evaluation.summary import percent
from flora.parsers import predict_parser
from flora.runs.finished import Classes, FinishedRun, check_overrides, read_run
from flora.runs.using import adapted_run, features_of_files, image_files

# What may be different from the run: where things are, how images are read, and how predictions are made.
CHANGEABLE = (
    "backbone.model",
    "backbone.weights",
    "device",
    "prompts.templates",
    "evaluation",
    "data.unreadable",
    "data.value_range",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for anything that the user can mend."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = predict_parser().parse(argv)
    paths, overrides = split_arguments(options.arguments)
    check_overrides(overrides, CHANGEABLE)
    if not paths:
        raise UserError("expected images or folders of images after the run; see --help")
    files = image_files([Path(path) for path in paths])
    run = read_run(options.run, overrides)
    classes = run.classes() if options.classes is None else _given_classes(options.classes, run)
    answers = _answers(run, classes, files, options)
    if options.json:
        names = list(classes.names)
        content = {"run": str(options.run), "client": options.client, "rounds": run.num_rounds, "classes": names}
        print(json.dumps(content | {"predictions": list(answers)}, indent=2))
        return 0
    width = max(len(str(path)) for path in files)
    for answer in answers:
        cells = [f"{name} {percent(probability)}" for name, probability in answer["probabilities"].items()]
        print(f"{answer['image']:<{width}}  {',  '.join(cells)}")
    return 0


def _answers(run: FinishedRun, classes: Classes, files: Sequence[Path], options: Any) -> Iterator[dict[str, Any]]:
    """What is predicted of each image, as JSON types; the most probable classes first."""
    adapted = adapted_run(run, classes, options.client)
    features = features_of_files(adapted, files, progress=image_progress(_say), log=_say)
    model = adapted.models[0]
    images = iter(features.split_indices.tolist())
    for logits in predict(model, adapted.stack, features, batch_size=adapted.batch_size, prediction=adapted.prediction):
        for places, probabilities in zip(*most_probable(logits, options.top), strict=True):
            named = [model.class_names[place] for place in places]
            yield {
                "image": str(files[next(images)]),
                "predicted": named[0],
                "probabilities": dict(zip(named, probabilities.tolist(), strict=True)),
            }


def _given_classes(given: str, run: FinishedRun) -> Classes:
    """The classes of `--classes`: a list with commas, or a text file with a line for each.

    Descriptions that the run has of some of them are used. Raises `UserError` if there are no two different ones.
    """
    try:
        lines = read_text(given).splitlines() if os.path.exists(given) else given.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes: {given}: can't be read as text: {error}") from None
    names = [line.strip() for line in lines if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice:
        fault = f"got {twice[0]!r} twice" if twice else f"got {names[0]!r} alone" if names else "got none"
        raise UserError(f"--classes: expected two or more different classes, {fault}")
    return Classes(tuple(names), (), run.classes().descriptions)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
