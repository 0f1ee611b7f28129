"""The arms of an evaluation: what is replaced while the file is decoded once more. Needs no torch.

LATENTS and IMAGES list the arms; docs/evaluation.md says what each of them answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.answers import Row

OWN = "own"
ALL = "all"
NOISE = "noise"
LATENTS = (OWN, "none", "markers", "zeroed", "mean", "fixed", NOISE, "shuffled", "oracle", "first")
IMAGES = (OWN, "gray", "other", "none")
NEED_STATES = frozenset({"mean", "fixed", "shuffled"})  # of other rows


@dataclass(frozen=True)
class Arm:
    """One decoding of the file. In each arm either the latents or the input images are replaced."""

    name: str  # in results: "own", "mean", "noise:1.0", "image:gray"
    latents: str = OWN  # what is fed at the latents, one of LATENTS
    image: str = OWN  # what is seen instead of the input images, one of IMAGES
    noise: float = 0.0  # the norm of the noise over the norm of the state

    @property
    def needs_states(self) -> bool:
        """Whether it needs the states that all rows made in the arm `own`."""
        return self.latents in NEED_STATES


def parse_arms(latents: str, image: str = OWN, setting: str = "--latents ") -> list[Arm]:
    """The arms of two comma-separated lists, `own` first: every difference is to it.

    Args:
        setting: what names the list of latents, for messages.

    Raises:
        ConfigError: an unknown name, a name twice, or a factor of the noise that is not a positive number.
    """
    arms = [_latents_arm(name, f"{setting}{latents:.80}") for name in _names(latents, LATENTS)]
    arms += [_image_arm(name, f"--image {image:.80}") for name in _names(image, IMAGES)]
    replacing = [arm for arm in arms if arm.name != OWN]
    for arm in replacing:
        if replacing.count(arm) > 1:
            where = f"{setting}{latents:.80}" if arm.image == OWN else f"--image {image:.80}"
            raise ConfigError(f"{arm.name} is there twice ({where}); each arm is decoded once; remove one")
    return [Arm(OWN), *replacing]


def check_arms(arms: Sequence[Arm], rows: Sequence[Row], where: str, setting: str = "--latents ") -> None:
    """Refuses arms for which the rows have nothing to put in place; before anything is loaded.

    Args:
        rows: with their helper images, if an arm is `oracle`.
        where: the file of the rows.
        setting: what names the list of latents, for messages.

    Raises:
        DataError: too few rows.
    """
    with_images = sum(bool(row.sample.input_images) for row in rows)
    with_helpers = sum(bool(row.sample.helper_images) for row in rows)
    for arm in arms:
        option = f"{setting}{arm.name}" if arm.image == OWN else f"--image {arm.image}"
        if arm.latents in ("fixed", "shuffled") and len(rows) < 2:
            raise _too_few("rows", len(rows), 2, where, option)
        if arm.latents == "oracle" and not with_helpers:
            raise _too_few("rows with helper images (image_output)", with_helpers, 1, where, option)
        if arm.image == "other" and with_images < 2:
            raise _too_few("rows with input images", with_images, 2, where, option)
        if arm.image in ("gray", "none") and not with_images:
            raise _too_few("rows with input images", with_images, 1, where, option)


def _names(text: str, every: Sequence[str]) -> Sequence[str]:
    return every if text.strip() == ALL else [name.strip() for name in text.split(",")]


def _latents_arm(name: str, where: str) -> Arm:
    kind, colon, factor = name.partition(":")
    if kind not in LATENTS or (colon and kind != NOISE):
        raise _unknown(name, where, LATENTS, _as_image(name) or f"{NOISE} takes a factor, such as {NOISE}:0.5; ")
    if kind != NOISE:
        return Arm(name, latents=name)
    try:
        noise = float(factor) if colon else 1.0
    except ValueError:
        noise = math.nan
    if not 0 < noise < math.inf:
        raise ConfigError(
            f"the factor of the noise is {factor!r:.80} ({where}); expected a positive, finite number, "
            f"the noise's norm over the state's; write for example {NOISE}:1.0"
        )
    return Arm(f"{NOISE}:{noise}", latents=NOISE, noise=noise)


def _image_arm(name: str, where: str) -> Arm:
    if name not in IMAGES:
        raise _unknown(name, where, IMAGES, _as_image(name))
    return Arm(OWN if name == OWN else f"image:{name}", image=name)


def _as_image(name: str) -> str:
    """How an arm is given that is named as in the results; empty if it replaces no image."""
    kind, _, image = name.partition(":")
    replaces = kind == "image" and image in IMAGES
    return f"for the arm {name} give --image {image}, to `mirage evaluate` or `mirage inspect`; " if replaces else ""


def _unknown(name: str, where: str, every: Sequence[str], more: str = "") -> ConfigError:
    return ConfigError(
        f"{name!r:.80} is unknown ({where}); expected some of {', '.join(every)}, separated by commas, or {ALL}; {more}"
        "correct the list"
    )


def _too_few(what: str, found: int, needed: int, where: str, option: str) -> DataError:
    return DataError(f"{what}: {found} ({where}, {option}); needed: at least {needed}; add some, or leave this arm out")
