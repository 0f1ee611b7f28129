"""The lists of arms as typed, and what is refused before anything is loaded."""

import pytest

from mirage_ds.data.rows import Sample
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.latents.arms import IMAGES, LATENTS, Arm, check_arms, parse_arms


def rows(*images: tuple[int, int]) -> list[Row]:
    """Rows with so many input and helper images."""
    return [
        Row(number, f"rows.jsonl:{number + 1}", Sample(f"{number:09d}", "?", "", (b"",) * inputs, (b"",) * helpers))
        for number, (inputs, helpers) in enumerate(images)
    ]


@pytest.mark.parametrize(
    ("latents", "image", "names"),
    [
        ("own", "own", ["own"]),
        ("mean", "own", ["own", "mean"]),
        (" first , own,none ", "own", ["own", "first", "none"]),
        ("noise, noise:0.5,noise:2", "own", ["own", "noise:1.0", "noise:0.5", "noise:2.0"]),
        ("own", "gray,own,none", ["own", "image:gray", "image:none"]),
        ("zeroed", "other", ["own", "zeroed", "image:other"]),
        (
            "all",
            "all",
            [
                *("own", "none", "markers", "zeroed", "mean", "fixed", "noise:1.0", "shuffled", "oracle", "first"),
                *("image:gray", "image:other", "image:none"),
            ],
        ),
    ],
)
def test_lists(latents: str, image: str, names: list[str]) -> None:
    arms = parse_arms(latents, image)
    assert [arm.name for arm in arms] == names
    assert all(arm.latents in LATENTS and arm.image in IMAGES for arm in arms)
    assert all("own" in (arm.latents, arm.image) for arm in arms), "an arm replaces one of the two"


def test_the_factor_of_the_noise() -> None:
    assert parse_arms("noise:0.25")[1] == Arm("noise:0.25", latents="noise", noise=0.25)


@pytest.mark.parametrize(
    ("latents", "image", "message"),
    [
        ("nosie", "own", "'nosie' is unknown .--latents nosie.; expected some of own, none, markers, .*, first, .*all"),
        ("", "own", "'' is unknown"),
        ("own,", "own", "'' is unknown"),
        ("mean:2", "own", "'mean:2' is unknown"),
        ("own", "grey", "'grey' is unknown .--image grey.; expected some of own, gray, other, none, .*all"),
        (
            "own,image:gray",
            "own",
            "'image:gray' is unknown .*for the arm image:gray give --image gray, to `mirage eval",
        ),
        (
            "own",
            "image:other",
            "'image:other' is unknown .--image image:other.*for the arm image:other give --image ot",
        ),
        ("own,image:grey", "own", "'image:grey' is unknown"),
        ("mean,zeroed,mean", "own", "mean is there twice"),
        ("noise:1,noise:1.0", "own", "noise:1.0 is there twice"),
        ("own", "none,none", "image:none is there twice"),
        ("noise:0", "own", "factor of the noise is '0' .*positive, finite"),
        ("noise:-1", "own", "positive, finite"),
        ("noise:nan", "own", "positive, finite"),
        ("noise:inf", "own", "positive, finite"),
        ("noise:", "own", "positive, finite"),
        ("noise:much", "own", "positive, finite"),
    ],
)
def test_lists_that_are_refused(latents: str, image: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arms(latents, image)


@pytest.mark.parametrize(
    ("latents", "image", "few", "enough"),
    [
        ("shuffled", "own", [(0, 0)], [(0, 0)] * 2),
        ("fixed", "own", [(0, 0)], [(0, 0)] * 2),
        ("oracle", "own", [(1, 0)] * 3, [(1, 0), (1, 1)]),
        ("own", "other", [(1, 0), (0, 0)], [(1, 0), (0, 0), (2, 0)]),
        ("own", "gray", [(0, 1)], [(1, 0)]),
        ("own", "none", [(0, 1)], [(1, 0)]),
    ],
)
def test_too_few_rows(latents: str, image: str, few: list, enough: list) -> None:
    arms = parse_arms(latents, image)
    with pytest.raises(DataError, match=r"rows.*: [01] \(rows.jsonl, --(latents|image) \w+\); needed: at least [12];"):
        check_arms(arms, rows(*few), "rows.jsonl")
    check_arms(arms, rows(*enough), "rows.jsonl")
    check_arms(parse_arms("own"), rows(*few), "rows.jsonl")
