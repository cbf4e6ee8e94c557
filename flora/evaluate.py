"""`python -m flora.evaluate RUN data=...`: a finished run's model on any data set, its record beside the run."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("evaluate")  # what is imported from here on takes seconds

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flora import catalogue  # noqa: F401  (registers the components)
from flora.clip.towers.towers import AdaptedClip
from flora.config.parse import config_to_dict
from flora.core.command_line import run_program
from flora.core.errors import UserError
from flora.core.progress import Tell, image_progress
from flora.core.records import Evaluation
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.core.states import ServerState
from flora.core.tree import StateLike, state_digest
from flora.evaluation.accuracy import evaluate, harmonic_mean
from flora.evaluation.metrics import ServerView, computed
from flora.evaluation.summary import percent
from flora.experiment.images import Images, Loader, data_digest, find_test_images, warn_of_untested_classes
from flora.features.features import Features, images_digest
from flora.parsers import evaluate_parser
from flora.runs.environment import environment
from flora.runs.finished import Classes, FinishedRun, check_overrides, read_run
from flora.runs.run_directory import check_free_name, write_json
from flora.runs.using import AdaptedRun, adapted_run

# What may be different from the run: the data, the texts, how predictions are made, and where things are.
CHANGEABLE = ("data", "split", "prompts", "evaluation", "seed", "cache", "device", "backbone.model", "backbone.weights")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for anything that the user can mend."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = evaluate_parser().parse(argv)
    check_overrides(options.overrides, CHANGEABLE)
    name = options.name
    folder = options.run / "evaluations"
    check_free_name(folder, name)
    run = read_run(options.run, options.overrides)
    content = evaluated(run, options.client)
    number, frozen, adapted = content["num_images"], content["zero_shot"], content["metrics"]
    found = (
        f"zero-shot {percent(frozen['accuracy'])} -> {percent(adapted['accuracy'])} on {number:,} images of "
        f"{len(content['class_names'])} classes ({name_of(run.config.data)})"
    )
    try:
        path = write_json(folder, f"{name or name_of(run.config.data)}.json", content, numbered=name is None)
    except UserError:
        print(found)
        raise
    print(f"{found}; written to {path}")
    return 0


def evaluated(run: FinishedRun, client: str | None = None) -> dict[str, Any]:
    """Evaluate a finished run's adapter, the server's or a client's own, on the test images that its `config` names.

    Returns the record as JSON types: the metrics of the adapter and of the frozen model, and what they are of. Raises
    `UserError` as `adapted_run` does, and for what is wrong with the data.
    """
    config, rng = run.config, Rng(run.config.seed)
    tell = Tell(image_progress(_say), _say)
    images = find_test_images(config, rng, tell)
    adapted = adapted_run(run, Classes(images.class_names, images.new_class_names, images.descriptions), client)
    loader = Loader(config, adapted.models[0], tell, config.data.skips_unreadable)
    splits = {"test": images.data.test} | ({"new": images.data.new} if images.data.new is not None else {})
    features = list(loader.load(splits).values())
    for line in loader.problems:
        _say(f"left out: {line}")
    warn_of_untested_classes(features[0].labels.numpy(), images.class_names, _say)
    return {
        "run": str(run.path),
        "rounds": run.num_rounds,
        "client": client,
        "adapter_sha256": state_digest(run.adapter),
        "config": {key: config_to_dict(config)[key] for key in ("data", "split", "prompts", "evaluation", "seed")},
        "class_names": list(images.class_names),
        "num_images": len(features[0]),
        "num_unreadable": len(loader.problems),
        "metrics": _metrics(adapted, images, features, run.num_rounds, adapted.stack),
        "zero_shot": _metrics(adapted, images, features, 0, None),
        "value_range": None if images.value_range is None else list(images.value_range),
        "data_sha256": data_digest(images.data),
        "images_sha256": images_digest(features),
        "environment": environment(adapted.models[0].device, config.seed, 1),
    }


def _metrics(
    adapted: AdaptedRun, images: Images, features: Sequence[Features], round: int, stack: StateLike | None
) -> Mapping[str, Any]:
    """The metrics of an adapter, or of the frozen model without one, on the test images and those of new classes."""
    config = adapted.run.config.evaluation

    def evaluation(model: AdaptedClip, of: Features) -> Evaluation:
        return evaluate(
            model,
            stack,
            of,
            batch_size=config.batch_size,
            prediction=config.prediction,
            keep_probabilities=config.auroc,
        )[0]

    test = features[0]
    groups = images.data.test.groups
    view = ServerView(
        ServerState(round, adapted.run.adapter),
        evaluation(adapted.models[0], test),
        test.labels.cpu().numpy(),
        images.class_names,
        None if groups is None else groups[test.split_indices],
    )
    metrics = computed(view)
    if len(features) > 1:
        new = evaluation(adapted.models[1], features[1]).accuracy
        metrics |= {"new_accuracy": new, "harmonic_mean": harmonic_mean(metrics["accuracy"], new)}
    return metrics


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
