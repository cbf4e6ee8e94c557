"""What several test files share: tiny models, data, federations of five clients, and how results are compared."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F

from flora import catalogue  # noqa: F401  (registers the components)
from flora.client.local_training import LocalTraining
from flora.client.optimizers import Sgd
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.lora import Lora
from flora.clip.backbone import Backbone
from flora.clip.frozen import FrozenClip
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.towers import AdaptedClip
from flora.communication.options import payload_bytes
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.core import tree
from flora.core.registry import option, register
from flora.core.rng import Rng
from flora.core.states import ClientData, ServerState
from flora.core.tree import State
from flora.data.datasets.base import Dataset, ImageArrays, ImageData, Split
from flora.engine.engine import Engine
from flora.engine.tasks import ClientResult
from flora.features.features import StoredFeatures
from flora.federated.federation import Federation
from flora.federated.round import RoundResult, run_round
from flora.federated.synchronous import Synchronous

# The tensors here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)
# No test turns the power off: nothing need reach the disk, for which a run would wait longer than it trains.
os.fsync = lambda descriptor: None

SHARED = Path(__file__).parents[2] / "shared"


# What is the same by mathematics, but summed in another order, may differ by this in fp64. The numbers here are of size
# 1, and an eps is 2e-16: no machine's rounding comes near it, and no mistake stays below it.
TOLERANCE = 1e-9
# The same for fp32 after some steps without Adam, which makes of rounding what it likes: it divides by nearly nothing.
LOOSE = 1e-3

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


ALL_ON = SpeedOptions()


CLASSES = ("cat", "fire truck", "a rather long name for a tree frog")


@register("patterns")
@dataclass(frozen=True)
class Patterns(Dataset):
    """Noisy images, 16 px, each class around a pattern of its own."""

    num_train: int = option("training images", 60, at_least=1)
    num_test: int = option("test images", 30, at_least=1)
    num_classes: int = option("classes", 3, at_least=1)

    def load(self, rng: Rng) -> ImageData:
        generator = rng.numpy()
        centres = generator.uniform(60, 190, (self.num_classes, 16, 16, 3))

        def split(size: int) -> Split:
            labels = np.arange(size) % self.num_classes
            pixels = (centres[labels] + generator.normal(0, 25, (size, 16, 16, 3))).clip(0, 255).astype(np.uint8)
            return Split(ImageArrays(pixels, "patterns"), np.arange(size), labels)

        return ImageData(
            split(self.num_train), split(self.num_test), tuple(f"thing {i}" for i in range(self.num_classes))
        )


def write_model(
    path: Path, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any
) -> str:
    """Write a variant of the tiny model's config; return its path."""
    config = {**TINY, **top}
    config["text_cfg"] = {**TINY["text_cfg"], **(text or {})}  # type: ignore[dict-item]
    config["vision_cfg"] = {**TINY["vision_cfg"], **(vision or {})}  # type: ignore[dict-item]
    path.write_text(json.dumps(config))
    return str(path)


def load_clip(model: str, device: str = "cpu", precision: str = "fp64", *, reads_patches: bool = False) -> FrozenClip:
    """A fresh copy of a model with random weights, the same at each call.

    In fp64, so that what is equal by mathematics is equal to 1e-9 on every machine: see `TOLERANCE`.
    """
    clip = Backbone(model=model, weights="random", precision=precision).load(torch.device(device), Rng(0))
    return dataclasses.replace(clip, reads_patches=reads_patches)


def load_plain(model: str, precision: str = "fp64") -> FrozenClip:
    """The same weights in a model that OpenCLIP built and nobody touched: what ours is compared with."""
    clip = load_clip(model, precision=precision)
    plain = copy.deepcopy(_built_by_openclip(Path(model).read_text())).to(clip.dtype)
    plain.load_state_dict(clip.model.state_dict())
    return dataclasses.replace(clip, model=plain)


@lru_cache(maxsize=16)
def _built_by_openclip(config: str) -> torch.nn.Module:
    import open_clip  # here, because processes that import this file for its data set alone start faster without it

    options = json.loads(config)
    plain_class = open_clip.CustomTextCLIP if options.pop("custom_text", False) else open_clip.CLIP
    return plain_class(**options).eval()


