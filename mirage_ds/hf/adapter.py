"""The two forms in which a LoRA run is exported: merged into its base, or as files of peft for that base.

mirage export --merge    a plain model folder: W + alpha / rank B A, with the trained rows in embeddings and head
mirage export --adapter  adapter_config.json and adapter_model.safetensors: peft's PeftModel.from_pretrained(BASE, DIR)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from mirage_ds.checkpoint.base import KEY, digest_of, element_sum, other_base
from mirage_ds.checkpoint.partitions import StoredParameter
from mirage_ds.config import Config, Dtype
from mirage_ds.errors import CheckpointError, ConfigError, DataError
from mirage_ds.hf.written_folder import set_modes
from mirage_ds.model.backbone import DTYPES, Backbone, file_name, has_file
from mirage_ds.model.lora import ADAPTER, EMBEDDINGS, HEAD, peft_config, scaling
from mirage_ds.model.trained import choose_trained
from mirage_ds.output_folder import new_folder

Form = Literal["merge", "adapter"]
PEFT_PREFIX, ADAPTER_FILE = "base_model.model.", "adapter_model.safetensors"
Learnt = Callable[[torch.Tensor], torch.Tensor]  # a weight in float32 -> what it has become


def check_form(form: Form | None, config: Config, checkpoint: Path) -> None:
    """A run with an adapter is exported in one of two forms, any other run in its own.

    Raises:
        ConfigError: the form does not fit the run.
    """
    if config.model.lora is None and form is not None:
        raise ConfigError(
            f"the run has no adapter ({checkpoint}, no model.lora): --{form} is for those that have one; a run without "
            "one is exported as a complete model; leave the option out"
        )
    if config.model.lora is not None and form is None:
        raise ConfigError(
            f"the run trained an adapter ({checkpoint}, model.lora): it can be exported as a complete model, with what "
            "was learnt added to its weights, or as files for peft; give --merge for the first, or --adapter"
        )


class BaseWeights:
    """The weights of a model folder or hub id, read one at a time."""

    def __init__(self, source: str, cache_dir: Path | None) -> None:
        """
        Raises:
            ConfigError: it has no safetensors.
        """
        self.source = source
        name = next((n for n in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME) if has_file(source, n, cache_dir)), None)
        if name is None:
            raise ConfigError(
                f"the base has no safetensors ({source}): weights are read from these one at a time; expected "
                f"{SAFE_WEIGHTS_NAME}, or its parts with an index; make a folder with them, by mirage init --from "
                f"{source} --output DIR, and name it with --model"
            )
        first = Path(str(cached_file(source, name, cache_dir=cache_dir)))
        if name == SAFE_WEIGHTS_INDEX_NAME:
            members: dict[str, str] = json.loads(first.read_text())["weight_map"]
            parts = {part: Path(str(cached_file(source, part, cache_dir=cache_dir))) for part in {*members.values()}}
            self.files = {member: parts[part] for member, part in members.items()}
        else:
            with safe_open(first, framework="pt") as opened:
                self.files = dict.fromkeys(opened.keys(), first)

    def read(self, name: str) -> torch.Tensor:
        """A weight by transformers' name of its parameter; files have this name, or that of the hub.

        Raises:
            ConfigError: it is missing.
        """
        found = next((each for each in (file_name(name), name) if each in self.files), None)
        if found is None:
            raise ConfigError(
                f"the base has no weight {file_name(name)} ({self.source}); it must be the model that the run started "
                "from; copy that folder again, or name it with --model"
            )
        with safe_open(self.files[found], framework="pt") as opened:
            weight: torch.Tensor = opened.get_tensor(found)
        return weight


@dataclass(frozen=True)
class MergedParameter:
    """A weight of the base with what the adapter has learnt; stands in for a `StoredParameter`."""

    name: str
    shape: torch.Size
    base: BaseWeights
    dtype: torch.dtype  # in which the run computed
    learnt: Learnt
    sums: dict[str, int] = field(repr=False)  # gets what the digest of the base is made of

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The merged weight in `dtype`; only this one is in memory."""
        weight = self.base.read(self.name).to(self.dtype)
        self.sums[self.name] = element_sum(weight.flatten())
        return self.learnt(weight.float()).to(dtype)


