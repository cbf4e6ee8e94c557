"""Data sets with domains, read from small trees with the layout of the real ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flora.config.parse import parse_config
from flora.core.errors import UserError
from flora.core.registry import OptionError
from flora.core.rng import Rng
from flora.data.datasets.domains import DomainNet, DomainSet, OfficeCaltech10, OfficeHome, Pacs
from flora.simulate import main

CALTECH = (
    *("back_pack", "bike", "calculator", "headphones", "keyboard"),
    *("laptop_computer", "monitor", "mouse", "mug", "projector"),
)
PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def write_domains(folder: Path, domains: Sequence[str], classes: Sequence[str], number: int = 5) -> None:
    """`folder/DOMAIN/CLASS/*.png`, so many images of each, in a grey of their own."""
    for place, domain in enumerate(domains):
        for label, name in enumerate(classes):
            (folder / domain / name).mkdir(parents=True)
            for index in range(number):
                grey = (place * 60 + label * 20 + index * 3) % 256
                Image.new("L", (8, 8), grey).save(folder / domain / name / f"{index}.png")


def test_pacs_is_read_with_its_domains(tmp_path: Path) -> None:
    write_domains(tmp_path / "PACS" / "kfold", Pacs.known_domains, PACS)
    data = Pacs(root=str(tmp_path)).load(Rng(0))
    assert data.class_names == PACS
    assert data.train.groups is not None and data.test.groups is not None
    assert (len(data.train), len(data.test)) == (4 * 7 * 4, 4 * 7)  # a fifth of each class in each domain
    assert np.unique(data.test.groups, return_counts=True)[1].tolist() == [7, 7, 7, 7]
    for index in range(len(data.test)):
        path = Path(data.test.name(index))
        assert path.parent.name == data.class_names[data.test.labels[index]]
        assert path.parents[1].name == data.test.groups[index]
    some = Pacs(root=str(tmp_path), domains=("photo",), classes=("dog", "horse")).load(Rng(0))
    assert some.class_names == ("dog", "horse") and len(some.train) + len(some.test) == 10


def test_spellings_of_domains_do_not_matter(tmp_path: Path) -> None:
    classes = [f"Thing_{number:02}" for number in range(65)]
    write_domains(tmp_path / "OfficeHome", ("art", "clipart", "Product", "RealWorld"), classes, number=1)
    data = OfficeHome(root=str(tmp_path)).load(Rng(0))
    assert data.class_names[0] == "Thing 00"
    assert data.train.groups is not None
    assert set(data.train.groups.tolist()) == set(OfficeHome.known_domains)


@pytest.mark.parametrize("kind", [Pacs, OfficeHome, OfficeCaltech10, DomainNet], ids=lambda kind: kind.__name__)
def test_what_is_missing_is_named_with_where_it_is_to_be_had(kind: type[DomainSet], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        kind(root=str(tmp_path)).load(Rng(0))
    assert f"{kind.title}: it is not there; expected {tmp_path / kind.folders[0]}" in str(error.value)
    assert "https://" in str(error.value)
    (tmp_path / kind.folders[-1] / kind.known_domains[0]).mkdir(parents=True)
    with pytest.raises(UserError, match="it is not complete; expected"):
        kind(root=str(tmp_path)).load(Rng(0))


def test_other_mistakes(tmp_path: Path) -> None:
    folder = tmp_path / "office_caltech_10"
    write_domains(folder, OfficeCaltech10.known_domains, CALTECH, number=1)
    assert OfficeCaltech10(root=str(tmp_path)).load(Rng(0)).class_names[0] == "backpack"
    with pytest.raises(OptionError, match=r"domains: unknown domain 'amason'; did you mean 'amazon'\?"):
        OfficeCaltech10(domains=("amason",))
    with pytest.raises(UserError, match=r"data\.classes: no folder 'byke' in .*amazon; did you mean 'bike'\?"):
        OfficeCaltech10(root=str(tmp_path), classes=("byke",)).load(Rng(0))
    (folder / "webcam" / "mug").rename(folder / "webcam" / "cup")
    with pytest.raises(UserError, match="expected the same 10 classes in each domain, got 11"):
        OfficeCaltech10(root=str(tmp_path)).load(Rng(0))
    (folder / "dslr" / "bike" / "0.png").unlink()
    with pytest.raises(UserError, match=r"no images in .*dslr.bike"):
        OfficeCaltech10(root=str(tmp_path)).load(Rng(0))


def test_domainnet_is_read_by_its_lists(tmp_path: Path) -> None:
    folder = tmp_path / "DomainNet"
    write_domains(folder, ("real", "sketch"), ("bird", "The_Eiffel_Tower"), number=2)
    for domain in ("real", "sketch"):
        lines = [f"{domain}/{name}/{{}}.png {label}" for label, name in enumerate(("The_Eiffel_Tower", "bird"))]
        for part, index in (("train", 1), ("test", 0)):
            (folder / f"{domain}_{part}.txt").write_text("\n".join(line.format(index) for line in lines) + "\n")
    data = DomainNet(root=str(tmp_path), domains=("sketch", "real")).load(Rng(0))
    assert data.class_names == ("The Eiffel Tower", "bird")
    assert data.train.groups is not None and data.train.groups.tolist() == ["sketch", "sketch", "real", "real"]
    assert {Path(data.train.name(index)).stem for index in range(4)} == {"1"}
    assert {Path(data.test.name(index)).stem for index in range(4)} == {"0"}
    bird = DomainNet(root=str(tmp_path), domains=("real",), classes=("bird",)).load(Rng(0))
    assert bird.class_names == ("bird",) and len(bird.train) == 1
    with pytest.raises(UserError, match=r"data\.classes: the lists of .* have no train image of 'plane'"):
        DomainNet(root=str(tmp_path), domains=("real",), classes=("plane",)).load(Rng(0))
    (folder / "real_test.txt").write_text("../real/bird/0.png 1\n")
    with pytest.raises(UserError, match="expected real/CLASS/IMAGE NUMBER, got"):
        DomainNet(root=str(tmp_path), domains=("real",)).load(Rng(0))


def test_a_run_leaves_a_domain_out_and_trains_clients_of_the_others(
    tmp_path: Path, raw_config: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    write_domains(tmp_path / "pacs", Pacs.known_domains, PACS)
    raw = {key: value for key, value in raw_config.items() if key not in ("name", "clients")}
    raw |= {
        "data": {"name": "pacs", "root": str(tmp_path)},
        "split": {"name": "leave_domain_out", "domain": "sketch"},
        "partition": {"name": "within_groups", "of": {"name": "dirichlet", "concentration": 0.5}},
        "rounds": 1,
    }
    parse_config(raw)
    (tmp_path / "cross.yaml").write_text(yaml.safe_dump(raw))
    assert main([str(tmp_path / "cross.yaml")]) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "cross"
    assert "84 training and 35 test images, 7 classes, 6 clients" in "".join(capsys.readouterr())
    partition = json.loads((run / "partition.json").read_text())
    assert [client["name"] for client in partition["clients"]][-2:] == ["photo 1", "photo 2"]
    assert partition["clients_without_training_images"] == ["sketch"]
