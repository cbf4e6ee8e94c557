"""What the server trains the adapter on by itself: synthetic images, public unlabelled ones, descriptions."""

from __future__ import annotations

from dataclasses import dataclass

from flora.client.local_training import LocalTraining
from flora.client.objectives import CrossEntropy, MatchTeacher, Objective
from flora.core.registry import Options, option
from flora.data.datasets.base import Dataset


@dataclass(frozen=True, kw_only=True)
class ServerSteps(Options):
    """How the server takes steps of its own: AdamW on random batches, each from a fresh state."""

    steps: int = option("local steps that the server takes", 20, at_least=1, at_most=1_000_000)
    learning_rate: float = option("step size", 1e-3, above=0)
    batch_size: int = option("examples in a step", 64, at_least=1, at_most=1_000_000)

    def local(self, objective: Objective) -> LocalTraining:
        """Return these steps as what a client does in a round."""
        return LocalTraining(
            learning_rate=self.learning_rate, steps=self.steps, batch_size=self.batch_size, objective=objective
        )


@dataclass(frozen=True, kw_only=True)
class SyntheticImages(ServerSteps):
    """Before round 1 the server trains the adapter on labelled images of its own (after StableLLaVA, arXiv:2308.10253).

    Their classes are the run's, those set aside included, by the names that the data sets have for them. Differs from
    the paper: no image is generated here; any data set is taken.
    """

    data: Dataset = option("where the images come from: its training images are taken")
    class_names: dict[str, str] | tuple[str, ...] | None = option(
        "what the run's data call its classes: a list of all, or a mapping of some; none: the same as it does", None
    )
    num_images: int | None = option("at most as many of them, drawn at random; none: all", None, at_least=1)

    def training(self) -> LocalTraining:
        """What the server does before round 1."""
        return self.local(CrossEntropy())


@dataclass(frozen=True, kw_only=True)
class Distillation(ServerSteps):
    """After each round's mean the server's adapter learns what the cohort's adapters say of public unlabelled images.

    Their logits, averaged, are the teacher: T^2 KL(teacher || adapter) at temperature T. Source: FedDF,
    arXiv:2006.07242, algorithm 1. Differs from the paper: a number of steps that is given, without early stopping on a
    validation set.
    """

    data: Dataset = option("where the images come from: its training images are taken, their labels are not looked at")
    num_images: int | None = option("at most as many of them, drawn at random; none: all", 1000, at_least=1)
    temperature: float = option("what logits are divided by: higher looks at all classes", 1.0, above=0)

    def training(self) -> LocalTraining:
        """What the server does after a round's mean."""
        return self.local(MatchTeacher(self.temperature))


@dataclass(frozen=True, kw_only=True)
class TextRounds(ServerSteps):
    """After a round's mean the server trains the text tower so that each description of a class finds that class.

    The frozen model's features of the descriptions stand where those of images stand, so classes that no client holds
    are learned, too: all classes that the file describes, those set aside included. Sources: synthesised descriptions
    as in StableLLaVA, arXiv:2308.10253; texts in place of images as in TaI-DPT, arXiv:2211.12739.
    """

    descriptions: str = option("a YAML or JSON file: class name to sentences, as for `prompts.descriptions`")
    every: int = option("rounds between two of them", 1, at_least=1)

    def training(self) -> LocalTraining:
        """What the server does after a round's mean."""
        return self.local(CrossEntropy())
