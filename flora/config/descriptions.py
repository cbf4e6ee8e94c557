"""Read the file of `prompts.descriptions`: sentences for some classes, by the data set's names of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flora.config.plain_yaml import YAML_ERRORS, read_plain_yaml, yaml_reason
from flora.core.errors import UserError
from flora.core.files import open_regular
from flora.core.registry import show, suggest
from flora.data.prompts import has_other_braces

# Ten times what a thousand classes with ten sentences each take.
MAX_BYTES = 10_000_000
# The setting that names such a file, unless another does.
SETTING = "prompts.descriptions"


def read_descriptions(path: str, setting: str = SETTING) -> dict[str, tuple[str, ...]]:
    """The sentences of each class that a file names, which `setting` names.

    Raises `UserError` naming both and what is wrong with it.
    """
    where = f"{setting}: {path}"
    raw = _content(path, where)
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a mapping of class names to sentences, got {show(raw)}")
    if not raw:
        raise UserError(f"{where}: describes no class")
    return {name: _sentences(where, name, sentences) for name, sentences in raw.items()}


def check_known(
    path: str, descriptions: Mapping[str, Sequence[str]], class_names: Sequence[str], setting: str = SETTING
) -> None:
    """Raise `UserError` if a class is described that the data set, which has `class_names`, doesn't have."""
    unknown = next((name for name in descriptions if name not in class_names), None)
    if unknown is not None:
        raise UserError(f"{setting}: {path}: no class is called {show(unknown)}; {suggest(unknown, class_names)}")


def _content(path: str, where: str) -> Any:
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{where}: larger than {MAX_BYTES:,} bytes")
        text = content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_distinct) if path.endswith(".json") else read_plain_yaml(text)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except YAML_ERRORS as error:
        kind = "JSON" if path.endswith(".json") else "YAML"
        raise UserError(f"{where}: not valid {kind}: {yaml_reason(error)}") from None


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's content. Raises ValueError if it has a key twice."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {show(key)} is given twice")
        content[key] = value
    return content


def _sentences(where: str, name: str, given: Any) -> tuple[str, ...]:
    sentences = [given] if isinstance(given, str) else given
    if not isinstance(sentences, list):
        raise UserError(f"{where}: class {show(name)}: expected a sentence or a list of sentences, got {show(given)}")
    if not sentences:
        raise UserError(f"{where}: class {show(name)} has an empty list: leave it out, or give it a sentence")
    for sentence in sentences:
        if not isinstance(sentence, str) or not sentence.strip():
            raise UserError(f"{where}: class {show(name)}: expected a sentence, got {show(sentence)}")
        if sentence.count("{}") > 1 or has_other_braces(sentence):
            raise UserError(
                f"{where}: class {show(name)}: expected at most one {{}} for the class name and no other braces, got "
                f"{show(sentence)}"
            )
    return tuple(sentences)
