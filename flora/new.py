"""`flora new FILE`: a commented configuration to start from with images of one's own, and what was seen of these."""

from __future__ import annotations

from flora.parsers import first_look

if __name__ == "__main__":
    first_look("new")  # what is imported from here on takes seconds

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flora import catalogue  # noqa: F401  (registers the components)
from flora.core.command_line import run_program
from flora.core.errors import UserError
from flora.core.files import write_whole
from flora.core.registry import name_of
from flora.core.rng import Rng
from flora.data.datasets.base import Dataset, ImageData, ImageFiles, Split
from flora.data.datasets.folders import CsvFile, ImageFolder
from flora.parsers import new_parser

# Where images are looked for, if nothing is said.
USUAL_FOLDER = "images"
# Images whose headers are read to tell their sizes, and names that are shown of many.
MAX_SIZES, MAX_NAMES = 500, 12
# Clients that images are dealt out to, if the data name none, and training images that each should have.
MAX_CLIENTS, IMAGES_PER_CLIENT = 5, 4

STARTER = """\
# Federated adaptation of CLIP to images of your own. `flora simulate FILE` runs this file; with --check it only says
# what is wrong with it. Any key may be changed behind the name: `flora simulate FILE rounds=2`. There are many more of
# them: `flora simulate --list`.

backbone: # the frozen model, which no client changes
  model: ViT-B-32-quickgelu # any OpenCLIP ViT; ViT-B-16-quickgelu is slower and better
  weights: openai # downloaded by OpenCLIP; or a .safetensors file of yours

data:
{data}
  unreadable: error # skip: leave out images that can't be read, and name them in the log

prompts: # {{}} is the class, by the name of its folder or its label
  templates: ["a photo of a {{}}."]
  # class_names: {{n02084071: dog}} # better names, where those of the data say little to a model of language

adapter: # what the clients train and send
  name: lora # or linear_head, clip_adapter, prompt_context, full, ...
  rank: 4
  towers: [text] # or [vision], which costs more, or both

{clients}

local: # what a client does in a round
  learning_rate: 1.0e-3
  batch_size: 32
  epochs: 1

server:
  strategy: fedavg # how the adapters become one: fedex_lora, ffa_lora, flexlora, ...

rounds: 10

evaluation:
  num_local_only: {num_local_only} # clients that also train alone, which tells whether federation is worth it
"""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a folder or a CSV file has: the data set that reads it, and its images, indexed."""

    dataset: Dataset
    images: ImageData

    @property
    def clients(self) -> Counter[str]:
        """Training images by client, if the data name any."""
        groups = self.images.train.groups
        return Counter() if groups is None else Counter(groups.tolist())

    @property
    def is_split(self) -> bool:
        """Whether the data say which images are to test on; parts drawn at random share a source."""
        return self.images.train.source is not self.images.test.source


def look(path: Path) -> Seen:
    """Index the images of a folder, or of a CSV file; folders of class folders are clients if they look like it.

    Raises `UserError` for what a run would not take.
    """
    dataset: Dataset = CsvFile(path=str(path)) if path.is_file() else ImageFolder(root=str(path))
    images = dataset.load(Rng(0))
    if any("data.groups=folder" in remark for remark in images.remarks):
        dataset = ImageFolder(root=str(path), groups="folder")
        images = dataset.load(Rng(0))
    if len(images.class_names) < 2:
        raise UserError(f"{path}: one class alone, {images.class_names[0]!r}; expected two or more")
    return Seen(dataset, images)


def starter(seen: Seen | None) -> str:
    """The text of a configuration for the images that were seen, or for those that are to be put where it says."""
    dataset = ImageFolder(root=USUAL_FOLDER) if seen is None else seen.dataset
    return STARTER.format(
        data="\n".join(f"  {line}" for line in _data_lines(dataset, seen)),
        clients="\n".join(_client_lines(seen)),
        num_local_only=min(2, _num_clients(seen)),
    )


def _data_lines(dataset: Dataset, seen: Seen | None) -> Iterator[str]:
    yield f"name: {name_of(dataset)}"
    if isinstance(dataset, ImageFolder):
        yield f"root: {_quoted(dataset.root)} # a folder for each class; or train/ and test/ with class folders in each"
        is_grouped = dataset.groups == "folder"
        yield f"{'' if is_grouped else '# '}groups: folder # the folders above the class folders are clients"
    elif isinstance(dataset, CsvFile):
        yield f"path: {_quoted(dataset.path)} # columns path,label[,client][,split]"
    if seen is None or not seen.is_split:
        yield "test_fraction: 0.2 # drawn at random from each class, unless the data say which are to test on"


def _client_lines(seen: Seen | None) -> Iterator[str]:
    if seen is not None and seen.clients:
        yield f"partition: natural # the {len(seen.clients)} clients that the data name"
        return
    yield "partition: # how the images are dealt out to virtual clients; natural: as the data say"
    yield "  name: dirichlet"
    yield "  concentration: 0.5 # small: each class at few clients; large: all clients alike"
    yield ""
    yield "clients:"
    yield f"  number: {_num_clients(seen)}"


def _num_clients(seen: Seen | None) -> int:
    if seen is None:
        return MAX_CLIENTS
    return len(seen.clients) or max(1, min(MAX_CLIENTS, len(seen.images.train) // IMAGES_PER_CLIENT))


def description(seen: Seen) -> Iterator[str]:
    """What there is, in lines: images and classes, sizes, clients, and what looks like a mistake."""
    images = seen.images
    train, test = len(images.train), len(images.test)
    drawn = "" if seen.is_split else ", drawn at random"
    yield f"images: {train + test:,}, of which {train:,} to train on and {test:,} to test on{drawn}"
    labels = np.concatenate([images.train.labels, images.test.labels])
    counts = np.bincount(labels, minlength=len(images.class_names)).tolist()
    yield f"classes: {_counted(Counter(dict(zip(images.class_names, counts, strict=True))))}"
    yield from _sizes((images.train, images.test))
    if seen.clients:
        yield f"clients: {_counted(seen.clients, ' by training images')}"
    else:
        yield f"clients: none named; the images will be dealt out to {_num_clients(seen)}"
    yield from images.remarks


def _sizes(splits: Sequence[Split]) -> Iterator[str]:
    """What the headers of some images, evenly spread, say of sizes and modes, and how many can't be read."""
    places = [(split, index) for split in splits for index in split.source_indices.tolist()]
    chosen = [places[place] for place in np.unique(np.linspace(0, len(places) - 1, MAX_SIZES).astype(int))]
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    unreadable = []
    for split, index in chosen:
        assert isinstance(split.source, ImageFiles)
        try:
            with split.source.undecoded(index) as image:
                sizes[image.size] += 1
                modes[image.mode] += 1
        except (OSError, MemoryError):
            unreadable.append(split.source.name(index))
    of = "" if len(chosen) == len(places) else f" of {len(chosen)} that were looked at"
    if sizes:
        (width, height), number = sizes.most_common(1)[0]
        least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
        ranging = "" if len(sizes) == 1 else f" ({number}{of}), from {least[0]} x {least[1]} to {most[0]} x {most[1]}"
        yield f"sizes: {width} x {height}{ranging}; modes {', '.join(sorted(modes))}"
    if unreadable:
        yield (
            f"warning: {len(unreadable)}{of} can't be read, such as {_quoted(unreadable[0])}; "
            "data.unreadable: skip leaves them out"
        )


