"""What is exported for transformers and PEFT computes there what it does here, and comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import peft
import pytest
import safetensors.torch
import torch
import transformers
from helpers import TOLERANCE, Patterns, write_model
from PIL import Image

import flora
from flora import export
from flora.clip.adapters.files import read_low_rank
from flora.clip.huggingface import clip_config, clip_weights, image_processor
from flora.config.parse import parse_config
from flora.core import tree
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.simulate import RunResult, resume, simulate

Capture = pytest.CaptureFixture[str]
EVERYWHERE = {"name": "lora", "rank": 3, "towers": ["text", "vision"], "targets": ["q", "k", "v", "out", "fc", "proj"]}
TEXTS = ["a photo of a cat.", "Two dogs; don't!", "naïve 北京 café №5", "a"]


def run_of(raw: dict[str, Any], precision: str = "fp64", **changes: Any) -> RunResult:
    backbone = {**raw["backbone"], "precision": precision}
    return simulate(parse_config({**raw, "adapter": EVERYWHERE, "backbone": backbone, **changes}))


def pixels(number: int = 5) -> torch.Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(3)).double()


def tokens() -> torch.Tensor:
    tokenized: torch.Tensor = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    return tokenized


@torch.no_grad()
def logits_of_openclip(run: Path, client: str | None = None) -> torch.Tensor:
    """The merged model's, in double precision."""
    model, _, _ = flora.load_adapted(run, client=client)
    images, texts, scale = model.double()(pixels(), tokens())
    return scale * images @ texts.T


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """The logits of a `CLIPModel`, with an adapter of PEFT's or without."""
    found: torch.Tensor = model.double()(input_ids=tokens(), pixel_values=pixels()).logits_per_image
    return found


def base_of(raw: dict[str, Any], tmp_path: Path) -> Any:
    """The backbone as a `CLIPModel`: a run of no rounds, exported."""
    frozen = run_of({**raw, "name": "frozen"}, rounds=0)
    path = tmp_path / "frozen"
    if not path.exists():
        assert export.main([str(frozen.directory), str(path), "--to", "huggingface"]) == 0
    return transformers.CLIPModel.from_pretrained(path, dtype=torch.float64)


