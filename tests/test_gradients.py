"""A step's gradients are those of the loss; on CUDA a recorded step gives what the step itself gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ALL_ON, TOLERANCE, adapt, random_adapters, random_pixels
from torch import Tensor

from flora.client.objectives import Contrastive, CrossEntropy, Objective
from flora.client.penalties import ProGrad
from flora.clip.adapters.base import Adapter
from flora.clip.adapters.dual_lora import DualLora
from flora.clip.adapters.full import FullFineTuning
from flora.clip.adapters.lora import TARGETS, Lora
from flora.clip.adapters.prompts import PromptContext
from flora.clip.adapters.transport import Plot
from flora.clip.towers.speed import SpeedOptions
from flora.clip.towers.towers import AdaptedClip
from flora.core.low_rank import layers
from flora.core.tree import State
from flora.engine import gradients, recording
from flora.engine.batch import Batch, Step
from flora.engine.gradients import FlatStack, Loss, gradient_function

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def random_adapters_on(model: AdaptedClip, number: int) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in random_adapters(model, number).items()}


def batch_of(model: AdaptedClip, seed: int, *, num_clients: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_clients, 4), generator=generator).to(model.device)
    stem = model.vision.stem(random_pixels(4 * num_clients, seed).to(model.device))
    return Batch({"stem": stem, "labels": labels, "example_mask": torch.ones_like(labels, dtype=torch.bool)})


def loss_of(objective: Objective) -> Loss:
    return Loss((("local.objective", objective),))


def test_gradients_are_finite_differences(tiny_model: str) -> None:
    model = adapt(tiny_model, Lora(towers=("text", "vision"), targets=TARGETS))
    model = AdaptedClip(model.clip, model.adapter, class_names=("cat", "dog", "ox"), templates=("a {}",))
    flat = FlatStack(random_adapters(model, 2), model.device)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        {
            "stem": model.vision.stem(random_pixels(8)),
            "labels": torch.tensor([[0, 1, 2, 0], [1, 1, 2, 2]]),
            "example_mask": torch.ones(2, 4, dtype=torch.bool),
        }
    )
    compute = gradient_function(model, loss_of(CrossEntropy()), flat, None, batch_size=4)
    _, found = compute(flat.matrix, batch)
    direction = torch.randn(flat.matrix.shape, generator=generator, dtype=torch.float64)
    direction /= direction.norm(dim=1, keepdim=True)
    step = 1e-5
    ahead, _ = compute(flat.matrix + step * direction, batch)
    behind, _ = compute(flat.matrix - step * direction, batch)
    expected = (ahead - behind) / (2 * step)
    torch.testing.assert_close((found * direction).sum(dim=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_clients_go_through_the_model_in_parts(
    tiny_model: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(tiny_model, Lora(towers=("text", "vision"), dropout=dropout))
    flat, batch = FlatStack(random_adapters(model, 5), model.device), batch_of(model, 0, num_clients=5)
    sizes: list[int] = []
    encode = model.class_features
    monkeypatch.setattr(
        model, "class_features", lambda number, classes: (sizes.append(number), encode(number, classes))[1]
    )
    results = []
    for at_once in (5, 2, 1):
        monkeypatch.setattr(gradients, "clients_at_once", lambda model, batch_size, at_once=at_once: at_once)
        generators = [torch.Generator().manual_seed(seed) for seed in range(5)] if dropout else None
        compute = gradient_function(model, loss_of(CrossEntropy()), flat, generators, batch_size=4)
        results.append(compute(flat.matrix, batch))
    assert sizes == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    for losses, rows in results[1:]:
        torch.testing.assert_close(losses, results[0][0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(rows, results[0][1], atol=TOLERANCE, rtol=0)


@needs_cuda
@pytest.mark.parametrize(
    "loss",
    [
        loss_of(CrossEntropy()),
        loss_of(Contrastive()),
        dataclasses.replace(loss_of(CrossEntropy()), guide=ProGrad()),
    ],
    ids=["cross entropy", "contrastive", "guided"],
)
@pytest.mark.parametrize("adapter", [Lora(), Lora(towers=("text", "vision"), targets=TARGETS)])
def test_a_recorded_step_is_the_step(tiny_model: str, adapter: Lora, loss: Loss) -> None:
    model = adapt(tiny_model, adapter, device="cuda")
    plain = adapt(tiny_model, adapter, device="cuda", speed=SpeedOptions(cuda_graphs=False))
    flat = FlatStack(random_adapters(model, 2), model.device)
    for seed in range(recording.STEPS_BEFORE_RECORDING + 4):
        batch = batch_of(model, seed)
        expected = gradient_function(plain, loss, flat, None, batch_size=4)(flat.matrix, batch)
        for new_block in (False, True):  # a later block finds what was recorded
            stack = FlatStack(random_adapters(model, 2), model.device) if new_block else flat
            stack.matrix.copy_(flat.matrix)
            found = gradient_function(model, loss, stack, None, batch_size=4)(stack.matrix, batch)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
        flat.matrix.add_(0.01)
        with model.adapter.bind(random_adapters_on(model, 3 + seed)), torch.no_grad():
            model.class_features(3 + seed)  # what a recorded step points into stays where it is
    recorder = recording.Recorder.of(model)
    assert len(recorder.recordings) == 1
    assert recorder.works
    assert not recording.Recorder.of(plain).recordings


@needs_cuda
def test_what_cannot_be_recorded_runs_as_it_is(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    model = adapt(tiny_model, device="cuda")
    flat = FlatStack(random_adapters(model, 2), model.device)
    compute = gradient_function(model, loss_of(CrossEntropy()), flat, None, batch_size=4)
    results = [compute(flat.matrix, batch_of(model, 0))[0] for _ in range(recording.STEPS_BEFORE_RECORDING + 3)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert not recording.Recorder.of(model).works


def test_what_is_recorded(tiny_model: str) -> None:
    """Steps on CUDA, but not those of large adapters, with dropout, or where it is switched off."""

    def recorded(adapter: Adapter, *, dropout: object = None, speed: SpeedOptions = ALL_ON) -> bool:
        attached = adapt(tiny_model, adapter).adapter
        model: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), adapter=attached, speed=speed)
        return recording.is_recorded(model, dropout)

    assert recorded(Lora())
    assert not recorded(FullFineTuning())
    assert not recorded(Lora(dropout=0.1), dropout=[torch.Generator()])
    assert not recorded(Lora(), speed=SpeedOptions(cuda_graphs=False))
    assert not recording.is_recorded(adapt(tiny_model), None)  # on a CPU


class Replays:
    """Stands for CUDA graphs where there is no GPU: each does again what was recorded, on the copies that it reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_bytes: int = 1) -> None:
        self.num_bytes, self.number, self.captured = num_bytes, 0, 0
        monkeypatch.setattr(gradients, "is_recorded", lambda model, dropout: dropout is None)
        monkeypatch.setattr(
            recording.Recorder, "_capture", lambda recorder, *arguments: self._capture(recorder, *arguments)
        )

    def _capture(
        self, recorder: Any, compute: Step, inputs: Sequence[Tensor], names: Sequence[str], residual: State
    ) -> recording.Recording:
        own, own_residual = [each.clone() for each in inputs], {key: each.clone() for key, each in residual.items()}
        outputs = (torch.empty(len(own[0])), torch.empty(0))

        def replay() -> None:
            self.number += 1
            found = compute(own[0], Batch(dict(zip(names, own[1:], strict=True))), own_residual)
            made.outputs = found

        graph: Any = SimpleNamespace(replay=replay)
        self.captured += 1
        made = recording.Recording(graph, tuple(own), own_residual, outputs, self.num_bytes)
        return made