class StoredAdapter:
    """What a checkpoint holds of a run with an adapter."""

    def __init__(
        self,
        checkpoint: Path,
        stored: Mapping[str, StoredParameter],
        config: Config,
        source: str,
        hf: PreTrainedModel,
        latent_ids: Sequence[int],
    ) -> None:
        """
        Args:
            hf: the base without its weights.
            stored: the trained parameters by their names in transformers' model with the adapter.
            source: folder or hub id of the base.
        """
        assert config.model.lora is not None
        self.checkpoint, self.stored, self.source, self.latent_ids = checkpoint, stored, source, list(latent_ids)
        self.config, self.lora = config, config.model.lora
        self.sums: dict[str, int] = {}  # of the base's weights that were read
        self.hf, self.tied = hf, Backbone(hf, attention="").tied

    def add_to(self, hf: PreTrainedModel) -> PreTrainedModel:
        """A second model without weights, with this run's adapter in it."""
        choose_trained(Backbone(hf, attention=""), self.config.model, self.latent_ids, seed=0)
        return hf

    def merged(self) -> dict[str, "StoredParameter | MergedParameter"]:
        """The parameters of a plain model, by transformers' names."""
        base, dtype = BaseWeights(self.source, self.config.model.cache_dir), DTYPES[self.config.train.dtype]
        return {
            name: self.stored.get(name)
            or MergedParameter(name, parameter.shape, base, dtype, self.learnt(name), self.sums)
            for name, parameter in self.hf.named_parameters()
        }

    def learnt(self, name: str) -> Learnt:
        """How a weight of the base becomes the merged one."""
        module = name.removesuffix(".weight")
        pair = [self.stored.get(f"{module}.lora_{which}.{ADAPTER}.weight") for which in "AB"]
        rows, factor = self.stored.get(f"{module}.rows"), scaling(self.lora)
        if pair[0] is not None and pair[1] is not None:
            first, second = pair[0], pair[1]
            return lambda weight: torch.addmm(weight, second.read(), first.read(), alpha=factor)
        if rows is not None:
            return lambda weight: weight.index_copy(0, torch.tensor(self.latent_ids), rows.read())
        return lambda weight: weight

    def check_base(self, facts: Mapping[str, Any]) -> None:
        """All weights that were read are those that the adapter was trained on.

        Raises:
            CheckpointError: they are not.
        """
        if digest_of(self.sums) != facts[KEY]["digest"]:
            raise other_base(self.checkpoint, facts[KEY], self.source)

    def write(self, output: Path, dtype: Dtype) -> str:
        """Writes peft's two files into a new folder, and says what they are.

        Raises:
            CheckpointError: a weight is not finite.
            DataError: the folder exists already, or cannot be written.
        """
        weights = {
            PEFT_PREFIX + peft_name(name): finite(name, parameter.read(DTYPES[dtype]), self.checkpoint)
            for name, parameter in self.stored.items()
        }
        if self.tied and self.lora.train_embeddings == "all":  # peft asks for both
            weights[f"{PEFT_PREFIX}{HEAD}.weight"] = weights[f"{PEFT_PREFIX}{EMBEDDINGS}.weight"].clone()
        num_bytes = sum(weight.nbytes for weight in weights.values())
        size = f"{num_bytes / 10**6:.1f} MB"
        try:
            with new_folder(output, needs_bytes=num_bytes) as folder:
                self.peft_config().save_pretrained(str(folder))
                save_file(weights, folder / ADAPTER_FILE, metadata={"format": "pt"})
                set_modes(folder)
        except (OSError, SafetensorError) as error:
            raise not_written(output, size, error) from error
        return f"{size} of {dtype} weights of an adapter of {self.source}"

    def peft_config(self) -> Any:
        """What plain peft needs to know to make the same modules."""
        names = [module.rpartition(".")[2] for module in (EMBEDDINGS, HEAD)[: 1 if self.tied else 2]]
        more: dict[str, Any] = {}
        if self.lora.train_embeddings == "latent_rows":
            more["trainable_token_indices"] = {name: self.latent_ids for name in names}
        if self.lora.train_embeddings == "all":
            more |= {"modules_to_save": names, "ensure_weight_tying": self.tied}
        return peft_config(self.lora, base_model_name_or_path=self.source, inference_mode=True, **more)


def peft_name(name: str) -> str:
    """A parameter's name in peft's file, without its prefix, from its name in transformers' model with the adapter."""
    if name.endswith(".rows"):
        return name.removesuffix("rows") + "token_adapter.trainable_tokens_delta"
    return name.replace(f".{ADAPTER}.", ".")


def finite(name: str, weight: torch.Tensor, checkpoint: Path) -> torch.Tensor:
    """The weight.

    Raises:
        CheckpointError: it is not finite.
    """
    if not weight.isfinite().all():
        raise CheckpointError(
            f"the weight {name} is not finite ({checkpoint}); a model that is exported must be able to compute; "
            "export an earlier checkpoint, or train again with a smaller train.lr"
        )
    return weight


def not_written(output: Path, size: str, error: Exception) -> DataError:
    """The error of a folder that the system refused."""
    return DataError(
        f"the export cannot be written ({output}): {error}; it needs {size} in a writable folder; free some "
        "space there, or name another folder"
    )
