"""The base of an adapter (LoRA): its checkpoints hold what is trained alone, and name the base and its digest.

The digest is made of one sum per parameter: of each element's bits, as an integer, times a pseudo-random factor of 64
bits that stands for its place. So each rank adds up its own shards, and the digest is the same for any number of ranks.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mirage_ds.checkpoint.facts import FACTS_NAME, read_facts
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.model.lora import plain_name
from mirage_ds.model.mirage import hf_name
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import whole_numel

KEY = "base"  # in run.json
ROW = 2**16  # elements with a factor each, times one of their row
CHUNK_ROWS = 64  # at a time: 32 MiB of intermediate values; on the host one, which its caches hold
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def describe_base(model: torch.nn.Module, config: Config) -> dict[str, Any]:
    """What run.json says of the base of an adapter; nothing of a run without one. A collective call of all ranks."""
    if config.model.lora is None:
        return {}
    frozen = {
        plain_name(hf_name(name)): weight for name, weight in model.named_parameters() if not weight.requires_grad
    }
    if distributed.is_main():
        print("Computing the digest of the base (model.lora), so that no checkpoint meets another one", flush=True)
    own = [own_sum(weight) for weight in frozen.values()]
    sums = (sum(parts) for parts in zip(*distributed.gather(own), strict=True))
    return {KEY: {"path": config.model.path, "digest": digest_of(dict(zip(frozen, sums, strict=True)))}}


def check_base(checkpoint: Path, found: Mapping[str, Any]) -> None:
    """Refuses an adapter of other weights than those that were loaded.

    Args:
        found: what `describe_base` says of this run.

    Raises:
        CheckpointError: on every rank.
    """
    saved = read_facts(checkpoint / FACTS_NAME).get(KEY)
    if saved is not None and saved["digest"] != found[KEY]["digest"]:
        raise other_base(checkpoint, saved, found[KEY]["path"])


def other_base(checkpoint: Path, saved: Mapping[str, Any], path: str) -> CheckpointError:
    """The error of weights that an adapter was not trained on."""
    return CheckpointError(
        f"the adapter was trained on other weights ({checkpoint}): on those of {saved['path']} as they were then, and "
        f"{path} has others; an adapter fits its own base alone; restore that model, or name a copy of it"
    )


def digest_of(sums: Mapping[str, int]) -> str:
    """From the sums of the frozen parameters, by transformers' names without an adapter."""
    lines = [f"{name} {value % 2**64}\n" for name, value in sorted(sums.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def own_sum(weight: Any) -> int:
    """Of this rank's shard of a parameter, without its padding."""
    begin = distributed.rank() * weight.ds_tensor.numel()
    count = min(weight.ds_tensor.numel(), max(0, whole_numel(weight) - begin))
    return element_sum(weight.ds_tensor.detach()[:count], begin)


def element_sum(elements: torch.Tensor, begin: int = 0) -> int:
    """The sum over elements [N] that stand at `begin` and after it in their parameter, modulo 2 ** 64."""
    columns = factors(torch.arange(ROW, device=elements.device))
    chunk = ROW * (1 if elements.device.type == "cpu" else CHUNK_ROWS)
    total, end = 0, begin + len(elements)
    for first in range(begin // ROW * ROW, end, chunk):
        part = elements[max(first - begin, 0) : first + chunk - begin].contiguous()
        bits = part.view(INTEGERS[part.dtype]).long()
        before = max(begin - first, 0)
        after = -(before + len(bits)) % ROW
        table = torch.nn.functional.pad(bits, (before, after)).view(-1, ROW)
        rows = torch.arange(first // ROW, first // ROW + len(table), device=bits.device)
        total += int((table.mul_(columns).sum(dim=1) * factors(rows + ROW)).sum())
    return total % 2**64


def factors(numbers: torch.Tensor) -> torch.Tensor:
    """An odd pseudo-random factor for each number, int64: the finalizer of SplitMix64.

    Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195
    """
    numbers = (numbers + 1) * (0x9E3779B97F4A7C15 - 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        numbers ^= (numbers >> shift) & (2 ** (64 - shift) - 1)
        numbers *= factor
    return numbers | 1
