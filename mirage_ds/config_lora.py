"""The section `model.lora` of a run's configuration: small matrices that are trained instead of the model's own."""

from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from mirage_ds.config_values import PositiveInt, Section
from mirage_ds.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


def _to_target_modules(value: Any) -> Any:
    """The name of a group, or names of matrices."""
    if isinstance(value, str) and value in GROUPS:
        return value
    if isinstance(value, (list, tuple)) and value and all(name in GROUPS["all"] for name in value):
        return tuple(dict.fromkeys(value))
    raise ValueError(
        f"{value!r:.80} names no matrices of a decoder layer; allowed: {', '.join(GROUPS)}, or a list of "
        f"{', '.join(GROUPS['all'])}; write for example all, or [q_proj, v_proj]"
    )


TargetModules = Annotated[str | tuple[str, ...], BeforeValidator(_to_target_modules)]


class Lora(Section):
    """LoRA (arXiv 2106.09685): each matrix W of the decoder that is named here computes W x + (alpha / rank) B A x; A
    and B are trained, W is not."""

    rank: PositiveInt = 16
    """Rows of A, columns of B."""
    alpha: float = Field(default=32, gt=0)
    """B A is multiplied by alpha / rank."""
    dropout: float = 0
    """Only 0 is possible: a step draws no random numbers."""
    target_modules: TargetModules = "all"
    """Matrices of each decoder layer: `attention` (q_proj, k_proj, v_proj, o_proj), `mlp` (gate_proj, up_proj,
    down_proj), `all`, or a list of these names."""
    train_embeddings: Literal["latent_rows", "none", "all"] = "latent_rows"
    """Rows of embeddings and head that are trained besides: `latent_rows`: those of the three latent tokens; `none`;
    `all`."""

    @field_validator("dropout")
    @classmethod
    def _nothing_is_drawn(cls, value: float) -> float:
        if value:
            raise ValueError(
                f"dropout is {value:g}; only 0 is possible, as a step draws no random numbers: layers that are "
                "recomputed would drop others; set model.lora.dropout=0"
            )
        return value

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the matrices."""
        return GROUPS[self.target_modules] if isinstance(self.target_modules, str) else self.target_modules


def check_peft() -> None:
    """Raises: ConfigError: LoRA needs a package that is not installed."""
    if find_spec("peft") is None:
        raise ConfigError(
            "peft is not installed (model.lora); LoRA needs it; install mirage_ds with its extra: pip install -e "
            "'.[lora]', or leave out model.lora"
        )
