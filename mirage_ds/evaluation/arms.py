"""The arms of an evaluation: what is replaced while the file is decoded once more."""

from dataclasses import dataclass

from mirage_ds.errors import ConfigError

OWN = "own"


@dataclass(frozen=True)
class Arm:
    """One decoding of the file. In each arm either the latents or the input images are replaced."""

    name: str  # in results: "own", "mean", "noise:1.0", "image:gray"
    latents: str = OWN  # what is fed at the latents, a key of LATENTS
    image: str = OWN  # what is seen instead of the input images, a key of IMAGES

    @property
    def needs_states(self) -> bool:
        """Whether it needs the states that all rows made in the arm `own`."""
        return LATENTS[self.latents]


# Name -> whether it needs the own states of all rows.
LATENTS = {OWN: False, "none": False, "markers": False, "zeroed": False, "shuffled": True, "mean": True}


def parse_arms(latents: str) -> list[Arm]:
    """The arms of a comma-separated list, `own` first: every difference is to it.

    Raises:
        ConfigError: an unknown name, or a name twice.
    """
    names = [name.strip() for name in latents.split(",")]
    for name in names:
        if name not in LATENTS or names.count(name) > 1:
            raise ConfigError(
                f"{name!r:.80} is unknown or there twice (--latents {latents}); expected some of {', '.join(LATENTS)}, "
                "separated by commas; correct the list"
            )
    return [Arm(OWN), *(Arm(name, latents=name) for name in names if name != OWN)]
