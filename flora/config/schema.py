"""All options of an experiment, as frozen dataclasses."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flora import catalogue  # noqa: F401  (registers the components)
from flora.client.local_training import LocalTraining
from flora.client.personalization import NoPersonalization, Personalization
from flora.clip.adapters.base import Adapter, AttachedAdapter
from flora.clip.adapters.lora import Lora
from flora.clip.backbone import Backbone
from flora.clip.frozen import FrozenClip
from flora.clip.prediction import Fusion, NoFusion, PatchAttention, Prediction
from flora.clip.towers.speed import SpeedOptions
from flora.communication.network import Network, StragglerPolicy
from flora.communication.options import CommunicationOptions
from flora.communication.ranks import Ranks
from flora.communication.sampling import Sampler, Uniform
from flora.config.presets import DEFAULT, NO_SCENARIO, PRESETS, SCENARIOS, read_scenario
from flora.core.counts import part_of
from flora.core.registry import (
    OptionError,
    Options,
    name_of,
    option,
)
from flora.data.datasets.base import Dataset
from flora.data.partition import Partitioner
from flora.data.prompts import PromptOptions, check_templates
from flora.data.splits import Official, Splitter
from flora.features.cache import CacheOptions
from flora.federated.federation import RoundSchedule
from flora.federated.synchronous import Synchronous
from flora.privacy.canaries import Canaries
from flora.privacy.mechanisms import Privacy
from flora.privacy.secure_sums import SecureSum
from flora.server.aggregators import Aggregator, Mean
from flora.server.optimizers import ServerOptimizer, ServerSgd
from flora.server.screening import Screening
from flora.server.strategies.averaging import FedAvg
from flora.server.strategies.base import Strategy
from flora.server.training import Distillation, SyntheticImages, TextRounds
from flora.trackers.base import Tracker


@dataclass(frozen=True)
class ClientOptions(Options):
    """The virtual clients."""

    number: int | None = option(
        "how many virtual clients there are; none, and the default of `natural`: as many as the data name",
        10,
        at_least=1,
        at_most=10_000_000,
    )
    centralized: bool = option("one client trains on what all of them would have: centralised training", False)
    cohort: Sampler = option("which of them take part in a round", Uniform())
    holdout_fraction: float = option("share of a client's examples kept for its own test", 0.2, at_least=0, below=1)
    held_out_fraction: float = option(
        "share of the clients that never train, drawn at random: what the last adapter gives them, and one pass of "
        "fine-tuning from it, on their own test images",
        0.0,
        at_least=0,
        below=1,
    )
    labelled_fraction: float = option(
        "share of a client's training images of which it knows the label, at least one; the others wait for "
        "local.self_training",
        1.0,
        above=0,
        at_most=1,
    )
    ranks: tuple[int, ...] | Ranks | None = option(
        "a list of each client's rank, or how they are drawn; none: adapter.rank for all", None, at_least=1
    )
    per_block: int | None = option(
        "clients trained in one step; changes the speed only; none: automatic", None, at_least=1
    )

    def check(self) -> None:
        if self.held_out_fraction and not self.holdout_fraction:
            raise OptionError(
                "held_out_fraction", "expected 0 without holdout_fraction: there are no images to test such clients on"
            )

    @property
    def number_training(self) -> int | None:
        """How many clients train: one where training is centralised, None if that is for the data to say."""
        if self.centralized or self.number is None:
            return 1 if self.centralized else None
        return self.number - self.num_unseen(self.number)

    def num_unseen(self, number: int) -> int:
        """How many of `number` clients never train: the share of them, but at least one, where that is asked for.

        Raises `OptionError` if none would be left to train.
        """
        if not self.held_out_fraction:
            return 0
        if number < 2:
            raise OptionError("clients.held_out_fraction", f"expected at least two clients, one to train, got {number}")
        return min(max(round(part_of(self.held_out_fraction, number)), 1), number - 1)


@dataclass(frozen=True)
class ServerOptions(Options):
    """What the server does with the updates."""

    strategy: Strategy = option("what of an adapter clients train and send", FedAvg())
    aggregator: Aggregator = option("how the cohort's deltas become one", Mean())
    secure_sum: SecureSum | None = option(
        "how the deltas are added up so that the server sees none of them; none: it sees them all", None
    )
    optimizer: ServerOptimizer = option("how the server steps along that delta", ServerSgd())
    schedule: RoundSchedule = option("for whose updates the server waits before it steps", Synchronous())
    synthetic: SyntheticImages | None = option("labelled images that the server trains on before round 1", None)
    distillation: Distillation | None = option("unlabelled images with which the cohort teaches the server", None)
    text_rounds: TextRounds | None = option("descriptions of classes that the server trains on after rounds", None)
    screening: Screening = option("what becomes of updates that must not be averaged", Screening())
    stragglers: StragglerPolicy = option("for whom the server waits, where there is a network", StragglerPolicy())


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """When and how results are measured."""

    every: int = option("rounds between two evaluations; the last round is always evaluated", 1, at_least=1)
    clients_every: int | None = option(
        "rounds between two evaluations on all clients' held-out examples; none: only after the last round",
        None,
        at_least=1,
    )
    batch_size: int = option("images through the trained part of a tower at once", 512, at_least=1, at_most=1_000_000)
    fusion: Fusion = option("how the adapted model's answers and the frozen one's become one", NoFusion())
    patches: PatchAttention | None = option(
        "what an image's patches add to its similarity with a class; none: nothing", None
    )
    num_local_only: int = option(
        "clients that are also trained alone, for comparison (spread over the ids)", 0, at_least=0
    )
    centralized: bool = option(
        "train on the training images of all clients in one place, too, for comparison: for as many rounds", False
    )
    templates: tuple[str, ...] = option(
        "other templates than those that are trained with: the server's adapter is also evaluated with each of these "
        "alone",
        (),
    )
    also: tuple[Dataset, ...] = option(
        "other data sets whose test images, told apart by their own classes, the frozen model and the last round's "
        "adapter are evaluated on",
        (),
    )
    held_classes: bool = option(
        "evaluate each client's adapter (the server's, where it has none of its own) on the test images of the classes "
        "that it holds, told apart among these, and on the others', told apart among those",
        False,
    )
    auroc: bool = option(
        "compute the area under the ROC curve, too; takes memory for a probability of each test image and class", False
    )
    predictions: int = option(
        "write predictions.csv after the last round, with so many of the most probable classes of each image; 0: not",
        0,
        at_least=0,
    )

    def check(self) -> None:
        check_templates(self.templates)
        if len(set(self.templates)) != len(self.templates):
            raise OptionError("templates", "expected each template once")
        names = [name_of(dataset) for dataset in self.also]
        if len(set(names)) != len(names):
            raise OptionError("also", f"expected each once, got {', '.join(names)}")

    @property
    def prediction(self) -> Prediction:
        """How classes are predicted."""
        return Prediction(self.fusion, self.patches)


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """When the server's state is saved, so that a run can go on where it stopped."""

    every: int | None = option(
        "rounds between two checkpoints; there is always one of the last round, or where a run is stopped or fails",
        1,
        at_least=1,
    )
    keep: int = option("how many checkpoints stay on the disk", 2, at_least=1)


