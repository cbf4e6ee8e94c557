"""A checkpoint is whole or not there; one that was changed in any way is never believed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flora.core.errors import UserError
from flora.core.records import RoundRecord
from flora.core.states import ClientState, ServerState
from flora.runs.checkpoints import FORMAT, Checkpoint, CheckpointFolder, DamagedError
from flora.runs.resume import RunFiles, find_start
from flora.runs.run_directory import RunDirectory
from flora.runs.stored_state import client_tensors, server_tensors

ROUNDS = (1, 2, 3, 4)


def state_of(round: int) -> ServerState:
    generator = torch.Generator().manual_seed(round)
    adapter = {"b.lora_A": torch.randn(2, 3, generator=generator), "a": torch.randn((), generator=generator)}
    strategy = {"momentum": torch.randn(4, generator=generator)}
    clients = {
        client: ClientState(optimizer={"mean": torch.randn(5, generator=generator), "steps": torch.ones(1)})
        for client in (17, 3)
    }
    return ServerState(round, adapter, strategy, {}, 2.5, clients)


CLIENT = ClientState(optimizer={"mean": torch.zeros(5), "steps": torch.zeros(1)})


def checkpoint_of(round: int, records: tuple[int, str] = (0, "")) -> Checkpoint:
    return Checkpoint(
        state_of(round), {"rounds": 9, "local": {"epochs": 2}}, *records, wall_seconds=1.5, clients_per_block=4
    )


def record_of(round: int) -> RoundRecord:
    return RoundRecord(round, {"accuracy": 0.5, "loss": 1.0 + round, "num_clients": 2, "uplink_bytes": 10})


def assert_same_state(left: ServerState, right: ServerState) -> None:
    assert left.round == right.round
    parts = [(left.adapter, right.adapter), (server_tensors(left), server_tensors(right))]
    assert left.clients.keys() == right.clients.keys()
    parts += [(client_tensors(each), client_tensors(right.clients[client])) for client, each in left.clients.items()]
    for ours, theirs in parts:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.rounds() == []
    folder.save(checkpoint_of(3, (120, "abc")), keep=2)
    found = folder.load(3, like=state_of(0), client_like=CLIENT)
    assert_same_state(found.state, state_of(3))
    assert (found.config, found.records_bytes, found.records_sha256) == (checkpoint_of(3).config, 120, "abc")
    assert found.wall_seconds == 1.5
    assert list(found.state.adapter) == list(state_of(0).adapter)  # the order counts where states are flattened
    assert sorted(path.name for path in (tmp_path / "checkpoints").rglob("*")) == [
        "adapter.safetensors", "clients.safetensors", "manifest.json", "round-0003", "server.safetensors",
    ]  # fmt: skip


def test_only_the_newest_stay_and_a_round_is_replaced(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for round in (1, 2, 3, 12345, 3):
        folder.save(checkpoint_of(round), keep=2)
    assert folder.rounds() == [12345, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"round-0003", "round-12345"}


def test_nothing_is_lost_wherever_a_write_fails(tmp_path: Path) -> None:
    count = 0

    def fail(path: Path) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            raise OSError(28, "No space left on device")

    folder = CheckpointFolder(tmp_path, fail)
    folder.save(checkpoint_of(1), keep=1)
    failures = 0
    for place in range(1, 20):
        count = place
        before = folder.rounds()
        try:
            folder.save(checkpoint_of(2), keep=1)
        except UserError as error:
            failures += 1
            assert str(error).endswith("round-0002: can't be written: No space left on device")
            assert before[-1] in folder.rounds()
            for round in folder.rounds():
                assert_same_state(folder.load(round, like=state_of(0), client_like=CLIENT).state, state_of(round))
    assert failures >= 7  # at the part, four files, the new name, and the old checkpoint
    assert folder.rounds() == [2]


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint_of(5), keep=1)
    like = state_of(0)
    for wrong, message in (
        ({"a": torch.zeros(())}, r"b\.lora_A does not belong here"),
        ({**like.adapter, "c": torch.zeros(1)}, "c is missing"),
        ({**like.adapter, "b.lora_A": torch.zeros(3, 3)}, r"b\.lora_A is \(2, 3\) torch\.float32, expected \(3, 3\)"),
        ({**like.adapter, "a": torch.zeros((), dtype=torch.float64)}, r"a is \(\) torch\.float32, expected \(\) torch"),
    ):
        with pytest.raises(UserError, match=rf"round-0005/adapter\.safetensors: {message}"):
            folder.load(5, like=ServerState(0, wrong, like.optimizer), client_like=CLIENT)
    with pytest.raises(UserError, match=r"round-0005/server\.safetensors: optimizer\.momentum does not belong here"):
        folder.load(5, like=ServerState(0, like.adapter, {}), client_like=CLIENT)
    (tmp_path / "round-0005").rename(tmp_path / "round-0006")
    with pytest.raises(UserError, match=r"round-0006/manifest\.json: it belongs to round 5"):
        folder.load(6, like=like, client_like=CLIENT)
    with pytest.raises(UserError, match=r"round-0007/manifest\.json: No such file"):
        folder.load(7, like=like, client_like=CLIENT)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with records of rounds 0 to 4 and checkpoints of the last four."""
    directory = RunDirectory.create(str(tmp_path), "run", numbered=False)
    folder = CheckpointFolder(directory.path / "checkpoints")
    directory.append_round(record_of(0))
    for round in ROUNDS:
        directory.append_round(record_of(round))
        folder.save(checkpoint_of(round, directory.records_end), keep=4)
    directory.close()
    return directory.path


