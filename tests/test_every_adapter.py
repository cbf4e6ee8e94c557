"""Every adapter with every kind of supported model: it runs a round, or `--check` refuses it in one line."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import write_model

from flora.clip.adapters.base import Adapter
from flora.config.parse import parse_config
from flora.config.rules import check_experiment
from flora.core.errors import UserError
from flora.core.registry import components
from flora.simulate import simulate

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "custom text": {"custom_text": True},
    "quick GELU": {"quick_gelu": True},
    "no pre-norm": {"vision": {"no_ln_pre": True}},
    "mean of patches": {"vision": {"pool_type": "avg", "final_ln_after_pool": True}},
    "sinusoids": {"vision": {"pos_embed_type": "sin_cos_2d"}},
    "layer scale": {"vision": {"ls_init_value": 0.1}, "text": {"ls_init_value": 0.1}},
    "not causal": {"custom_text": True, "text": {"no_causal_mask": True, "pool_type": "last"}},
    "no projection": {"custom_text": True, "text": {"proj_type": "none", "width": 16, "heads": 2}},
    "biased projection": {"custom_text": True, "text": {"proj_bias": True}},
    "logit bias": {"custom_text": True, "init_logit_bias": -10.0},
    "one block": {"vision": {"layers": 1}, "text": {"layers": 1}},
    "wide image": {"vision": {"image_size": [16, 24]}},
}
REFUSED = {
    ("no pre-norm", "norm"): "adapter: norm trains the norm before the vision tower's blocks: ",
    ("not causal", "proda"): "adapter: proda needs a text tower that is read at a prompt's end: ",
    **{
        ("mean of patches", name): f"adapter: {called} needs a vision tower that is read at its class token: "
        for name, called in (
            ("visual_prompt", "visual_prompt"),
            ("maple", "maple"),
            ("prompt_src", "prompt_src"),
            ("plot", "transport"),
            ("fedotp", "transport"),
        )
    },
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The models' files: one that lies in one place is built once."""
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / f"{name}.json", **changes) for name, changes in MODELS.items()}


SMALL = {
    "rounds": 1,
    "local": {"steps": 1, "batch_size": 4},
    "data": {"name": "patterns", "num_train": 18, "num_test": 9},
    "partition": "iid",
    "clients": {"number": 2},
}


@pytest.mark.parametrize("adapter", sorted(components(Adapter)))
@pytest.mark.parametrize("model", MODELS)
def test_it_runs_a_round_or_is_refused(
    model: str, adapter: str, raw_config: dict[str, Any], paths: dict[str, str]
) -> None:
    backbone = {"model": paths[model], "weights": "random"}
    config = parse_config(raw_config | SMALL | {"backbone": backbone, "adapter": adapter})
    if (model, adapter) in REFUSED:
        with pytest.raises(UserError) as caught:
            check_experiment(config)
        assert str(caught.value).startswith(REFUSED[model, adapter])
        return
    result = simulate(config)
    assert result.records[1].train_loss is not None
