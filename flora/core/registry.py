"""Components: frozen dataclasses, registered under a name, whose fields are their YAML options."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from flora.core.errors import UserError

MAX_SUGGESTIONS = 40

T = TypeVar("T", bound="type[Component]")


class OptionError(UserError):
    """An option's value is not allowed. `option` is its dotted name below the object it belongs to.

    `others` are the mistakes that were found beside it.
    """

    def __init__(self, option: str, message: str, others: Sequence[OptionError] = ()) -> None:
        super().__init__(f"{option}: {message}" if option else message)
        self.option = option
        self.message = message
        self.others = tuple(others)

    def in_section(self, section: str) -> OptionError:
        """Return this error with the option's name below `section`."""
        others = [other.in_section(section) for other in self.others]
        return OptionError(".".join(part for part in (section, self.option) if part), self.message, others)


@dataclass(frozen=True)
class Bounds:
    """What a number, string or list may be; every limit that is None is not checked."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] | None = None

    def describe(self) -> str:
        """The bounds as words: "a number above 0 and at most 1"."""
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        words = (("above", self.above), ("at least", self.at_least), ("below", self.below), ("at most", self.at_most))
        limits = " and ".join(f"{word} {_number(limit)}" for word, limit in words if limit is not None)
        return f"a number {limits}" if limits else "a finite number"

    def allow(self, value: Any) -> bool:
        """Whether `value` (or each element of it) lies within the bounds; None always does."""
        if value is None:
            return True
        if isinstance(value, tuple):
            return all(self.allow(element) for element in value)
        if self.choices is not None:
            return value in self.choices
        if not isinstance(value, int | float) or isinstance(value, bool):
            return True
        return not (isinstance(value, float) and not math.isfinite(value)) and not (
            (self.above is not None and value <= self.above)
            or (self.at_least is not None and value < self.at_least)
            or (self.below is not None and value >= self.below)
            or (self.at_most is not None and value > self.at_most)
        )


def _number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) and limit >= 10_000 else f"{limit:g}"


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field that is a YAML option: one line of help, a default (none: required) and bounds."""
    bounds = Bounds(above, at_least, below, at_most, None if choices is None else tuple(choices))
    return dataclasses.field(default=default, metadata={"help": help, "bounds": bounds})


@dataclass(frozen=True)
class Options:
    """A group of options. Construction checks every field's bounds, then `check`."""

    def __post_init__(self) -> None:
        mistakes = out_of_bounds(
            type(self), {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        )
        if mistakes:
            raise OptionError(mistakes[0].option, mistakes[0].message, mistakes[1:])
        self.check()

    def check(self) -> None:
        """Raise `OptionError` where options contradict each other."""


def out_of_bounds(options: type[Options], values: Mapping[str, Any]) -> list[OptionError]:
    """An error for each of `values`, by the name of its option, that the option's bounds don't allow."""
    mistakes = []
    for field in dataclasses.fields(options):
        bounds, value = field.metadata.get("bounds", Bounds()), values.get(field.name)
        if not bounds.allow(value):
            shown = list(value) if isinstance(value, tuple) else value
            mistakes.append(OptionError(field.name, f"expected {bounds.describe()}, got {show(shown)}"))
    return mistakes


@dataclass(frozen=True)
class Component(Options):
    """An exchangeable part. A direct subclass is a kind (`Partitioner`); subclasses of that are registered."""


_REGISTRY: dict[type[Component], dict[str, type[Component]]] = {}


def kind_of(component: type[Component]) -> type[Component]:
    """The kind a component class belongs to: its ancestor that derives from `Component` directly."""
    return next(base for base in component.__mro__ if Component in base.__bases__)


def register(name: str) -> Callable[[T], T]:
    """Class decorator: makes a component available in YAML as `name`. Raises ValueError if the name is taken."""

    def decorate(component: T) -> T:
        known = _REGISTRY.setdefault(kind_of(component), {})
        misspelt = _misspelt(component)
        if misspelt is not None:
            raise ValueError(f"{component.__name__}: nothing reads {misspelt[0]!r}; did you mean {misspelt[1]!r}?")
        if name in known and known[name].__qualname__ != component.__qualname__:
            raise ValueError(f"{kind_of(component).__name__} {name!r} is registered already")
        known[name] = component
        return component

    return decorate


def _misspelt(component: type[Component]) -> tuple[str, str] | None:
    """A public name of a class that is nearly one of its bases', and that name: such a slip would change nothing."""
    bases = {name for base in component.__mro__[1:] for name in vars(base) if not name.startswith("_")}
    options = {field.name for field in dataclasses.fields(component)}
    for name in vars(component):
        if name.startswith("_") or name in bases or name in options:
            continue
        nearest = difflib.get_close_matches(name, bases, n=1, cutoff=0.85)
        if nearest:
            return name, nearest[0]
    return None


def kinds() -> list[type[Component]]:
    """All kinds of component, in the order of registration."""
    return list(_REGISTRY)


def components(kind: type[Component]) -> dict[str, type[Component]]:
    """The registered components of one kind, by name."""
    return dict(_REGISTRY.get(kind, {}))


def name_of(component: Component) -> str:
    """The name under which the component's class is registered."""
    known = _REGISTRY[kind_of(type(component))]
    return next(name for name, registered in known.items() if registered is type(component))


def suggest(unknown: str, known: Iterable[str]) -> str:
    """Suggest, after an unknown name, the nearest known one, or all of them, or the five nearest of very many."""
    names = {name.casefold(): name for name in known}
    nearest = difflib.get_close_matches(unknown.casefold(), names, n=1)
    if nearest:
        return f"did you mean {names[nearest[0]]!r}?"
    if len(names) == 1:
        return f"expected {next(iter(names.values()))!r}"
    if len(names) <= MAX_SUGGESTIONS:
        return "expected one of " + ", ".join(names.values())
    closest = difflib.get_close_matches(unknown.casefold(), names, n=5, cutoff=0.0)
    return f"the nearest of the {len(names)} known names are {', '.join(names[name] for name in closest)}"


class _Short(reprlib.Repr):
    """Limits the work too: a few lines of YAML aliases can stand for gigabytes of text."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**40 else "a number of more than 40 digits"

    def repr_bool(self, x: bool, level: int) -> str:
        return "true" if x else "false"

    def repr_NoneType(self, x: None, level: int) -> str:
        return "null"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def show(raw: Any) -> str:
    """A value as an error message shows it: short, on one line, with the words of YAML (null, true, false)."""
    text = _SHORT.repr(raw)
    return text if len(text) <= 80 else f"{text[:77]}..."


def dotted(keys: Sequence[Any]) -> str:
    """Keys as an error message shows them; one that could not be a name is quoted."""
    return ".".join(key if isinstance(key, str) and key.isidentifier() else show(key) for key in keys)