def mutate(run: Path, chance: random.Random) -> str:
    """Damage one file or two of a run, as a disk, a tool or a person might."""
    files = [*sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file()), run / "rounds.jsonl"]
    path = chance.choice(files)
    content = path.read_bytes()
    kind = chance.choice(("cut", "flip", "swap", "remove", "empty", "append", "copy", "remove folder", "rename folder"))
    if kind == "cut":
        path.write_bytes(content[: chance.randrange(len(content))])
    elif kind == "flip":
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    elif kind in ("swap", "copy"):
        other = chance.choice(files)
        path.write_bytes(other.read_bytes())
        if kind == "swap":
            other.write_bytes(content)
    elif kind == "remove":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "append":
        path.write_bytes(content + chance.randbytes(chance.randrange(1, 100)))
    else:
        folder = chance.choice(sorted((run / "checkpoints").iterdir()))
        if kind == "remove folder":
            shutil.rmtree(folder)
        else:
            target = folder.with_name(f"round-{chance.choice((*ROUNDS, 9)):04d}")
            if target != folder:
                shutil.rmtree(target, ignore_errors=True)
                folder.rename(target)
    return f"{kind} {path.relative_to(run)}"


@pytest.mark.parametrize("seed", range(200))
def test_a_changed_file_is_noticed_or_harmless(run: Path, seed: int) -> None:
    chance = random.Random(seed)
    done = [mutate(run, chance) for _ in range(chance.choice((1, 1, 1, 2, 4)))]
    directory = RunDirectory(run)
    lines: list[str] = []
    find = partial(
        find_start,
        RunFiles(directory, CheckpointFolder(run / "checkpoints"), lines.append, 3),
        state_of(0),
        client_like=CLIENT,
    )
    asked = False
    try:
        start = find()
    except UserError as error:
        assert "--accept-lost-records" in str(error)
        start, asked = find(accept_lost_records=True), True
    assert (start.state.round in ROUNDS) or start.state.round == 0, done
    assert_same_state(start.state, state_of(start.state.round))
    expected = [record_of(round) for round in range(start.state.round + 1)] if start.state.round else []
    if asked:  # a digit of a record that was changed can't be told from the right one
        assert start.state.round > 0
        assert {record.round for record in start.records} <= {record.round for record in expected}
    else:
        assert list(start.records) == expected, done
    written = (run / "rounds.jsonl").read_bytes().splitlines() if start.records else []
    assert len(written) == len(start.records)
    left = CheckpointFolder(run / "checkpoints").rounds()
    assert len(left) <= 3
    assert left[:1] == ([start.state.round] if start.state.round else [])  # what is gone on from is never taken away
    if start.state.round < 4:
        assert any("warning" in line for line in lines) or any("folder" in each for each in done), (done, lines)


def forged() -> list[str]:
    """Manifests with a digest that fits, and contents that don't."""
    good: dict[str, Any] = {
        "format": FORMAT, "round": 1, "config": {}, "sha256": {}, "records_bytes": 0, "records_sha256": "",
        "wall_seconds": 1.0, "clients_per_block": 1,
    }  # fmt: skip
    contents: list[Any] = [[], 3, None, good]
    contents += [{key: value for key, value in good.items() if key != gone} for gone in good if gone != "format"]
    contents += [{**good, key: [None]} for key in good if key != "format"]
    return [
        json.dumps({"manifest": each, "sha256": hashlib.sha256(json.dumps(each, sort_keys=True).encode()).hexdigest()})
        for each in contents
    ]


