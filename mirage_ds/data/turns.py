"""The turns of a row that has several: {"conversations": [{"from": "human", "value": ...}, ...], "train_answers": ...}.

Layout and names are ShareGPT's. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mirage_ds.errors import DataError

Role = Literal["system", "human", "gpt"]
CONVERSATION_FIELDS = ("conversations", "train_answers")
TURN_CHARS = 15
"""What a turn counts beside its text, in characters: its role and markers, about five tokens."""


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: Role
    text: str
    train: bool = False  # an answer with a loss


def has_turns(row: Mapping[str, Any]) -> bool:
    """Whether a row has `conversations`; null counts as missing."""
    return row.get("conversations") is not None


def read_turns(row: Mapping[str, Any], where: str, *, answered: bool = True) -> tuple[Turn, ...]:
    """The turns of a row that has some: perhaps a system turn, then questions and answers in turn.

    Args:
        answered: the last turn must be an answer; otherwise it may be missing, and is then empty.

    Raises:
        DataError: the row has text_input or text_output too, or turns of another form or in another order.
    """
    both = [name for name in ("text_input", "text_output") if row.get(name) is not None]
    if both:
        raise DataError(
            f"the row has conversations and {' and '.join(both)} ({where}); allowed: conversations, or text_input and "
            "text_output; remove one of them"
        )
    value = row["conversations"]
    if not isinstance(value, list) or not value:
        raise DataError(
            f"conversations is {value!r:.80} ({where}); expected a list of turns, each with from and value; fix the "
            "field"
        )
    said = [_read_turn(turn, f"conversations[{number}]", where) for number, turn in enumerate(value)]
    roles = [role for role, _ in said]
    num_system = int(roles[0] == "system")
    if not answered and len(roles) % 2 != num_system:
        said.append(("gpt", ""))
    num_answers = (len(said) - num_system) // 2
    if [role for role, _ in said[num_system:]] != ["human", "gpt"] * max(num_answers, 1):
        raise DataError(
            f"the turns are from {', '.join(roles):.200} ({where}, conversations); allowed: perhaps system first, then "
            "human and gpt in turn, at the end gpt; add, join or remove turns"
        )
    trained = _read_trained(row.get("train_answers"), num_answers, where)
    return tuple(
        Turn(role, text, role == "gpt" and (number - num_system) // 2 in trained)
        for number, (role, text) in enumerate(said)
    )


def turn_fields(turns: Sequence[Turn]) -> dict[str, Any]:
    """The inverse of `read_turns`; without `train_answers` where only the last answer is trained."""
    answers = [turn for turn in turns if turn.role == "gpt"]
    trained = [number for number, answer in enumerate(answers) if answer.train]
    fields = {"conversations": [{"from": turn.role, "value": turn.text} for turn in turns]}
    return fields | ({"train_answers": trained} if len(trained) > 1 else {})


def as_text(asked: Sequence[Turn]) -> str:
    """A question with its context, for a reader; without a context the question as it is."""
    if len(asked) == 1:
        return asked[0].text.strip()
    return "\n\n".join(f"[{turn.role}] {turn.text.strip()}" for turn in asked)


def _read_turn(turn: Any, name: str, where: str) -> tuple[Role, str]:
    # In parquet every turn has the fields of all.
    fields = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else {}
    role: Role | None = next((each for each in get_args(Role) if each == fields.get("from")), None)
    text = fields.get("value")
    if fields.keys() != {"from", "value"} or role is None or not isinstance(text, str) or not text:
        raise DataError(
            f"{name} is {turn!r:.120} ({where}); expected an object with from (system, human or gpt) and value (a "
            "non-empty text), and nothing else; fix the turn"
        )
    return role, text


def _read_trained(value: Any, num_answers: int, where: str) -> set[int]:
    """The numbers of the answers that are trained."""
    last = num_answers - 1
    named = {None: [last], "last": [last], "all": list(range(num_answers))}
    numbers = value if isinstance(value, (list, dict)) else named.get(value)
    if not isinstance(numbers, list) or not all(type(each) is int and 0 <= each <= last for each in numbers):
        numbers = []
    if last not in numbers:
        raise DataError(
            f'train_answers is {value!r:.80} ({where}), answers: {num_answers}; allowed: "last", "all", or a list '
            f"of numbers from 0 to {last} that has {last}, as the last answer is always trained; fix the field"
        )
    return set(numbers)
