"""The adapter that a run begins from, where `adapter.start` names a file of another one."""

from __future__ import annotations

import math
from pathlib import Path

from flora.clip.adapters.files import read_low_rank
from flora.clip.adapters.lora import Lora
from flora.clip.towers.towers import AdaptedClip
from flora.config.schema import ExperimentConfig
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.core.tree import State


def starting_adapter(config: ExperimentConfig, model: AdaptedClip) -> State:
    """The factors that `adapter.start` names, in the model's types; empty where it names none.

    Raises `OptionError` if the file can't be read, or its factors are not those of the adapter that is configured.
    """
    options = config.adapter
    if not isinstance(options, Lora) or options.start is None:
        return {}
    try:
        given = read_low_rank(Path(options.start))
    except UserError as error:
        raise OptionError("adapter.start", str(error)) from None
    initial = model.adapter.initial_state(Rng(0))
    expected = {name for name in initial if name.rpartition(".")[2] in ("lora_A", "lora_B")}
    missing, surplus = sorted(expected - given.tensors.keys()), sorted(given.tensors.keys() - expected)
    if missing or surplus:
        what = f"it has nothing for {missing[0]}" if missing else f"it has {surplus[0]}, which is not adapted here"
        raise OptionError(
            "adapter.start", f"{options.start}: {what}; adapter.towers, targets and layers must be its own"
        )
    for name, tensor in given.tensors.items():
        if tensor.shape != initial[name].shape:
            shape, here = list(tensor.shape), list(initial[name].shape)
            raise OptionError("adapter.start", f"{options.start}: {name} is {shape}, expected {here} (adapter.rank)")
    if not math.isclose(given.factor, options.factor, rel_tol=1e-9):
        raise OptionError(
            "adapter.start",
            f"{options.start}: its factors are multiplied by {given.factor:g}, here by {options.factor:g} "
            "(adapter.alpha, adapter.scaling)",
        )
    return {name: given.tensors[name].to(initial[name].dtype) for name in initial if name in expected}
