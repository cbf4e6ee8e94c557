"""Components and options: bounds, names, suggestions, and what `--list` says about all of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from flora.client.local_training import LocalTraining
from flora.config.listing import list_components
from flora.config.schema import ClientOptions, EvaluationOptions, ExperimentConfig, ServerOptions
from flora.core import registry
from flora.core.registry import (
    Bounds,
    Component,
    OptionError,
    Options,
    components,
    kind_of,
    kinds,
    name_of,
    option,
    register,
    suggest,
)
from flora.data.partition import Dirichlet, Partitioner


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", {kind: dict(known) for kind, known in registry._REGISTRY.items()})


def all_components() -> list[tuple[str, type[Component]]]:
    """Every component that the package ships (not those of the tests), with its name."""
    found = [pair for kind in kinds() for pair in components(kind).items()]
    return [(name, component) for name, component in found if component.__module__.startswith("flora.")]


@pytest.mark.parametrize(
    ("bounds", "allowed", "refused"),
    [
        (Bounds(above=0), (1e-300, 3, None), (0, -1, math.nan, math.inf)),
        (Bounds(at_least=1), (1, 10**400), (0, -(10**400))),
        (Bounds(below=1), (0.999, -5), (1, 1.0)),
        (Bounds(at_most=1), (1, 0), (1.01, math.inf)),
        (Bounds(above=0, at_most=1), (0.5, 1, (0.1, 1)), (0, 2, (0.1, 2))),
        (Bounds(choices=("a", "b")), ("a", ("a", "b"), None, ()), ("c", ("a", "c"), 3)),
        (Bounds(), (1, "x", None, True, ("x",), {}), (math.nan, math.inf, (1.0, math.nan))),
    ],
)
def test_bounds(bounds: Bounds, allowed: tuple[Any, ...], refused: tuple[Any, ...]) -> None:
    assert all(bounds.allow(value) for value in allowed)
    assert not any(bounds.allow(value) for value in refused)


def test_bounds_in_words() -> None:
    assert Bounds(above=0, at_most=1).describe() == "a number above 0 and at most 1"
    assert Bounds(at_least=0, below=1).describe() == "a number at least 0 and below 1"
    assert Bounds(choices=("a", "b")).describe() == "one of a, b"


def test_options_check_bounds_then_themselves() -> None:
    @dataclass(frozen=True)
    class Fruit(Options):
        weight: float = option("grams", 1.0, above=0)
        kind: str = option("what it is", "apple", choices=("apple", "pear"))

        def check(self) -> None:
            if self.kind == "pear" and self.weight > 100:
                raise OptionError("weight", "no pear is that heavy")

    assert Fruit(kind="pear").weight == 1
    with pytest.raises(OptionError, match=r"^weight: expected a number above 0, got 0$"):
        Fruit(weight=0)
    with pytest.raises(OptionError, match=r"^kind: expected one of apple, pear, got 'plum'$"):
        Fruit(kind="plum")
    with pytest.raises(OptionError, match=r"^weight: no pear is that heavy$"):
        Fruit(weight=101, kind="pear")


def test_an_option_is_a_field_with_help() -> None:
    field = next(field for field in dataclasses.fields(Dirichlet) if field.name == "concentration")
    assert field.default == 0.1
    assert field.metadata["bounds"] == Bounds(above=0)
    assert field.metadata["help"]


def test_an_option_error_names_the_option_if_there_is_one() -> None:
    assert str(OptionError("local.steps", "too many")) == "local.steps: too many"
    assert str(OptionError("", "too many")) == "too many"


def test_registering() -> None:
    @register("cake")
    @dataclass(frozen=True)
    class Cake(Partitioner):
        def split(self, labels: Any, num_clients: Any, rng: Any, *, groups: Any = None) -> Any:
            return []

    assert components(Partitioner)["cake"] is Cake
    assert name_of(Cake()) == "cake"
    assert kind_of(Cake) is Partitioner


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Partitioner 'iid' is registered already"):
        register("iid")(Dirichlet)
    register("dirichlet")(Dirichlet)  # the same class again, as when a module is reloaded


def test_one_name_may_mean_a_component_of_each_kind() -> None:
    @dataclass(frozen=True)
    class Drink(Component):
        pass

    @register("iid")
    @dataclass(frozen=True)
    class Tea(Drink):
        pass

    assert components(Drink) == {"iid": Tea}
    assert components(Partitioner)["iid"] is not Tea


def test_the_known_components_cannot_be_changed_by_accident() -> None:
    components(Partitioner).clear()
    assert components(Partitioner)


def test_suggestions() -> None:
    assert suggest("dirichlett", ["iid", "dirichlet"]) == "did you mean 'dirichlet'?"
    assert suggest("vit-b-32", ["ViT-B-16", "ViT-B-32"]) == "did you mean 'ViT-B-32'?"
    assert suggest("zebra", ["iid", "dirichlet"]) == "expected one of iid, dirichlet"
    assert suggest("num_test", ["of"]) == "expected 'of'"
    many = suggest("zebra", [f"name{i}" for i in range(500)])
    assert many.startswith("the nearest of the 500 known names are name")
    assert len(many) < 100


@pytest.mark.parametrize(
    "component", [component for _, component in all_components()], ids=lambda component: component.__name__
)
def test_every_component_says_what_it_is(component: type[Component]) -> None:
    assert "__doc__" in vars(component)
    first = (component.__doc__ or "").strip().splitlines()[0]
    assert first.endswith(".")
    # A dataclass without a docstring is given its signature as one.
    assert not first.startswith(f"{component.__name__}(")


SECTIONS: list[type[Options]] = [ExperimentConfig, ClientOptions, ServerOptions, LocalTraining, EvaluationOptions]


@pytest.mark.parametrize("cls", [*SECTIONS, *(cls for _, cls in all_components())], ids=lambda cls: cls.__name__)
def test_every_option_has_help_and_is_frozen(cls: type[Options]) -> None:
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for field in dataclasses.fields(cls):
        assert field.metadata["help"].strip(), field.name
        assert "\n" not in field.metadata["help"]
        assert field.default_factory is dataclasses.MISSING


def test_the_list_has_every_component_and_option() -> None:
    text = list_components()
    lines = text.splitlines()
    for kind in kinds():
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{kind.__name__.upper()}: "))
        for name, component in components(kind).items():
            place = next(i for i, line in enumerate(lines[start:], start) if line.startswith(f"  {name}: "))
            options = lines[place + 1 : place + 1 + len(dataclasses.fields(component))]
            for field, line in zip(dataclasses.fields(component), options, strict=True):
                assert line.startswith(f"      {field.name}: ")
                assert field.metadata["help"] in line
    for section in SECTIONS:
        for field in dataclasses.fields(section):
            assert any(line.startswith(f"  {field.name}: ") and field.metadata["help"] in line for line in lines)


def test_the_list_shows_what_presets_set() -> None:
    text = list_components()
    assert "\n  paper: as FLoRA's released code (arXiv:2404.15182)\n" in text
    assert "\n      local.learning_rate: 5e-05\n" in text
    assert "\n      adapter.alpha: 32.0  (where adapter is lora)\n" in text
    assert "\n      partition.cap: 1.0  (where partition is dirichlet)\n" in text


def test_the_list_shows_defaults_and_bounds() -> None:
    text = list_components()
    assert "  seed: 0  root of all random numbers [a number at least 0]" in text
    assert "  root: (required)  " in text
    assert "  adapter: lora  " in text
    assert "  layers: none  " in text
    assert "[one of alpha/r, alpha/sqrt(r), alpha]" in text