def plain_texts(
    plain: FrozenClip, texts: Sequence[str], put: Callable[[torch.Tensor, torch.Tensor], object] = lambda x, ends: None
) -> torch.Tensor:
    """Unit features through OpenCLIP. `put` may write into their embeddings `(P, L, width)`; they have `ends`."""
    tokens, model = plain.tokenize(texts), cast(Any, plain.model)
    ends, x = tokens.argmax(dim=-1), model.token_embedding(tokens)
    put(x, ends)
    x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
    return F.normalize(model.ln_final(x)[torch.arange(len(x)), ends] @ model.text_projection, dim=-1)


def plain_classes(plain: FrozenClip, context: torch.Tensor | None) -> torch.Tensor:
    """Unit features of `CLASSES` through OpenCLIP, with `context` `(4, width)` in place of "a photo of a"."""

    def put(x: torch.Tensor, ends: torch.Tensor) -> None:
        if context is not None:
            x[:, 1:5] = context

    return plain_texts(plain, [f"a photo of a {name}." for name in CLASSES], put)


def adapt(
    model: str,
    adapter: Adapter | None = None,
    *,
    class_names: tuple[str, ...] = CLASSES,
    templates: tuple[str, ...] = ("a photo of a {}.",),
    speed: SpeedOptions = ALL_ON,
    device: str = "cpu",
    precision: str = "fp64",
) -> AdaptedClip:
    """A fresh tiny model with an adapter attached."""
    adapter = adapter or Lora()
    clip = load_clip(model, device, precision, reads_patches=adapter.comparison.reads_patches)
    attached = adapter.attach(clip)
    return AdaptedClip(clip, attached, class_names=class_names, templates=templates, speed=speed)


