"""The parts of an evaluation against what was written: cut anywhere, and continued by another number of ranks."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.parts import Decoded, Parts, check_settings
from mirage_ds.evaluation.tasks.outcome import Outcome
from mirage_ds.inference.feed import Slot

STATE_SIZE, NUM_UNITS = 5, 12
Units = dict[str, list[Decoded]]


def units(draw: random.Random) -> Units:
    """Batches of 1 to 3 answers; in every third of them no row made a state, in the others some rows did."""
    made, number = {}, 0
    for unit in range(NUM_UNITS):
        rows = []
        for _ in range(draw.randint(1, 3)):
            scores = {"exact": Outcome(draw.random(), "Right\n")}
            answer = Answer(number, f"a:{number}", "own", 0, "\u00e9\n", 3, 1, 2, 0, True, scores, "", {"n": [number]})
            slots = [Slot(*divmod(place, 2)) for place in range(draw.choice([0, 1, 4]) if unit % 3 else 0)]
            rows.append(Decoded(answer, f"key{number}", {slot: torch.randn(STATE_SIZE) for slot in slots}))
            number += 1
        made[f"own/0/{unit}"] = rows
    return made


def write(folder: Path, rank: int, own: Units) -> None:
    parts = Parts(folder, rank, STATE_SIZE)
    for name, rows in own.items():
        parts.add(name, rows)
    parts.close()


def compare(parts: Parts, expected: Units) -> None:
    """Each unit is there once, with all that was given."""
    rows = sorted((row for unit in expected.values() for row in unit), key=lambda row: row.answer.number)
    assert parts.units() == expected.keys()
    assert sorted(parts.answers(), key=lambda answer: answer.number) == [row.answer for row in rows]
    states = parts.states()
    assert list(states) == [row.key for row in rows if row.states]
    for row in rows:
        assert states.slots(row.key) == list(row.states)
        for slot, state in row.states.items():
            torch.testing.assert_close(states.at(row.key, slot), state, rtol=0, atol=0)


def complete_after_cut(folder: Path, rank: int, own: Units) -> list[str]:
    """The units of a rank before the first whose line or states were cut, by the sizes of the files."""
    lines = (folder / f"rank_{rank}.jsonl").read_bytes().split(b"\n")[:-1]
    left = (folder / f"rank_{rank}.states").stat().st_size // (4 * STATE_SIZE)
    found = []
    for name, _ in zip(own, lines, strict=False):
        left -= sum(len(row.states) for row in own[name])
        if left < 0 and any(row.states for row in own[name]):
            break
        found.append(name)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_cut_anywhere_and_continued(tmp_path: Path, seed: int) -> None:
    """Every file of three ranks is cut at a random byte; one, two or five ranks write what is missing."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    expected = units(draw)
    dealt = [{name: expected[name] for name in list(expected)[rank::3]} for rank in range(3)]
    for rank, own in enumerate(dealt):
        write(tmp_path, rank, own)
        for path in (tmp_path / f"rank_{rank}.jsonl", tmp_path / f"rank_{rank}.states"):
            with path.open("r+b") as file:
                file.truncate(draw.randint(0, path.stat().st_size))
    kept = [name for rank, own in enumerate(dealt) for name in complete_after_cut(tmp_path, rank, own)]
    ranks = [Parts(tmp_path, rank, STATE_SIZE) for rank in range(draw.choice([1, 2, 5]))]
    compare(ranks[0], {name: expected[name] for name in kept})
    for number, name in enumerate(sorted(expected.keys() - set(kept))):
        ranks[number % len(ranks)].add(name, expected[name])
    compare(ranks[-1], expected)


def test_states_beyond_the_lines_are_not_read(tmp_path: Path) -> None:
    """A kill between the states and their line: the next unit's states follow, and its line says where."""
    made = units(random.Random(1))
    write(tmp_path, 0, {"own/0/1": made["own/0/1"]})
    with (tmp_path / "rank_0.states").open("ab") as file:
        file.write(b"\x00" * (4 * STATE_SIZE * 2 + 7))
    write(tmp_path, 0, {"own/0/2": made["own/0/2"]})
    compare(Parts(tmp_path, 1, STATE_SIZE), {name: made[name] for name in ("own/0/1", "own/0/2")})


def test_states_are_read_while_another_rank_writes(tmp_path: Path) -> None:
    made = units(random.Random(1))
    write(tmp_path, 0, made)
    with (tmp_path / "rank_0.states").open("ab") as file:
        file.write(b"\x00" * 7)  # a part of a state
    with (tmp_path / "rank_0.jsonl").open("ab") as file:
        file.write(b'{"unit": "own/0/1')
    compare(Parts(tmp_path, 1, STATE_SIZE), made)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    settings = {"model": "a", "limit": None, "top_p": 0.9}
    check_settings(tmp_path / "parts", settings)
    check_settings(tmp_path / "parts", settings)
    for name, other in (("model", "b"), ("limit", 5), ("top_p", 0.5)):
        words = rf"has {name}={settings[name]!r}, this one {name}={other!r} \(.*parts\); .* same settings only; repeat"
        with pytest.raises(DataError, match=words):
            check_settings(tmp_path / "parts", settings | {name: other})
    with pytest.raises(DataError, match=r"has top_p=0.9, this one top_p=None"):
        check_settings(tmp_path / "parts", {"model": "a", "limit": None})
    assert json.loads((tmp_path / "parts" / "settings.json").read_text()) == settings


def test_a_row_of_another_arm_has_no_states(tmp_path: Path) -> None:
    made = units(random.Random(2))["own/0/0"]
    rows = [Decoded(replace(row.answer, arm="mean"), row.key, {}) for row in made]
    write(tmp_path, 0, {"mean/0/0": rows})
    assert not list(Parts(tmp_path, 0, STATE_SIZE).states())