def test_another_format_is_left_alone(run: Path) -> None:
    manifest = run / "checkpoints" / "round-0004" / "manifest.json"
    content = json.loads(manifest.read_text())["manifest"] | {"format": "flora-checkpoint-1"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({"manifest": content, "sha256": digest}))
    directory, folder = RunDirectory(run), CheckpointFolder(run / "checkpoints")
    with pytest.raises(UserError, match="'flora-checkpoint-1', which another version of this program has written"):
        find_start(RunFiles(directory, folder, print, 1), state_of(0), client_like=CLIENT)
    assert folder.rounds() == [4, 3, 2, 1]


def test_what_cannot_be_read_is_left_alone(run: Path) -> None:
    file = run / "checkpoints" / "round-0004" / "clients.safetensors"
    file.unlink()
    file.mkdir()  # even root can't read a folder as a file
    directory, folder = RunDirectory(run), CheckpointFolder(run / "checkpoints")
    with pytest.raises(UserError, match=r"clients\.safetensors: can't be read: Is a directory"):
        find_start(RunFiles(directory, folder, print, 1), state_of(0), client_like=CLIENT)
    assert folder.rounds() == [4, 3, 2, 1]


def test_records_that_no_checkpoint_belongs_to_are_asked_about(run: Path) -> None:
    """Records with other line ends, or a damaged first line: the checkpoints are good, but not for these records."""
    records, before = run / "rounds.jsonl", (run / "rounds.jsonl").read_bytes()
    for content, lost in (
        (before.replace(b"\n", b"\r\n"), []),
        (b"x" + before[1:].replace(b'"round": 3', b'"round": x'), [0, 3]),
        (b"", [0, 1, 2, 3, 4]),
    ):
        records.write_bytes(content)
        found = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        directory, folder = RunDirectory(run), CheckpointFolder(run / "checkpoints")
        which = f"{len(lost)} of 5 records can't be read (round {', '.join(map(str, lost))})"
        with pytest.raises(UserError) as caught:
            find_start(RunFiles(directory, folder, print, 4), state_of(0), client_like=CLIENT)
        assert str(caught.value) == (
            f"{records}: {which if lost else 'the records are not those that were written'}, though the checkpoint of "
            "round 4 is whole; to go on from it with the records that can be read: --accept-lost-records"
        )
        directory.close()
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"} == {
            path: each for path, each in found.items() if path.name != "lock"
        }
        copy = run.with_name(f"copy-{len(lost)}")
        shutil.copytree(run, copy)
        directory, folder = RunDirectory(copy), CheckpointFolder(copy / "checkpoints")
        start = find_start(
            RunFiles(directory, folder, print, 4), state_of(0), client_like=CLIENT, accept_lost_records=True
        )
        assert_same_state(start.state, state_of(4))
        assert [record.round for record in start.records] == [round for round in range(5) if round not in lost]
        assert (copy / "set-aside" / "rounds-1.jsonl").read_bytes() == content
        kept = (
            [json.loads(line)["round"] for line in (copy / "rounds.jsonl").read_text().splitlines()]
            if len(lost) < 5
            else []
        )
        assert kept == [record.round for record in start.records]
        directory.close()


def test_a_checkpoint_can_be_set_aside_twice(run: Path) -> None:
    directory, folder = RunDirectory(run), CheckpointFolder(run / "checkpoints")
    for _ in range(3):
        folder.save(checkpoint_of(9, directory.records_end), keep=9)
        folder.tidy(4, keep=4, set_aside=run / "set-aside")
    assert sorted(path.name for path in (run / "set-aside").iterdir()) == ["round-0009", "round-0009-2", "round-0009-3"]
    assert folder.rounds() == [4, 3, 2, 1]


def test_client_states_of_other_names_or_shapes(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint_of(1), keep=1)
    for wrong in ({}, {"mean": torch.zeros(5)}, {**CLIENT.optimizer, "mean": torch.zeros(6)}):
        with pytest.raises(DamagedError, match=r"round-0001/clients\.safetensors: "):
            folder.load(1, like=state_of(0), client_like=ClientState(optimizer=wrong))


def test_nothing_in_a_checkpoint_is_code(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint_of(1), keep=1)
    manifest = tmp_path / "round-0001" / "manifest.json"
    for content in (
        "[" * 100_000,
        "null",
        "[]",
        '{"sha256": "x"}',
        '{"sha256": 1, "manifest": {}}',
        "\x80",
        '{"a": NaN}',
    ):
        manifest.write_text(content, encoding="latin-1")
        with pytest.raises(UserError, match=r"round-0001/manifest\.json: "):
            folder.load(1, like=state_of(0), client_like=CLIENT)


def test_a_manifest_is_json_that_a_person_can_read(run: Path) -> None:
    content: Any = json.loads((run / "checkpoints" / "round-0004" / "manifest.json").read_text())
    assert content["manifest"]["round"] == 4
    assert content["manifest"]["config"] == {"rounds": 9, "local": {"epochs": 2}}
