"""Which parameters of a model are trained: `model.train_tower`, `train_merger`, `freeze` and `lora`."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from mirage_ds.config import ModelConfig
from mirage_ds.errors import ConfigError
from mirage_ds.model.backbone import Backbone
from mirage_ds.model.lora import add_lora


def choose_trained(backbone: Backbone, model: ModelConfig, latent_ids: Sequence[int], seed: int) -> None:
    """Marks the parameters that are trained, and adds those of an adapter. Before the modules are built upon.

    Args:
        latent_ids: the tokens whose rows an adapter trains.
        seed: of an adapter's matrices.

    Raises:
        ConfigError: a pattern of `model.freeze` matches nothing, or nothing is left to train.
    """
    if model.lora is not None:
        add_lora(backbone, model.lora, latent_ids, seed)
        return
    backbone.visual.requires_grad_(model.train_tower)
    if model.train_merger:
        backbone.visual.merger.requires_grad_(True)
    parameters = dict(backbone.hf.named_parameters())
    for pattern in model.freeze:
        matched = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matched:
            near = get_close_matches(pattern, parameters, n=1, cutoff=0)[0]
            raise ConfigError(
                f"model.freeze has a pattern that matches no parameter ({pattern!r:.80}, model.path={model.path}); "
                f"expected transformers' names, such as {near}, with * for any part of it; correct it, or leave it out"
            )
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(
            f"nothing is left to train (model.freeze={list(model.freeze)}, model.path={model.path}); a run needs a "
            "parameter that no pattern matches; leave out a pattern"
        )
