"""Safe YAML without its traps: no key twice, no merge keys, and neither dates nor `1:30` are numbers."""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from flora.core.errors import ConfigError
from flora.core.files import open_regular
from flora.core.registry import show, suggest

MAX_CONFIG_BYTES = 1_000_000
SHIPPED = Path(__file__).parents[1] / "assets"

# What PyYAML raises on text that is not YAML, and on a value that doesn't fit its tag (`!!bool 3`).
YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError)


class _Loader(yaml.SafeLoader):
    """Reads less than YAML 1.1 does as something other than text, so whatever `yaml.safe_dump` writes comes back."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML's own)


def _plain(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), list(first))


_plain("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO")
_plain("null", "~|null|Null|NULL|", "~nN\0")
_Loader.yaml_implicit_resolvers.setdefault("", []).extend(_Loader.yaml_implicit_resolvers["\0"])
# YAML 1.1 has octal (010), binary and sexagesimal (1:30) numbers besides: here these are text, which no number takes.
_plain("int", r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+", "-+0123456789")
_plain(
    "float",
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        problem = None
        if not isinstance(key, str):
            problem = f"key {key!r} is not a string"
        elif key == "<<":
            problem = "merge keys (<<) are not read; write the options themselves"
        elif key in seen:
            problem = f"key {key!r} is given twice"
        if problem:
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_plain_yaml(text: str) -> Any:
    """The value that `text` stands for. Raises one of `YAML_ERRORS`, for which `yaml_reason` has words."""
    return copy.deepcopy(_read(text))


@lru_cache(maxsize=64)  # the runs of a sweep read one file, and few values, again and again
def _read(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506  (derives from SafeLoader)


def yaml_reason(error: Exception) -> str:
    """Why text is not YAML, on one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if not isinstance(error, yaml.YAMLError | ValueError):
        return "a value doesn't fit its tag"
    return " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")


def shipped(path: Path) -> Path:
    """The file at `path`, or, where there is none, the experiment that the package ships under this name."""
    shipped = SHIPPED / f"{path}.yaml"
    return shipped if not path.exists() and len(path.parts) == 1 and shipped.is_file() else path


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked. Raises `ConfigError` if it can't be read or is no mapping."""
    try:
        with open_regular(path) as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes, which no experiment needs")
        raw = read_plain_yaml(content.decode())
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError):
            known = [str(other) for other in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
            hint = f"; {suggest(str(path), known)}" if known else ""
        elif (path / "config.yaml").is_file():
            hint = f"; --resume goes on with a run, {path / 'config.yaml'} makes it again"
        raise ConfigError(f"{path}: {error.strerror}{hint}") from None
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}: not valid YAML: {yaml_reason(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {show(raw)}")
    return raw