@pytest.mark.parametrize(
    "model",
    [{}, {"custom_text": True}, {"quick_gelu": True}, {"vision": {"mlp_ratio": 2.0}, "text": {"context_length": 40}}],
    ids=["clip", "custom text", "quick gelu", "other sizes"],
)
@torch.no_grad()
def test_the_names_of_transformers_mean_the_same_weights(model: dict[str, Any], tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.json", **model)
    config = json.loads(Path(path).read_text())
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    plain = kind(**config).eval().double()
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**clip_config(config))).eval().double()
    missing, unexpected = theirs.load_state_dict(clip_weights(plain.state_dict()), strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    length = config["text_cfg"]["context_length"]
    images, texts, scale = plain(pixels(), tokens()[:, :length])
    found = theirs(input_ids=tokens()[:, :length], pixel_values=pixels()).logits_per_image
    torch.testing.assert_close(found, scale * images @ texts.T, atol=TOLERANCE, rtol=0)


def test_a_merged_model_for_transformers(raw_config: dict[str, Any], tmp_path: Path, capsys: Capture) -> None:
    run = run_of(raw_config, "fp32").directory
    assert export.main([str(run), str(tmp_path / "merged"), "--to", "huggingface"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    made: dict[str, Any] = {}
    exec(printed.partition(": ")[2], made)
    torch.testing.assert_close(logits_of(made["model"].eval()), logits_of_openclip(run), atol=TOLERANCE, rtol=0)
    single = transformers.CLIPModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = single(input_ids=tokens(), pixel_values=pixels().float()).logits_per_image
    torch.testing.assert_close(found.double(), logits_of_openclip(run), atol=1e-5 * found.abs().max().item(), rtol=0)


def test_the_tokenizer_and_the_image_processor(raw_config: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(raw_config, "fp32", rounds=0).directory
    path = tmp_path / "merged"
    assert export.main([str(run), str(path), "--to", "huggingface"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    found = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ends = tokens().argmax(dim=1)
    for own, theirs, end in zip(tokens(), found, ends, strict=True):
        assert own[: end + 1].tolist() == theirs[: end + 1].tolist()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(path)
    _, preprocess, _ = flora.load_adapted(run)
    generator = np.random.default_rng(0)
    for size in ((16, 16, 3), (32, 32, 3), (30, 60, 3)):  # where a margin is odd, the two crop a pixel apart
        image = Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8))
        theirs = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))
        torch.testing.assert_close(theirs, preprocess(image), atol=1e-5, rtol=0)


def test_an_adapter_for_peft(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """In double precision, with every matrix of both towers adapted, and each way of scaling."""
    base = base_of(raw_config, tmp_path)
    plain = logits_of(base)
    for number, scaling in enumerate(("alpha/r", "alpha/sqrt(r)", "alpha")):
        run = run_of(raw_config, name=f"run {number}", adapter={**EVERYWHERE, "alpha": 5.0, "scaling": scaling})
        files = export.peft_adapter(run.directory, dtype=torch.float64)
        export.write_folder(tmp_path / scaling.replace("/", " "), files)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / scaling.replace("/", " "))
        assert {each.dtype for name, each in adapted.named_parameters() if "lora_" in name} == {torch.float64}
        # The merged weights are rounded to single precision, the factors are not.
        merged = logits_of_openclip(run.directory)
        found = logits_of(adapted.eval())
        assert (found - plain).abs().max() > 0.01
        torch.testing.assert_close(found, merged, atol=1e-5 * plain.abs().max().item(), rtol=0)
        assert read_low_rank(tmp_path / scaling.replace("/", " ")).tensors.keys() == run.adapter.keys()
        base = adapted.unload()
    torch.testing.assert_close(logits_of(base), plain, atol=0, rtol=0)


def test_an_adapter_for_peft_is_exact(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """Against the model that was trained, factors and all, in double precision."""
    run = run_of(raw_config)
    export.write_folder(tmp_path / "adapter", export.peft_adapter(run.directory, dtype=torch.float64))
    adapted = peft.PeftModel.from_pretrained(base_of(raw_config, tmp_path), tmp_path / "adapter").eval()
    finished = export.read_run(run.directory)
    clip = finished.load_backbone(torch.device("cpu"), "fp64")
    attached = finished.config.adapter.attach(clip)
    with torch.no_grad(), attached.bind(tree.expand(run.adapter, 1)):
        images, texts, scale = clip.model(pixels(), tokens())
    torch.testing.assert_close(logits_of(adapted), scale * images @ texts.T, atol=TOLERANCE, rtol=0)


def test_a_clients_own_adapter_for_peft(raw_config: dict[str, Any], tmp_path: Path) -> None:
    raw = {**raw_config, "adapter": {"name": "dual_lora", "rank": 2, "local_rank": 5}}
    run = simulate(parse_config(raw)).directory
    base = base_of(raw_config, tmp_path)
    assert export.main([str(run), str(tmp_path / "own"), "--to", "peft", "--client", "1"]) == 0
    assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["r"] == 5
    found = logits_of(peft.PeftModel.from_pretrained(base, tmp_path / "own").eval())
    torch.testing.assert_close(found, logits_of_openclip(run, "1"), atol=1e-5 * found.abs().max().item(), rtol=0)


def test_three_lines_of_python(raw_config: dict[str, Any]) -> None:
    result = run_of(raw_config, "fp32", rounds=3)
    model, preprocess, tokenizer = flora.load_adapted(result.directory)
    assert type(model) is open_clip.CLIP and type(model.transformer.resblocks[0].attn) is torch.nn.MultiheadAttention
    data = Patterns().load(Rng(0).child("data"))
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(data.test.open(each)) for each in range(len(data.test))]))
        texts = model.encode_text(tokenizer([f"a photo of a {name}." for name in data.class_names]))
    images, texts = images / images.norm(dim=1, keepdim=True), texts / texts.norm(dim=1, keepdim=True)
    right = (images @ texts.T).argmax(dim=1).numpy() == data.test.labels
    assert right.mean() == result.summary.last_accuracy