@dataclass(frozen=True)
class ExperimentConfig(Options):
    """A whole experiment."""

    data: Dataset = option("where the images come from")
    partition: Partitioner = option("how the training examples are dealt out to the clients")
    preset: str = option("the set of values below this file's own", DEFAULT, choices=PRESETS)
    scenario: str = option(
        "the set of values of a benchmark's scenario, above the preset's",
        NO_SCENARIO,
        choices=(NO_SCENARIO, *SCENARIOS),
    )
    name: str = option("the run's name, and its folder's below `output`; none: the file's name", "")
    seed: int = option("root of all random numbers", 0, at_least=0)
    rounds: int = option("rounds of federated training; 0: zero-shot only", 20, at_least=0)
    device: str = option("auto (cuda if there is one, else cpu), cpu, cuda or cuda:N", "auto")
    threads: int | None = option(
        "threads of a CPU operation; none: PyTorch's choice, or fewer where other processes are at work and steps are "
        "clearly faster so",
        None,
        at_least=1,
        at_most=1024,
    )
    output: str = option("folder that run directories are made in", "runs")
    split: Splitter = option("which images are trained on and which are the common test set", Official())
    backbone: Backbone = option("the frozen model", Backbone())
    adapter: Adapter = option("what the clients train", Lora())
    prompts: PromptOptions = option("the texts that stand for the classes", PromptOptions())
    clients: ClientOptions = option("the virtual clients", ClientOptions())
    local: LocalTraining = option("what a client does in a round", LocalTraining())
    personal: Personalization = option("what each client trains for itself alone", NoPersonalization())
    server: ServerOptions = option("what the server does with the updates", ServerOptions())
    network: Network | None = option("lines, machines and hours of the clients; none: all at once, always", None)
    privacy: Privacy | None = option("client-level differential privacy of what the server learns; none: without", None)
    communication: CommunicationOptions = option("how what travels is written", CommunicationOptions())
    canaries: Canaries | None = option(
        "what is in or out of the run by fair coins, for `flora audit`; none: nothing, as in any other run", None
    )
    cache: CacheOptions = option("where image features are kept between runs", CacheOptions())
    speed: SpeedOptions = option("exact ways to be faster", SpeedOptions())
    evaluation: EvaluationOptions = option("when and how results are measured", EvaluationOptions())
    checkpoints: CheckpointOptions = option("when the server's state is saved", CheckpointOptions())
    trackers: tuple[Tracker, ...] = option("what is told of each round's figures, beside the run directory", ())

    def check(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise OptionError("device", f"expected auto, cpu, cuda or cuda:N, got {self.device!r}")
        names = [name_of(tracker) for tracker in self.trackers]
        if len(set(names)) != len(names):
            raise OptionError("trackers", f"expected each once, got {', '.join(names)}")
        needs = () if self.scenario == NO_SCENARIO else read_scenario(self.scenario).needs
        for key in needs:
            section, _, name = key.rpartition(".")
            if not getattr(getattr(self, section), name, None):
                raise OptionError(key, f"missing: the scenario {self.scenario} needs it")
        if self.clients.number is None and not self.partition.names_clients:
            raise OptionError(
                "clients.number", f"expected a number: {name_of(self.partition)} takes none from the data"
            )

    def attach(self, clip: FrozenClip) -> AttachedAdapter:
        """Attach the adapter to `clip`, with what clients keep of it for themselves."""
        return self.personal.added_to(self.adapter.attach(clip))
