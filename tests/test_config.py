"""From YAML and overrides to a config: what is read, and what each mistake is answered with."""

from __future__ import annotations

import copy
import io
import os
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from flora.client.optimizers import AdamW, Cosine, Sgd
from flora.clip.adapters.lora import Lora
from flora.communication.sampling import BySize
from flora.config.parse import config_to_dict, load_config, parse_config
from flora.config.plain_yaml import MAX_CONFIG_BYTES
from flora.config.schema import ExperimentConfig
from flora.core.errors import ConfigError
from flora.core.registry import OptionError
from flora.data.partition import Dirichlet, Iid
from flora.simulate import main

MINIMAL = {"data": "patterns", "partition": "iid"}
EXPERIMENTS = sorted(
    path for path in (Path(__file__).parents[1] / "experiments").rglob("*.yaml") if path.parent.name != "descriptions"
)


@pytest.fixture
def config_file(tmp_path: Path, raw_config: dict[str, Any]) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw_config))
    return path


def error_of(path: Path, *overrides: str) -> str:
    """The message of the `ConfigError` that loading raises, which is one line that can be printed."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    return str(caught.value).removeprefix(f"{path}: ")


def text_error(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "text.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return error_of(path)


# What is read


def test_a_minimal_config_has_all_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.partition == Iid()
    assert config.adapter == Lora()
    assert config.rounds == 20
    assert config.local.optimizer == AdamW()


def test_a_config_survives_yaml(raw_config: dict[str, Any]) -> None:
    raw_config |= {
        "seed": 2**63 - 1,
        "prompts": {"templates": ["a {}", "the {}!"], "class_names": {"thing 0": "häm: 'ster'"}},
        "adapter": {"name": "lora", "layers": [0, -1], "towers": ["vision", "text"], "alpha": 1e-3},
        "local": {"optimizer": {"name": "sgd", "momentum": 0.9}, "schedule": "cosine", "clip_norm": 1, "steps": 3},
        "clients": {"number": 3, "cohort": {"name": "by_size", "fraction": 0.5}, "per_block": 2},
    }
    config = parse_config(raw_config)
    written = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    assert parse_config(yaml.safe_load(written)) == config


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_every_experiment_survives_yaml(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert parse_config(yaml.safe_load(yaml.safe_dump(config_to_dict(config)))) == config


def test_parsing_leaves_its_input_alone(raw_config: dict[str, Any]) -> None:
    before = copy.deepcopy(raw_config)
    parse_config(raw_config)
    assert raw_config == before


def test_an_unnamed_experiment_is_called_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "my-experiment.yaml"
    path.write_text("data: patterns\npartition: iid\n")
    assert load_config(path).name == "my-experiment"
    assert load_config(path, ["name=other"]).name == "other"


def test_numbers_in_scientific_notation_need_no_dot() -> None:
    config = parse_config(MINIMAL | {"local": {"learning_rate": "1e-3"}})
    assert config.local.learning_rate == 1e-3


def test_a_whole_number_is_a_number(config_file: Path) -> None:
    alpha = load_config(config_file, ["adapter.alpha=4"]).adapter.alpha  # type: ignore[attr-defined]
    assert alpha == 4.0
    assert type(alpha) is float


def test_options_of_a_default_component_need_no_name() -> None:
    config = parse_config(MINIMAL | {"local": {"optimizer": {"beta1": 0.5}}})
    assert config.local.optimizer == AdamW(beta1=0.5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rounds=7"], {"rounds": 7}),
        (["partition=iid"], {"partition": Iid()}),
        (["partition.concentration=0.3"], {"partition": Dirichlet(0.3, 3)}),
        (["partition={name: dirichlet, concentration: 2}"], {"partition": Dirichlet(2.0, 3)}),
        (["adapter.layers=[0, -1]"], {"adapter": Lora(rank=2, layers=(0, -1))}),
        (["adapter.layers=null"], {"adapter": Lora(rank=2)}),
        (["adapter.layers="], {"adapter": Lora(rank=2)}),
        (["adapter.alpha=1e-3"], {"adapter": Lora(rank=2, alpha=1e-3)}),
        (["clients.cohort=by_size"], {"clients.cohort": BySize()}),
        (["clients.cohort.number=2", "clients.cohort.name=by_size"], {"clients.cohort": BySize(number=2)}),
        (["local.optimizer=sgd", "local.optimizer.momentum=0.5"], {"local.optimizer": Sgd(momentum=0.5)}),
        (["local.schedule=cosine", "local.learning_rate=2e-2"], {"local.schedule": Cosine()}),
        (["local.clip_norm=1"], {"local.clip_norm": 1.0}),
        (["prompts.templates=['{}', 'a {}']"], {"prompts.templates": ("{}", "a {}")}),
        (["prompts.class_names.thing 0=apple"], {"prompts.class_names": {"thing 0": "apple"}}),
        (["name=a=b"], {"name": "a=b"}),
        ([" rounds = 3 "], {"rounds": 3}),
    ],
)
def test_overrides(config_file: Path, overrides: list[str], expected: dict[str, Any]) -> None:
    config: Any = load_config(config_file, overrides)
    for key, value in expected.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value


# What each mistake is answered with: the key, what was expected, what was found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("roundz=1", "roundz: unknown key; did you mean 'rounds'?"),
        ("local.learning_rat=1", "local.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("adapter.Rank=1", "adapter.Rank: unknown key; did you mean 'rank'?"),
        ("server.xyz=1", "server.xyz: unknown key; expected one of strategy"),
        ("partition=iidd", "partition.name: 'iidd' is not known; did you mean 'iid'?"),
        ("partition=7", "partition: expected one of iid, dirichlet, "),
        ("partition={}", "partition.name: missing; expected one of iid, dirichlet, "),
        ("data=image_folder", "data.root: missing: "),
        ("rounds=ten", "rounds: expected a whole number, got 'ten'"),
        ("rounds=1.0", "rounds: expected a whole number, got 1.0"),
        ("rounds=1e9", "rounds: expected a whole number, got '1e9'"),
        ("rounds=true", "rounds: expected a whole number, got true"),
        ("rounds=-1", "rounds: expected a number at least 0, got -1"),
        ("rounds=", "rounds: expected a whole number, got null"),
        ("rounds=9223372036854775808", "rounds: expected a whole number of less than 64 bits, got 9223372036854775808"),
        ("rounds=2020-01-01", "rounds: expected a whole number, got '2020-01-01'"),
        ("rounds=1:30", "rounds: expected a whole number, got '1:30'"),
        ("rounds=010", "rounds: expected a whole number, got '010'"),
        ("seed={<<: {a: 1}}", "seed: not valid YAML: merge keys (<<) are not read; write the options themselves"),
        ("protocol=paper", "protocol: unknown key; it is called 'preset' now"),
        ("server.combiner=mean", "server.combiner: unknown key; it is called 'aggregator' now"),
        ("server.patience={}", "server.patience: unknown key; it is called 'stragglers' now"),
        ("clients.pooled=true", "clients.pooled: unknown key; it is called 'centralized' now"),
        ("clients.cohort=decaying", "clients.cohort.name: 'decaying' is not known; it is called 'dynamic' now"),
        ("learning_rate=0.1", "learning_rate: unknown key; did you mean 'local.learning_rate'?"),
        ("rank=4", "rank: unknown key; did you mean 'adapter.rank'?"),
        ("momentum=0.9", "momentum: unknown key; did you mean 'server.optimizer.momentum'?"),
        ("adapter.targets=q,v", "adapter.targets: expected a list, got 'q,v'; write [q, v]"),
        ("rounds=!!bool x", "rounds: not valid YAML: a value doesn't fit its tag"),
        ("rounds.x=1", "rounds.x: rounds is 2, not a mapping"),
        ("partition.concentration.x=1", "partition.concentration.x: partition.concentration is 0.5, not a mapping"),
        ("local.learning_rate=.nan", "local.learning_rate: expected a number, got nan"),
        ("local.learning_rate=nan", "local.learning_rate: expected a number, got 'nan'"),
        ("local.learning_rate=-.inf", "local.learning_rate: expected a number, got -inf"),
        ("local.learning_rate=true", "local.learning_rate: expected a number, got true"),
        ("local.learning_rate=-0.1", "local.learning_rate: expected a number above 0, got -0.1"),
        ("local.steps=0", "local.steps: expected a number at least 1 and at most 10,000,000, got 0"),
        (
            "local.epochs=1000000000000000000",
            "local.epochs: expected a number at least 1 and at most 1,000,000, got 1000000000000000000",
        ),
        (
            "clients.number=4611686018427387904",
            "clients.number: expected a number at least 1 and at most 10,000,000, got 4611686018427387904",
        ),
        ("local={steps: 2, epochs: 2}", "local.steps: give either `steps` or `epochs`, not both"),
        ("local=[1]", "local: expected a mapping of options, got [1]"),
        ("local.optimizer={name: sgd, lr: 3}", "local.optimizer.lr: unknown key; expected one of momentum, "),
        ("local.optimizer={name: sgd, nesterov: 1}", "local.optimizer.nesterov: expected true or false, got 1"),
        ("local.optimizer={name: sgd, nesterov: true}", "local.optimizer.nesterov: needs a momentum above 0"),
        ("clients.cohort={fraction: 1.5}", "clients.cohort.fraction: expected a number above 0 and at most 1, got 1.5"),
        ("adapter.layers=3", "adapter.layers: expected a list, got 3"),
        ("adapter.layers=[0, x]", "adapter.layers[1]: expected a whole number, got 'x'"),
        ("adapter.targets=[q, z]", "adapter.targets: expected one of q, k, v, out, fc, proj, got ['q', 'z']"),
        ("adapter.targets=[q, q]", "adapter.targets: expected at least one, each once, got ['q', 'q']"),
        ("adapter.scaling=beta", "adapter.scaling: expected one of alpha/r, alpha/sqrt(r), alpha, got 'beta'"),
        ("backbone.precision=fp16", "backbone.precision: expected one of fp32, bf16, fp64, got 'fp16'"),
        ("backbone.model=3", "backbone.model: expected text, got 3"),
        ('backbone.model="a\\0b"', "backbone.model: expected text, got 'a\\x00b'"),
        ("prompts.templates=a {}", "prompts.templates: expected a list, got 'a {}'"),
        ("prompts.templates=['{0}']", "prompts.templates: expected one {} for the class name and no other braces"),
        ("prompts.class_names=x", "prompts.class_names: expected a list or a mapping, got 'x'"),
        ("prompts.class_names={a: 1}", "prompts.class_names: expected a mapping of text to text, got {'a': 1}"),
        ("device=gpu", "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("device=cuda:²", "device: expected auto, cpu, cuda or cuda:N, got 'cuda:²'"),
        ("threads=100000", "threads: expected a number at least 1 and at most 1024, got 100000"),
        ("name=a/b", "name: expected a plain folder name, got 'a/b'"),
        ("name=..", "name: expected a plain folder name, got '..'"),
        ("name=' x'", "name: expected a plain folder name, got ' x'"),
        ('name="a\\e[31m"', "name: expected a plain folder name, got 'a\\x1b[31m'"),
        ("seed={a: 1, a: 2}", "seed: not valid YAML: key 'a' is given twice in line 1, column 8"),
        ("seed=[", "seed: not valid YAML: while parsing a flow node"),
        ("seed=*x", "seed: not valid YAML: found undefined alias 'x'"),
        ("seed=!!python/name:os.system", "seed: not valid YAML: could not determine a constructor"),
        ("a b=1", "'a b': unknown key; expected one of data, partition, "),
        ("rou\nnds=1", "'rou\\nnds': unknown key; did you mean 'rounds'?"),
        ("=1", "expected key=value with a dotted key, got '=1'"),
        ("a..b=1", "expected key=value with a dotted key, got 'a..b=1'"),
        ("rounds", "expected key=value with a dotted key, got 'rounds'"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_command_line(
    config_file: Path, override: str, message: str
) -> None:
    assert error_of(config_file, override).startswith(f"command line: {message}")


def test_an_error_that_no_override_made_names_the_file(config_file: Path) -> None:
    text = config_file.read_text().replace("rounds: 2", "rounds: -2")
    config_file.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml: rounds: expected a number at least 0, got -2$"):
        load_config(config_file, ["seed=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of options, got null"),
        ("- a\n- b\n", "expected a mapping of options, got ['a', 'b']"),
        ("data: patterns\n", "partition: missing: how the training examples are dealt out"),
        ("data: patterns\npartition: iid\nLocal: {}\n", "Local: unknown key; did you mean 'local'?"),
        ("data: patterns\ndata: digits\n", "not valid YAML: key 'data' is given twice in line 2, column 1"),
        ("partition: {name: iid, name: iid}\n", "not valid YAML: key 'name' is given twice in line 1, column 24"),
        ("1: 2\n", "not valid YAML: key 1 is not a string in line 1, column 1"),
        ("partition: {null: iid}\n", "not valid YAML: key None is not a string"),
        ("? [1, 2]\n: 3\n", "not valid YAML: key [1, 2] is not a string"),
        ("data: [a\n", "not valid YAML: while parsing a flow sequence"),
        ("\tdata: a\n", "not valid YAML: while scanning"),
        ("---\na: b\n---\n", "not valid YAML: expected a single document"),
        ("data: &a [*a]\n", "not valid YAML: found unconstructable recursive node"),
        (
            "data: !!python/object/apply:os.system [ls]\n",
            "not valid YAML: could not determine a constructor for the tag",
        ),
        (
            "rounds: 0x" + "f" * 9000 + "\ndata: patterns\npartition: iid\n",
            "rounds: expected a whole number of less than 64 bits, got a num",
        ),
        ("rounds: " + "9" * 9000 + "\n", "not valid YAML: Exceeds the limit"),
        ("a: '\x07'\n", "not valid YAML: unacceptable character #x0007"),
        (b"\xff\xfe\x00", "not valid YAML: 'utf-8' codec can't decode"),
        ("[" * 2000, "not valid YAML: nested too deeply"),
        ("{a: " * 2000, "not valid YAML: nested too deeply"),
        ("#" * (MAX_CONFIG_BYTES + 1), f"larger than {MAX_CONFIG_BYTES} bytes, which no experiment needs"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_file_that_is_no_config_is_one_line_that_names_it(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert text_error(tmp_path, text).startswith(message)


def test_a_byte_order_mark_is_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfdata: patterns\npartition: iid\n")
    assert load_config(path).partition == Iid()


def test_aliases_that_stand_for_gigabytes_cost_nothing(tmp_path: Path) -> None:
    bomb = "&a0 [x, x, x, x, x, x, x, x, x]"
    for level in range(1, 12):
        bomb = f"&a{level} [{bomb}{f', *a{level - 1}' * 8}]"
    message = text_error(tmp_path, f"data: patterns\npartition: iid\nadapter: {{layers: {bomb}}}\n")
    assert message.startswith("adapter.layers[0]: expected a whole number, got [[")


def test_a_missing_file_is_answered_with_the_nearest_one(tmp_path: Path, config_file: Path) -> None:
    missing = tmp_path / "mnie.yaml"
    assert error_of(missing) == f"No such file or directory; did you mean '{config_file}'?"
    assert error_of(tmp_path / "nowhere" / "x.yaml") == "No such file or directory"
    assert error_of(tmp_path) == "Is a directory"
    (tmp_path / "config.yaml").write_text("")
    again = f"--resume goes on with a run, {tmp_path / 'config.yaml'} makes it again"
    assert error_of(tmp_path) == f"Is a directory; {again}"


def test_a_file_without_an_end_is_not_read_to_the_end(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/dev/zero: not a regular file"):
        load_config("/dev/zero")
    (tmp_path / "x.yaml").touch()
    os.truncate(tmp_path / "x.yaml", 2**40)
    with pytest.raises(ConfigError, match=r"x\.yaml: larger than"):
        load_config(tmp_path / "x.yaml")


def test_a_file_name_that_is_no_run_name(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.yaml"
    path.write_text("data: patterns\npartition: iid\n")
    with pytest.raises(ConfigError, match=r"name: expected a plain folder name, got 'a\\nb'"):
        load_config(path)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_numbers_beyond_all_floats_do_not_overflow(value: int) -> None:
    with pytest.raises(
        OptionError, match="seed: expected a whole number of less than 64 bits, got a number of more than 40 digits"
    ):
        parse_config(MINIMAL | {"seed": value})
    with pytest.raises(OptionError, match="learning_rate: expected a number, got a number of more than 40 digits"):
        parse_config(MINIMAL | {"local": {"learning_rate": value}})
    with pytest.raises(OptionError, match="at least 0" if value < 0 else "at most 1024"):
        ExperimentConfig(**{"data": None, "partition": None, "seed" if value < 0 else "threads": value})


# Whatever is thrown at the parser, it answers with a config or with one line.

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["iid", "patterns", "lora", "sgd", "adamw", "1e-3", "{}", "q", "text", "-0.0", "auto", 10**400])
)
_NAMES = (
    "name data partition rounds seed device backbone model weights adapter rank alpha layers targets towers prompts "
    "templates class_names clients number cohort fraction local optimizer momentum steps server strategy evaluation "
    "every threads"
)
_KEYS = st.sampled_from(_NAMES.split()) | st.text(max_size=6)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)


_RAW = st.dictionaries(_KEYS, _VALUES, max_size=5)


@pytest.mark.parametrize("number", [40, pytest.param(500, marks=pytest.mark.stress)])
def test_check_ends_well_or_in_one_line(number: int, tiny_model: str, tmp_path: Path) -> None:
    """The command line on generated files: status 0 and "ok", or status 2 and one line; never a traceback."""
    path, statuses = tmp_path / "config.yaml", set()
    base = MINIMAL | {"backbone": {"model": tiny_model, "weights": "random"}}

    @settings(max_examples=number, deadline=None)
    @given(raw=_RAW, is_complete=st.booleans())
    def check(raw: dict[str, Any], is_complete: bool) -> None:
        content = base | raw if is_complete else raw
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        output, error = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(error):
            status = main(["--check", str(path)])
        statuses.add(status)
        if status == 0:
            assert output.getvalue() == f"{path}: ok\n"
        else:
            assert status == 2
            lines = error.getvalue().splitlines()
            assert lines
            assert all(line.startswith(f"{path}: ") for line in lines)
            assert len(set(lines)) == len(lines)

    check()
    assert statuses == {0, 2}


@settings(max_examples=150, deadline=None)
@given(_RAW)
def test_nothing_but_an_option_error_comes_out(raw: dict[str, Any]) -> None:
    for candidate in (raw, MINIMAL | raw):
        try:
            config = parse_config(candidate)
        except OptionError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 1000
        else:
            assert parse_config(config_to_dict(config)) == config