def _counted(counts: Counter[str], by: str = "") -> str:
    """Names with their numbers, the largest first: "3 (cat 40, dog 38, frog 2)"."""
    shown = ", ".join(f"{' '.join(name.split())} {number:,}" for name, number in counts.most_common(MAX_NAMES))
    return f"{len(counts):,}{by} ({shown}{', ...' if len(counts) > MAX_NAMES else ''})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 0 or 2."""
    return run_program(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    options = new_parser().parse(argv)
    file: Path = options.file
    if file.suffix not in (".yaml", ".yml"):
        raise UserError(f"{file}: expected a name that ends in .yaml")
    if file.exists() and not options.force:
        raise UserError(f"{file}: exists already; choose another name, or --force to write over it")
    data: Path | None = options.data
    if data is None and Path(USUAL_FOLDER).is_dir():
        data = Path(USUAL_FOLDER)
    seen = None if data is None else look(data)
    try:
        write_whole(file, starter(seen).encode())
    except UnicodeEncodeError:
        raise UserError(f"{data}: its name is not UTF-8, which a YAML file is") from None
    except OSError as error:
        raise UserError(f"{file}: can't be written: {error.strerror or error}") from None
    if seen is None:
        print(f"no images yet: put them into a folder {USUAL_FOLDER}, a folder for each class, or change data.root")
    else:
        print("\n".join(description(seen)))
    print(f"written to {file}; next: flora simulate {shlex.quote(str(file))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