def random_adapters(
    model: AdaptedClip, num_clients: int, *, scale: float = 0.3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """K adapters `(K, ...)` in which B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    state = model.adapter.initial_state(Rng(seed))
    return {
        name: tensor + scale * torch.randn((num_clients, *tensor.shape), generator=generator).to(tensor.dtype)
        for name, tensor in state.items()
    }


def random_pixels(number: int, seed: int = 1) -> torch.Tensor:
    """Preprocessed images for the tiny model, in fp64."""
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).double()


# What differs between two runs that are the same: time, memory, and what contains or is a digest of it.
VOLATILE = {
    "train_seconds",
    "eval_seconds",
    "wall_seconds",
    "peak_memory_bytes",
    "memory_before_bytes",
    "records_bytes",
    "records_sha256",
}


def comparable(directory: Path) -> dict[str, Any]:
    """All that a run left behind and promises to be the same when it runs again, by file."""
    files: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_dir() or name in ("log.txt", "environment.json") or name.startswith("set-aside"):
            continue
        if path.name == "rounds.jsonl":
            files[name] = [_steady(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "manifest.json":
            files[name] = _steady(json.loads(path.read_text())["manifest"])
        elif path.name == "summary.json":
            files[name] = _steady(json.loads(path.read_text()))
        else:
            files[name] = path.read_bytes()
    return files


def _steady(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in VOLATILE}


SIZES = (13, 4, 9, 1, 6)


PIXELS = random_pixels(sum(SIZES))


LABELS = torch.arange(sum(SIZES)) % len(CLASSES)


TEXTS = tuple(f"a photo of a {name}." for name in CLASSES)


def federation(
    model: AdaptedClip, local: LocalTraining, *, per_block: int = 1, cohort: int | None = None, **parts: Any
) -> Federation:
    """Five clients of 13, 4, 9, 1 and 6 examples; `parts` are as for `variant`."""
    ends = np.cumsum(SIZES)
    none = np.array([], dtype=np.int64)
    count = len(LABELS)
    features = StoredFeatures(model.vision.stem(PIXELS), torch.arange(count), LABELS, np.arange(count))
    made = Federation(
        engine=Engine(model, features, per_block),
        clients=[ClientData(np.arange(end - size, end), none) for size, end in zip(SIZES, ends, strict=True)],
        participation=Participation(Uniform(number=cohort), np.array(SIZES)),
        local=local,
        schedule=Synchronous(),
        num_rounds=3,
        rng=Rng(7),
    )
    return variant(made, **parts)


def variant(parts: Federation, **changes: Any) -> Federation:
    """A federation with other parts, wherever they are: `strategy`, `sampler`, `network`, `hooks`, `local`, ..."""
    holders: dict[str, Any] = {"server": parts.server, "participation": parts.participation, "engine": parts.engine}
    for holder, held in holders.items():
        names = {field.name for field in dataclasses.fields(held)}
        own = {name: changes.pop(name) for name in names & changes.keys()}
        changes[holder] = dataclasses.replace(changes.get(holder, held), **own)
    return dataclasses.replace(parts, **changes)


def train(
    parts: Federation,
    starts: dict[int, State],
    *,
    round: int,
    rng: Rng,
    local: LocalTraining | None = None,
) -> dict[int, ClientResult]:
    """What comes of the local training of some clients, each from its own of `starts`, by id."""
    setup = parts.setup(round, parts.roles.trained(next(iter(starts.values())), round), local)
    tasks = [parts.task(client, start, setup, rng) for client, start in starts.items()]
    return {result.client: result for result in parts.engine.train(tasks)}


def start(model: AdaptedClip) -> ServerState:
    return ServerState(0, model.initial_adapter(Rng(1)))


def run(model: AdaptedClip, local: LocalTraining, rounds: int = 2, **options: int) -> ServerState:
    parts = federation(model, local, **options)
    state = start(model)
    for _ in range(rounds):
        state, _ = run_round(parts, state)
    return state


def rounds(parts: Federation, number: int) -> tuple[list[ServerState], list[RoundResult]]:
    """All states, the first one included, and what each round did."""
    states, results = [parts.initial_state(parts.engine.model.initial_adapter(Rng(1)))], []
    for _ in range(number):
        state, result = run_round(parts, states[-1])
        states.append(state)
        results.append(result)
    return states, results


def assert_states_close(left: tree.State, right: tree.State, atol: float = TOLERANCE) -> None:
    """Assert that two states have the same names and, to `atol`, the same numbers."""
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_equal_to_a_plain_loop(
    model: AdaptedClip,
    loss: Callable[[State, np.ndarray], torch.Tensor],
    *,
    epochs: int = 2,
    learning_rate: float = 1e-3,
    stays: Callable[[str], bool] = lambda name: False,
) -> tuple[State, State]:
    """Two rounds are SGD on `loss(adapter, examples)` of one client after another, however many of them share a step.

    What `stays` is a client's own from round to round, and never travels. Returns the first client's adapters, the one
    that it begins with and the last.
    """
    local = LocalTraining(learning_rate=learning_rate, batch_size=100, epochs=epochs, optimizer=Sgd(momentum=0.9))
    runs = [rounds(federation(model, local, per_block=number), 2) for number in (1, 2, 5)]
    first = server = runs[0][0][0].adapter
    clients: list[tuple[ClientData, State]] = [(data, {}) for data in federation(model, local).clients]
    for round in (1, 2):
        ends = []
        for data, own in clients:
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in {**server, **own}.items()}
            optimizer = torch.optim.SGD(leaves.values(), lr=learning_rate, momentum=0.9)
            for _ in range(epochs):
                optimizer.zero_grad()
                loss(leaves, data.train).backward()
                optimizer.step()
            ends.append({name: leaf.detach() for name, leaf in leaves.items()})
            own.update({name: tensor for name, tensor in ends[-1].items() if stays(name)})
        mean = tree.weighted_mean(ends, SIZES)
        server = {name: tensor if stays(name) else mean[name] for name, tensor in server.items()}
        for states, _ in runs:
            assert_states_close(states[round].adapter, server)
            for client, (_, own) in enumerate(clients):
                if own:
                    assert_states_close(states[round].clients[client].own, own)
    sent = payload_bytes({name: tensor for name, tensor in server.items() if not stays(name)})
    for _, results in runs:
        assert results[0].uplink_bytes == results[0].downlink_bytes == len(SIZES) * sent
    return first, {**server, **clients[0][1]}


LOCAL = LocalTraining(learning_rate=0.1, batch_size=4, optimizer=Sgd())


def fp64(state: tree.StateLike) -> State:
    """The same numbers in double precision."""
    return {name: tensor.double() for name, tensor in state.items()}


def low_rank_clients(number: int, rank: int = 2, seed: int = 0) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.lora_A": (rank, 6), "x.lora_B": (5, rank)}
    return [
        fp64({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}) for _ in range(number)
    ]


def changed(before: State, after: State) -> set[str]:
    """Which factors are different."""
    return {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}


def mean(parts: Federation, vectors: list[torch.Tensor]) -> torch.Tensor:
    """The mean over the clients of `parts`, weighted by their numbers of examples."""
    weights = torch.tensor([float(len(client.train)) for client in parts.clients], dtype=torch.float64)
    return (torch.stack(vectors) * weights[:, None] / weights.sum()).sum(dim=0)
