"""The texts that stand for the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flora.core.registry import OptionError, Options, option


@dataclass(frozen=True)
class PromptOptions(Options):
    """The texts that stand for the classes. Several templates make an ensemble: their text features are averaged."""

    templates: tuple[str, ...] | None = option("texts with {} for the class name; none: the data set's own", None)
    class_names: dict[str, str] | tuple[str, ...] | None = option(
        "names in place of the data set's: a list of all, or a mapping of some; none: the data set's own", None
    )

    descriptions: str | None = option(
        "a YAML or JSON file with more sentences for some classes, by the data set's names of them: a sentence or a "
        "list, each with or without {} for the class name; they join the templates' ensemble (arXiv:2210.07183)",
        None,
    )

    def check(self) -> None:
        if self.templates is not None and not self.templates:
            raise OptionError("templates", "expected at least one template, or none for the data set's own")
        check_templates(self.templates or ())

    def rename(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The class names to put into the templates, in the order of `names`, the data set's.

        Raises `OptionError` if there are too few or too many, a renamed class does not exist, or two become one.
        """
        if isinstance(self.class_names, tuple) and len(self.class_names) != len(names):
            raise OptionError("class_names", f"expected {len(names)} names, one a class, got {len(self.class_names)}")
        if isinstance(self.class_names, tuple):
            names = self.class_names
        if isinstance(self.class_names, dict):
            unknown = sorted(set(self.class_names) - set(names))
            if unknown:
                raise OptionError(
                    "class_names", f"no class is called {unknown[0]!r}; expected any of {', '.join(names)}"
                )
            names = tuple(self.class_names.get(name, name) for name in names)
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise OptionError("class_names", f"two classes are called {twice!r}")
        return names


def check_templates(templates: Sequence[str]) -> None:
    """Raise `OptionError` for a template without one {} for the class name, or with other braces."""
    for template in templates:
        if template.count("{}") != 1 or has_other_braces(template):
            raise OptionError(
                "templates", f"expected one {{}} for the class name and no other braces, got {template!r}"
            )


def has_other_braces(text: str) -> bool:
    """Whether a text has braces besides {}."""
    rest = text.replace("{}", "")
    return "{" in rest or "}" in rest
