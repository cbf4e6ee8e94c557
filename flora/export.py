"""`python -m flora.export RUN FILE`: a run's adapter merged into its backbone, as weights that OpenCLIP loads."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from flora import catalogue  # noqa: F401  (registers the components)
from flora.checkpoints import CheckpointFolder
from flora.config import load_config
from flora.errors import UserError
from flora.federated.personal import OWN
from flora.files import open_regular
from flora.registry import suggest
from flora.rng import Rng
from flora.run_directory import ADAPTER_FORMAT, read_json
from flora.tree import State, fits, named_below

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def read_adapter(path: Path) -> State:
    """The tensors of an `adapter.safetensors`. Raises `UserError` if it is missing, damaged or something else."""
    try:
        open_regular(path).close()
        with safetensors.safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("flora", "{}"))
            if not isinstance(description, dict) or description.get("format") != ADAPTER_FORMAT:
                raise UserError(f"{path}: not an adapter of this program (format {ADAPTER_FORMAT})")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}") from None


def merged_weights(run: Path, client: str | None = None) -> State:
    """The state dict of a finished run's backbone with its adapter merged in, fp32 on the CPU.

    That is the server's adapter, or the own one of a client, given by its name or id. Raises `UserError` if the run's
    files are missing or don't belong together, or if the client has none.
    """
    config = load_config(run / "config.yaml")
    adapter = read_adapter(run / "adapter.safetensors")
    backbone = dataclasses.replace(config.backbone, precision="fp32")
    # The same stream as in the run, in case that its backbone had random weights.
    clip = backbone.load(torch.device("cpu"), Rng(config.seed).child("backbone"))
    state_dict = dict(clip.model.state_dict())
    attached = config.adapter.attach(clip)
    if attached.is_beside_the_model:
        raise UserError(f"{run}: its adapter works beside the model, and OpenCLIP's weights have no place for it")
    expected = config.server.strategy.initial(attached.initial_state(Rng(0)))
    if expected.keys() != adapter.keys() or not all(fits(adapter[name], expected[name]) for name in expected):
        raise UserError(f"{run / 'adapter.safetensors'}: doesn't fit the adapter that config.yaml describes")
    if client is not None and not config.communication.broadcast.is_identity:
        raise UserError(f"{run}: its broadcast is quantised: no client has the server's adapter as this run keeps it")
    if client is not None:
        adapter = dict(attached.views({**adapter, **_own_tensors(run, client)})[-1])
    return attached.merged_state_dict(state_dict, adapter)


def _own_tensors(run: Path, client: str) -> State:
    """What of its adapter a client kept for itself until the run's last checkpoint."""
    checkpoints, index = CheckpointFolder(run / "checkpoints"), _client_id(run, client)
    rounds = checkpoints.rounds()
    own = named_below(OWN, checkpoints.client(rounds[0], index)) if rounds else {}
    if not own:
        raise UserError(f"{run}: client {client} has kept no adapter of its own in this run")
    return own


def _client_id(run: Path, client: str) -> int:
    """The id of the client of this name or, where there is none, of this id. Raises `UserError` if there is neither."""
    partition = read_json(run / "partition.json")
    try:
        names = [each.get("name", str(index)) for index, each in enumerate(partition["clients"])]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{run / 'partition.json'}: missing or damaged") from None
    if client in names:
        return names.index(client)
    if client.isdecimal() and int(client) < len(names):
        return int(client)
    raise UserError(f"{run}: there is no client {client!r}; {suggest(client, names)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, 2 for anything that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m flora.export", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder, such as runs/quickstart")
    parser.add_argument("file", type=Path, help="the .safetensors file to write; it must not exist")
    parser.add_argument(
        "--client",
        metavar="NAME",
        help="merge the own adapter of this client (its name or id) in place of the server's",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="type of the numbers (default: fp32)")
    options = parser.parse_args(argv)
    try:
        if options.file.suffix != ".safetensors":
            raise UserError(f"{options.file}: expected a name that ends in .safetensors")
        merged = merged_weights(options.run, options.client)
        weights = {name: tensor.to(DTYPES[options.dtype]) for name, tensor in merged.items()}
        with options.file.open("xb") as file:
            file.write(safetensors.torch.save(weights))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{options.file}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{options.file}: {len(weights)} tensors; load it as backbone.weights or with open_clip's `pretrained=`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
