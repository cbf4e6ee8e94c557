"""A whole small experiment, features included: the naive loop against ours. Part of `flora.benchmark`."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from flora.benchmark.variants import LEARNING_RATE, TEMPLATE, Setting, fresh_adapter, plain_loss
from flora.client.local_training import LocalTraining
from flora.clip.frozen import FrozenClip
from flora.clip.towers.towers import AdaptedClip
from flora.communication.participation import Participation
from flora.communication.sampling import Uniform
from flora.core import tree
from flora.core.rng import Rng
from flora.core.states import ClientData, ServerState
from flora.data.batching import BatchSizes, client_batches
from flora.engine.engine import Engine
from flora.evaluation.accuracy import evaluate
from flora.features.features import StoredFeatures
from flora.federated.federation import Federation
from flora.federated.round import run_round
from flora.federated.synchronous import Synchronous

NUM_ROUNDS, STEPS_PER_ROUND = 2, 2


def naive_experiment(setting: Setting) -> Callable[[], tree.State]:
    """Each client in turn, image tower and padded prompts in each step; then the mean, and an evaluation a round.

    Clients see the same batches as in `our_experiment`, so that both come to the same adapter.
    """
    clip = setting.load()
    pixels, labels, examples = _data(setting, clip)
    tokens = clip.tokenize([TEMPLATE.format(name) for name in setting.class_names]).to(setting.device)
    attached = setting.lora().attach(clip)

    def train(adapter: tree.State, own: np.ndarray, rng: Rng) -> tree.State:
        trained = {name: tensor[None].clone().requires_grad_() for name, tensor in adapter.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE)
        with attached.bind(trained):
            order, _ = client_batches(own, rng, BatchSizes(setting.batch_size, setting.batch_size, STEPS_PER_ROUND))
            for batch in order:
                texts = tokens if setting.objective == "cross_entropy" else tokens[labels[batch]]
                images, features, scale = clip.model(pixels[batch], texts)
                optimizer.zero_grad()
                plain_loss(scale * images @ features.T, labels[batch], setting).backward()
                optimizer.step()
        return {name: tensor.detach()[0] for name, tensor in trained.items()}

    def run() -> tree.State:
        adapter = fresh_adapter(attached, None)
        for round in range(1, NUM_ROUNDS + 1):
            rngs = [Rng(0).child("round", round).child("client", client) for client in range(len(examples))]
            trained = [train(adapter, own, rng) for own, rng in zip(examples, rngs, strict=True)]
            adapter = tree.weighted_mean(trained, [1] * len(examples))
            with torch.no_grad(), attached.bind(tree.expand(adapter, 1)):
                images, texts, _ = clip.model(pixels, tokens)
                (images @ texts.T).argmax(dim=-1)
        return adapter

    return run


def our_experiment(setting: Setting) -> Callable[[], tree.State]:
    """The rounds of `naive_experiment` by the simulator, its features computed first."""
    clip = setting.load()
    pixels, labels, examples = _data(setting, clip)
    attached = setting.lora().attach(clip)
    model = AdaptedClip(clip, attached, class_names=setting.class_names, templates=(TEMPLATE,))

    def run() -> tree.State:
        stem = torch.cat([model.vision.stem(part) for part in pixels.split(8)])
        rows = torch.arange(len(labels), device=setting.torch_device)
        features = StoredFeatures(stem, rows, labels.cpu(), np.arange(len(labels)))
        federation = Federation(
            engine=Engine(model, features, setting.num_clients),
            clients=[ClientData(own, np.array([], dtype=np.int64)) for own in examples],
            participation=Participation(Uniform(), np.array([len(own) for own in examples])),
            local=LocalTraining(learning_rate=LEARNING_RATE, batch_size=setting.batch_size, objective=setting.loss()),
            schedule=Synchronous(),
            num_rounds=NUM_ROUNDS,
            rng=Rng(0),
        )
        state = ServerState(0, fresh_adapter(attached, None))
        for _ in range(NUM_ROUNDS):
            state, _ = run_round(federation, state)
            evaluate(model, tree.expand(state.adapter, 1), features, batch_size=256)
        return state.adapter

    return run


EXPERIMENTS = {"naive": naive_experiment, "ours": our_experiment}


def measure_experiment(name: str, setting: Setting) -> float:
    """Seconds for all rounds and evaluations, the model being loaded."""
    run = EXPERIMENTS[name](setting)
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _data(setting: Setting, clip: FrozenClip) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """Random images and labels, and each client's share: whole batches for every step of a round."""
    number = setting.num_clients * setting.batch_size * STEPS_PER_ROUND
    generator = Rng(0).child("images").torch()
    pixels = torch.randn(number, 3, *clip.architecture.image_size, generator=generator)
    labels = torch.randint(setting.num_classes, (number,), generator=generator)
    shares = np.arange(number).reshape(setting.num_clients, -1)
    return pixels.to(setting.torch_device, clip.dtype), labels.to(setting.torch_device), list(shares)
