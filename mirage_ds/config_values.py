"""The kinds of values that a configuration may have, and its sections."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails

from mirage_ds.paths import Location, expand, to_location, without_secrets

Item = TypeVar("Item")


def _to_location(value: Any) -> Any:
    return to_location(value) if isinstance(value, str) and value else _to_path(value)


def _to_path(value: Any) -> Any:
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError(f"{value!r:.80} is no path; write a path, in quotes if YAML takes it for something else")
    return Path(expand(str(value)))


UserPath = Annotated[Path, BeforeValidator(_to_path)]
"""A path with `~` and `$VARIABLES` expanded."""
UserLocation = Annotated[Location, BeforeValidator(_to_location)]
"""A path or a URL, with `~` and `$VARIABLES` expanded."""
UserName = Annotated[str, AfterValidator(expand)]
"""A path or another name, expanded alike."""
Pair = Annotated[tuple[Item, Item], Strict(False)]
Listed = Annotated[tuple[Item, ...], Strict(False)]
"""Values that YAML and JSON write as a list."""

LARGEST = 2**31 - 1  # of steps, samples, tokens and pixels
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Rate = Annotated[float, Field(ge=0, lt=1)]
MAX_SECONDS = 366 * 24 * 3600


def _number_or_auto(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError as error:  # of the number and of `auto`, each with a message of its own
        raise ValueError(f"must be an integer greater than 0, or auto (got {value!r:.80})") from error


PositiveIntOrAuto = Annotated[PositiveInt | Literal["auto"], WrapValidator(_number_or_auto)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values cannot change after the start.

    Strict: `yes` is no number, a text is none either, and every number is finite.

    The docstring below each key is its entry in docs/configuration.md.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class WeightedShards(Section):
    """A folder of shards in a mixture."""

    path: UserLocation
    weight: float = Field(default=1.0, gt=0, le=1e6)  # passes over it in an epoch


def _to_sets(value: Any) -> Any:
    """A path, or the folders of a mixture."""
    if isinstance(value, (str, Path)):
        return _to_location(value)
    allowed = "allowed: a path, or a list of paths and of {path: FOLDER, weight: NUMBER}"
    if isinstance(value, dict):
        raise ValueError(
            f"{without_secrets(repr(value)):.80} is one folder with a weight; {allowed}; put it into a list, as "
            "[{path: FOLDER, weight: 2}]"
        )
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"{without_secrets(repr(value)):.80} names no folder of shards; {allowed}; name at least one folder"
        )
    sets: list[WeightedShards] = []
    for number, each in enumerate(value, 1):
        try:
            sets.append(WeightedShards.model_validate({"path": each} if isinstance(each, (str, Path)) else each))
        except ValidationError as error:
            reasons = "; ".join(_reason(details) for details in error.errors())
            raise ValueError(
                f"folder {number} of the list cannot be used ({without_secrets(repr(each)):.80}): {reasons}; "
                f"{allowed}, with weights above 0 that are finite; correct it, or leave out a folder of which nothing "
                "is to be used"
            ) from error
    paths = [each.path for each in sets]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{without_secrets(str(twice))} is named {paths.count(twice)} times; each folder may stand once in the "
            "list; give it the sum of its weights"
        )
    return tuple(sets)


def _reason(details: ErrorDetails) -> str:
    key = ".".join(map(str, details["loc"]))
    if details["type"] == "extra_forbidden":
        return f"unknown key {key}; allowed: {', '.join(WeightedShards.model_fields)}"
    return f"{key}: {details['msg'].removeprefix('Value error, ')}"


ShardPaths = Annotated[Location | tuple[WeightedShards, ...], BeforeValidator(_to_sets)]
"""A folder of shards, on a disk or by its URL, or several with their weights."""