# What transformers and PEFT can't express


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"vision": {"no_ln_pre": True}}, "without a norm before its blocks"),
        ({"vision": {"pool_type": "avg"}}, "the mean of its patches"),
        ({"vision": {"ls_init_value": 0.1}}, "ls_init_value"),
        ({"text": {"no_causal_mask": True}}, "not causal"),
        ({"text": {"pool_type": "first"}}, "not read at the end of the text"),
        ({"text": {"proj_bias": True}}, "text projection with a bias"),
        ({"vision": {"image_size": [16, 24]}}, "vision_cfg.image_size: CLIPModel of transformers needs a square"),
    ],
)
def test_a_model_that_transformers_does_not_have_is_refused(
    raw_config: dict[str, Any], tmp_path: Path, model: dict[str, Any], message: str, capsys: Capture
) -> None:
    path = write_model(tmp_path / "model.json", custom_text=True, **model)
    raw = {**raw_config, "backbone": {"model": path, "weights": "random"}, "rounds": 0}
    run = simulate(parse_config(raw)).directory
    for to in ("huggingface", "peft"):
        capsys.readouterr()
        assert export.main([str(run), str(tmp_path / "out"), "--to", to]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "to", "message"),
    [
        ({"server": {"strategy": "fedex_lora"}}, "peft", "the server keeps a residual beside the factors"),
        ({"adapter": "full"}, "peft", "its adapter (full) is no LoRA"),
        ({"adapter": "linear_head"}, "peft", "its adapter (linear_head) is no LoRA"),
        ({"adapter": "clip_adapter"}, "huggingface", "its adapter works beside the model"),
    ],
)
def test_adapters_that_can_not_be_expressed_are_refused(
    raw_config: dict[str, Any], tmp_path: Path, changes: dict[str, Any], to: str, message: str, capsys: Capture
) -> None:
    run = simulate(parse_config({**raw_config, **changes})).directory
    capsys.readouterr()
    assert export.main([str(run), str(tmp_path / "out"), "--to", to]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith(f"{run}: ") and said.count("\n") == 1
    assert export.main([str(run), str(tmp_path / "out.safetensors"), "--to", to]) == 2
    assert "writes a folder" in capsys.readouterr().err


def test_what_is_no_part_of_a_model_is_said_or_refused(
    raw_config: dict[str, Any], tmp_path: Path, capsys: Capture
) -> None:
    """Fusion and patches, with which a run predicts besides its model, in one line; fewer tokens are refused."""
    both = {"evaluation": {"fusion": "entropy", "patches": {"alpha": 0.5}}}
    tokens = {"backbone": {**raw_config["backbone"], "tokens": {"name": "merge", "per_layer": 1}}}
    run = str(simulate(parse_config({**raw_config, "rounds": 1, **both})).directory)
    for to in ("openclip", "huggingface", "peft"):
        capsys.readouterr()
        assert export.main([run, str(tmp_path / to), "--to", to]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("left out: evaluation.fusion and evaluation.patches of the run, which")
    assert export.left_out(parse_config(raw_config)) == []
    (fused,) = export.left_out(parse_config({**raw_config, "evaluation": {"fusion": "entropy"}}))
    assert "patches" not in fused
    fewer = str(simulate(parse_config({**raw_config, "rounds": 1, "name": "tokens", **tokens})).directory)
    for to in ("huggingface", "peft"):
        assert export.main([fewer, str(tmp_path / "fewer"), "--to", to]) == 2
        said_of_tokens = capsys.readouterr().err
        assert "the run goes on with some tokens of an image" in said_of_tokens and said_of_tokens.count("\n") == 1
        assert not (tmp_path / "fewer").exists()


def test_resizing_that_transformers_does_not_have_is_refused() -> None:
    settings = {"size": [16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    assert image_processor({**settings, "resize_mode": "squash"})["size"] == {"height": 16, "width": 16}
    with pytest.raises(UserError, match="can't resize by 'longest'"):
        image_processor({**settings, "resize_mode": "longest"})


# Beginning from an adapter


def test_a_run_begins_where_another_ended(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """From PEFT's folder, from the run's, and from its file: the same run, which begins with the other's accuracy."""
    first = run_of(raw_config, rounds=3)
    export.write_folder(tmp_path / "peft", export.peft_adapter(first.directory, dtype=torch.float64))
    adapters = []
    for place, start in enumerate((tmp_path / "peft", first.directory, first.directory / "adapter.safetensors")):
        adapter = {**EVERYWHERE, "start": str(start)}
        second = run_of({**raw_config, "name": f"second {place}"}, adapter=adapter, rounds=1)
        assert second.records[0].start_accuracy == first.summary.last_accuracy
        assert second.summary.start_accuracy == first.summary.last_accuracy
        assert second.records[0].accuracy == first.records[0].accuracy
        adapters.append(tree.state_digest(second.adapter))
    assert len(set(adapters)) == 1
    still = run_of({**raw_config, "name": "still"}, adapter=adapter, rounds=0)
    assert all(torch.equal(still.adapter[name], first.adapter[name]) for name in first.adapter)


def test_what_peft_trains_is_read_as_it_is(raw_config: dict[str, Any], tmp_path: Path) -> None:
    """An adapter that PEFT itself made and saved, with names by pattern, gives the same logits as a run's start."""
    base = base_of(raw_config, tmp_path)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, use_rslora=True, target_modules=r"text_model\..*\.(q_proj|v_proj)", init_lora_weights=False
    )
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    found = logits_of(theirs)
    adapter = {"name": "lora", "rank": 3, "alpha": 6.0, "scaling": "alpha/sqrt(r)", "start": str(tmp_path / "theirs")}
    run = run_of({**raw_config, "name": "from theirs"}, adapter=adapter, rounds=0)
    torch.testing.assert_close(logits_of_openclip(run.directory), found, atol=1e-5 * found.abs().max().item(), rtol=0)


def test_a_run_goes_on_with_the_adapter_that_it_began_with(raw_config: dict[str, Any], tmp_path: Path) -> None:
    first = run_of({**raw_config, "name": "first"})
    other = run_of({**raw_config, "name": "other", "seed": 1})
    for name, run in (("a", first), ("b", other)):
        export.write_folder(tmp_path / name, export.peft_adapter(run.directory, dtype=torch.float64))
    adapter = {**EVERYWHERE, "start": str(tmp_path / "a")}
    whole = run_of({**raw_config, "name": "whole"}, adapter=adapter, rounds=2)
    part = run_of({**raw_config, "name": "part"}, adapter=adapter, rounds=1)
    (tmp_path / "a").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="the start is not what this run began with"):
        resume(part.directory, ["rounds=2", f"adapter.start={tmp_path / 'b'}"])
    gone_on = resume(part.directory, ["rounds=2", f"adapter.start={tmp_path / 'moved'}"])
    assert all(torch.equal(gone_on.adapter[name], whole.adapter[name]) for name in whole.adapter)


def test_a_start_that_does_not_fit_is_refused_in_one_line(raw_config: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(raw_config, adapter={"name": "lora", "rank": 2}, name="first").directory
    dual = run_of(raw_config, adapter={"name": "dual_lora", "rank": 2}, name="dual").directory
    export.write_folder(tmp_path / "good", export.peft_adapter(run))

    def spoilt(name: str, **changes: Any) -> Path:
        path = tmp_path / name
        files = export.peft_adapter(run)
        config = {**json.loads(files["adapter_config.json"]), **changes}
        export.write_folder(path, {**files, "adapter_config.json": json.dumps(config).encode()})
        return path

    half = spoilt("half")
    (half / "adapter_model.safetensors").unlink()
    foreign = spoilt("foreign")
    safetensors.torch.save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2)}, foreign / "adapter_model.safetensors"
    )
    broken = spoilt("broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "good", {"rank": 3}, r"lora_A is \[2, 32\], expected \[3, 32\] \(adapter.rank\)"),
        (tmp_path / "good", {"targets": ["q"]}, r"it has text\.0\.v\.lora_A, which is not adapted here"),
        (tmp_path / "good", {"towers": ["text", "vision"]}, r"it has nothing for vision\.0\.q\.lora_A"),
        (tmp_path / "good", {"alpha": 4.0}, "its factors are multiplied by 8, here by 2"),
        (tmp_path / "none", {}, "No such file"),
        (tmp_path, {}, "it has neither adapter_config.json nor adapter.safetensors"),
        (spoilt("dora", use_dora=True), {}, "use_dora is True"),
        (spoilt("patterned", rank_pattern={"q_proj": 4}), {}, "rank_pattern is"),
        (spoilt("ia3", peft_type="IA3"), {}, "not the configuration of a PEFT LoRA adapter"),
        (half, {}, "adapter_model.safetensors: No such file"),
        (foreign, {}, "base_model.model.x.lora_A.weight is no factor"),
        (broken, {}, "adapter_model.safetensors: damaged"),
        (dual, {}, "is no low-rank factor of LoRA that travels"),
    ]
    for start, changes, message in cases:
        raw = {**raw_config, "name": "x", "adapter": {"name": "lora", "rank": 2, "start": str(start), **changes}}
        with pytest.raises(OptionError, match=message) as caught:
            simulate(parse_config(raw))
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"adapter.start: {start}")
        assert not (Path(raw_config["output"]) / "x").exists()
    raw = {
        **raw_config,
        "adapter": {"name": "lora", "rank": 2, "start": str(run)},
        "server": {"strategy": "flora_stacking"},
    }
    with pytest.raises(OptionError, match="flora_stacking starts anew each round"):
        simulate(parse_config(raw))
