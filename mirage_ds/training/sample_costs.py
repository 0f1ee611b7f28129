"""What every sample of a run costs: measured once, and the same on all ranks, as each deals from its own copy."""

import hashlib
import json
import socket
from typing import Any

import numpy as np

from mirage_ds.config import Config
from mirage_ds.data.costs import SampleCosts, SetCosts
from mirage_ds.data.counts import counts_name, load_counts
from mirage_ds.data.encode import Encoder
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.lengths import check_budget
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.spread import spread
from mirage_ds.errors import DataError
from mirage_ds.training.folder_checks import not_counted
from mirage_ds.zero3 import distributed

NUM_COMPARED = 1000  # samples whose costs are compared


def measure_samples(config: Config, encoder: Encoder, shards: ShardFolder) -> tuple[SampleCosts, str]:
    """What gives the costs of the run's samples, and whether their tokens were counted, in words.

    Where rows are packed, every sample fits into one.

    Raises:
        DataError: rows are packed, and the tokens were not counted, or samples are longer than the budget; or the
            counts cannot be used.
    """
    name = counts_name(encoder.tokenizer, system_turn=config.data.system_turn)
    helpers = Helpers.of(config)
    counts = load_counts(name, shards, stage="text" if helpers.images == "none" else config.train.stage)
    if config.data.packing and counts is None:
        raise not_counted(config, shards)
    costs = SampleCosts(
        helpers.index(shards),
        encoder.image_tokens,
        stage=config.train.stage,
        latent_size=config.model.latent_size,
        keeps_targets=config.model.cache_targets is not None,
        texts=counts,
    )
    if config.data.token_budget is not None:
        check_budget(shards, costs, config.data.token_budget)
    where = shards.place.where(name)
    source = f"estimated from characters (no {where})" if counts is None else f"counted ({where})"
    return costs, f"tokens {source}"


def measure_folders(config: Config, encoder: Encoder, shards: ShardFolders) -> tuple[SetCosts, str]:
    """As `measure_samples`, of all folders of a run."""
    measured = [measure_samples(config, encoder, folder) for folder in shards.folders]
    return SetCosts(tuple(costs for costs, _ in measured)), "; ".join(source for _, source in measured)


def cost_facts(config: Config, encoder: Encoder) -> dict[str, Any]:
    """What decides the costs of samples beside the shards and their counts."""
    return {
        "stage": config.train.stage,
        "keeps_targets": config.model.cache_targets is not None,
        **encoder.helper_facts(),  # with the image processor and K
        **Helpers.of(config).facts(),
    }


def require_same(costs: SetCosts, source: str, shards: ShardFolders, facts: dict[str, Any]) -> None:
    """Ranks that dealt by other costs would compute samples twice, or never, or wait for each other without end.

    Compared is what decides the costs, and what some samples cost here, in case that this node computes otherwise. The
    index itself was compared with the digest in the manifest, see `check_digests`.

    Args:
        source: what `measure_folders` says of the costs.
        facts: see `cost_facts`.
    Raises:
        DataError: on every rank.
    """
    some = costs.of(np.array(spread(len(costs), NUM_COMPARED)))
    index_files = [file.sha256 for folder in shards.folders for file in folder.manifest.index]
    decides = json.dumps([shards.digest, index_files, facts], sort_keys=True)
    counts = b"/".join(b"" if part.texts is None else part.texts.tobytes() for part in costs.parts)
    digest = hashlib.sha256(decides.encode() + counts + some.tokens.tobytes() + some.costs.tobytes()).hexdigest()
    found = distributed.gather((source, digest, socket.gethostname()))
    hosts: dict[tuple[str, str], set[str]] = {}
    for source, digest, host in found:
        hosts.setdefault((source, digest), set()).add(host)
    if len({digest for _, digest in hosts}) > 1:
        kinds = "; ".join(
            f"{', '.join(sorted(names))}: {source}, digest {digest:.12}" for (source, digest), names in hosts.items()
        )
        raise DataError(
            f"the ranks have other costs of the samples and would deal differently (data.shards={shards.where}): "
            f"{kinds}; expected the same shards, and the same file of `mirage-data count` or none, on every host; copy "
            "the folder of shards to all hosts again, and start again"
        )