def test_a_recorded_step_is_replayed_for_its_own_layout_alone(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where A and B are equally large, who trains one and who trains the other have steps of the same shapes."""
    model, stack = adapt(tiny_model), random_adapters(adapt(tiny_model), 2)
    kinds = [[name for name in stack if name.endswith(end)] for end in ("lora_B", "lora_A", "")]

    def found() -> list[torch.Tensor]:
        gradients_of = []
        for names in kinds:
            flat = FlatStack(stack, model.device, names)
            compute = gradient_function(model, loss_of(CrossEntropy()), flat, None, batch_size=4)
            gradients_of += [compute(flat.matrix, batch_of(model, seed))[1].clone() for seed in range(6)]
        return gradients_of

    plain = found()
    replays = Replays(monkeypatch)
    for ours, expected in zip(found(), plain, strict=True):
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    assert replays.number == 3 * 2


def test_a_recorded_step_takes_the_residual_of_its_block(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 3 and 4 share a recording, in which zeros fill what a rank leaves; each block's residual is its own."""
    model = adapt(tiny_model, Lora())
    stack = random_adapters(model, 2)
    flat, seeds = FlatStack(stack, model.device), range(6)

    def residual(rank: int) -> State:
        generator = torch.Generator().manual_seed(rank)
        factors: State = {}
        for layer in layers(stack):
            d_in, d_out = stack[f"{layer}.lora_A"].shape[2], stack[f"{layer}.lora_B"].shape[1]
            factors[f"{layer}.residual_A"] = torch.randn(1, rank, d_in, generator=generator, dtype=torch.float64)
            factors[f"{layer}.residual_B"] = torch.randn(1, d_out, rank, generator=generator, dtype=torch.float64)
        return factors

    def found(rank: int) -> list[torch.Tensor]:
        shared = residual(rank)
        compute = gradient_function(model, loss_of(CrossEntropy()), flat, None, batch_size=4, shared_residual=shared)
        return [compute(flat.matrix, batch_of(model, seed))[1].clone() for seed in seeds]

    ranks = (3, 4, 3, 0, 5)
    plain = [found(rank) for rank in ranks]
    assert not torch.equal(plain[0][0], plain[1][0])
    replays = Replays(monkeypatch)
    for rank, expected in zip(ranks, plain, strict=True):
        for ours, theirs in zip(found(rank), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    assert replays.captured == 3  # ranks of up to 4, 0 and up to 8
    assert replays.number == 2 + 6 + 6 + 2 + 2


def test_the_recordings_of_a_model_are_bounded(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was not used for longest goes first; beyond the memory that they may take all do."""
    model, enough = adapt(tiny_model), recording.STEPS_BEFORE_RECORDING + 1
    recorder = recording.Recorder.of(model)
    monkeypatch.setattr(recording, "MAX_RECORDINGS", 2)
    replays = Replays(monkeypatch)

    def steps(num_clients: int, number: int) -> None:
        flat = FlatStack(random_adapters(model, num_clients), model.device)
        compute = gradient_function(model, loss_of(CrossEntropy()), flat, None, batch_size=4)
        for _ in range(number):
            compute(flat.matrix, batch_of(model, 0, num_clients=num_clients))

    def recorded() -> list[int]:
        return [len(each.inputs[0]) for each in recorder.recordings.values()]

    steps(1, enough)
    steps(2, enough)
    steps(1, 1)
    assert recorded() == [2, 1]
    steps(3, enough)
    assert recorded() == [1, 3]
    steps(2, enough - 1)
    assert recorded() == [1, 3]
    recorder.max_bytes = 3
    replays.num_bytes = 2
    steps(2, 1)  # 1 + 1 + 2 bytes
    assert recorded() == [] and recorder.works
    replays.num_bytes = 4
    steps(2, enough)
    assert recorded() == [] and not recorder.works
    monkeypatch.setattr(recording, "MAX_COUNTED", 3)
    recorder.works = True
    for num_clients in range(1, 7):
        steps(num_clients, 1)
    assert len(recorder.counts) == 3


@pytest.mark.parametrize(
    "adapter",
    [Lora(), Lora(towers=("text", "vision"), targets=TARGETS), PromptContext(), Plot(), DualLora()],
    ids=lambda adapter: type(adapter).__name__,
)
@pytest.mark.parametrize("at_once", [5, 2])
def test_clients_that_start_from_one_adapter_encode_the_classes_once(
    tiny_model: str, adapter: Adapter, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "clients_at_once", lambda model, batch_size: at_once)
    batch = batch_of(adapt(tiny_model, adapter), 0, num_clients=5)
    results, sizes = [], []
    for speed in (ALL_ON, dataclasses.replace(ALL_ON, share_first_step=False)):
        model = adapt(tiny_model, adapter, speed=speed)
        encode = model.class_features
        monkeypatch.setattr(
            model,
            "class_features",
            lambda number, classes=None, encode=encode: (sizes.append(number), encode(number, classes))[1],
        )
        stack = {name: tensor[:1].expand(5, *tensor.shape[1:]) for name, tensor in random_adapters(model, 1).items()}
        flat = FlatStack(stack, model.device)
        compute = gradient_function(model, loss_of(CrossEntropy()), flat, None, batch_size=4)
        for _ in range(2):
            results.append(compute(flat.matrix, batch))
            flat.matrix[2:] += 0.01  # now they differ
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)
    assert results[0][1].abs().max() > 0 and not torch.equal(results[0][1][0], results[0][1][1])
    parts = [5] if at_once == 5 else [2, 2, 1]
    if isinstance(adapter, DualLora):  # two models, each with its own classes
        parts = [part for part in parts for _ in range(2)]
        assert sizes == parts * 4
    else:
        assert sizes == [1] * len(parts) + parts * 3


@pytest.mark.parametrize(
    ("of_client", "num_encoded"),
    [
        ([0, 1, 2, 0, 1, 2], 3),
        ([0, 1, 1, 0, 1, 0, 1], 2),
        ([0, 1, 0, 0, 0, 0, 0], 7),  # backward passes for six clients of each adapter would be more than it saves
        ([0, 1, 2, 3, 4, 4], 6),
        ([0, 1, 2, 3, 4, 5], 6),
    ],
    ids=str,
)
def test_clients_of_several_runs_encode_the_classes_once_for_each_adapter_that_they_start_from(
    tiny_model: str, of_client: list[int], num_encoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Lora(towers=("text", "vision"), targets=TARGETS)
    batch = batch_of(adapt(tiny_model, adapter), 0, num_clients=len(of_client))
    results, sizes = [], []
    for speed in (ALL_ON, dataclasses.replace(ALL_ON, share_first_step=False)):
        model = adapt(tiny_model, adapter, speed=speed)
        encode = model.class_features
        monkeypatch.setattr(
            model,
            "class_features",
            lambda number, classes=None, encode=encode: (sizes.append(number), encode(number, classes))[1],
        )
        different = random_adapters(model, max(of_client) + 1)
        flat = FlatStack({name: tensor[of_client] for name, tensor in different.items()}, model.device)
        results.append(gradient_function(model, loss_of(CrossEntropy()), flat, None, batch_size=4)(flat.matrix, batch))
    assert sizes == [num_encoded, len(of_client)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
