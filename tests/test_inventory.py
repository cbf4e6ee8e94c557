"""What is written down at a run's start: the prompts as they were used, and whose each image is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from flora.clip.backbone import FrozenClip
from flora.clip.towers import TextTower
from flora.config import parse_config
from flora.errors import UserError
from flora.simulate import RunResult, resume, simulate

Run = Callable[..., RunResult]


@pytest.fixture
def run(raw_config: dict[str, Any]) -> Run:
    """Runs the tiny experiment with some of its sections replaced."""
    return lambda **changes: simulate(parse_config({**raw_config, "rounds": 1, **changes}))


def read(result: RunResult, name: str) -> Any:
    return json.loads((result.directory / name).read_text())


def texts(prompts: dict[str, Any]) -> list[str]:
    return [text for each in prompts["classes"] for text in each["prompts"]]


# Prompts


def test_the_prompts_are_those_that_the_model_got(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    real = TextTower.prompts

    def watched(tower: TextTower, *arguments: Any) -> Any:
        clip: FrozenClip = tower._clip
        object.__setattr__(
            clip, "tokenize", lambda texts, tokenize=clip.tokenize: given.extend(texts) or tokenize(texts)
        )
        return real(tower, *arguments)

    monkeypatch.setattr(TextTower, "prompts", watched)
    options = {"templates": ["a photo of {}.", "{} at night"], "class_names": {"thing 1": 'häm "ster"'}}
    prompts = read(run(prompts=options), "prompts.json")
    assert texts(prompts) == given
    assert prompts == {
        "templates": options["templates"],
        "learned_context": None,
        "max_tokens": 77,
        "classes": [
            {"name": "thing 0", "prompts": ["a photo of thing 0.", "thing 0 at night"]},
            {"name": 'häm "ster"', "data_name": "thing 1",
             "prompts": ['a photo of häm "ster".', 'häm "ster" at night']},
            {"name": "thing 2", "prompts": ["a photo of thing 2.", "thing 2 at night"]},
        ],
        "cut_off": [],
    }  # fmt: skip


def test_prompts_of_the_data_set_and_of_new_classes(run: Run) -> None:
    prompts = read(run(data={"name": "patterns", "num_classes": 4}, split="base_to_new"), "prompts.json")
    assert texts(prompts) == ["a photo of a thing 0.", "a photo of a thing 1."]
    assert prompts["new_classes"] == [
        {"name": f"thing {index}", "prompts": [f"a photo of a thing {index}."]} for index in (2, 3)
    ]


@pytest.mark.parametrize(("options", "number"), [({}, 4), ({"words": None, "num_tokens": 6}, 6)])
def test_of_a_learned_context_what_is_fixed(run: Run, options: dict[str, Any], number: int) -> None:
    prompts = read(run(adapter={"name": "prompt_context", **options}), "prompts.json")
    assert prompts["learned_context"] == {"num_vectors": number, "starts_from": options.get("words", "a photo of a")}
    assert texts(prompts) == [f"[learned context] thing {index}." for index in range(3)]


def test_prompts_that_the_model_does_not_read_to_their_end(run: Run) -> None:
    longest = "a photo of a " + "very " * 90
    prompts = read(run(prompts={"templates": ["a {}", "{} " + longest]}), "prompts.json")
    assert prompts["cut_off"] == [f"thing {index} {longest}" for index in range(3)]


def test_a_run_goes_on_with_the_prompts_that_it_began_with(run: Run) -> None:
    directory = run().directory
    before = (directory / "prompts.json").read_text()
    resume(directory, ["rounds=2"])
    assert (directory / "prompts.json").read_text() == before
    (directory / "prompts.json").write_text(before.replace("a photo of a thing 0", "a picture of a thing 0"))
    with pytest.raises(UserError, match=r"prompts\.json: the prompts are not those that this run began with"):
        resume(directory, ["rounds=3"])
    (directory / "prompts.json").unlink()  # as in a run of a version that did not write it
    resume(directory, ["rounds=3"])
    assert (directory / "prompts.json").read_text() == before
