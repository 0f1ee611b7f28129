"""What every sample of a run costs: measured once, and the same on all ranks, as each deals from its own copy."""

import hashlib
import socket

from mirage_ds.config import Config
from mirage_ds.data.costs import Costs, joined, measure_costs
from mirage_ds.data.counts import counts_path, load_counts
from mirage_ds.data.encode import Encoder
from mirage_ds.data.folders import ShardFolders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.lengths import check_budget
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import DataError
from mirage_ds.training.folder_checks import not_counted
from mirage_ds.zero3 import distributed


def measure_samples(config: Config, encoder: Encoder, shards: ShardFolder) -> tuple[Costs, str]:
    """The costs of the run's samples, and whether their tokens were counted, in words.

    Where rows are packed, every sample fits into one.

    Raises:
        DataError: rows are packed, and the tokens were not counted, or samples are longer than the budget; or the
            counts cannot be used.
    """
    path = counts_path(shards, encoder.tokenizer, system_turn=config.data.system_turn)
    helpers = Helpers.of(config)
    counts = load_counts(path, shards, stage="text" if helpers.images == "none" else config.train.stage)
    if config.data.packing and counts is None:
        raise not_counted(config, shards.path)
    costs = measure_costs(
        helpers.index(shards),
        encoder.image_tokens,
        stage=config.train.stage,
        latent_size=config.model.latent_size,
        keeps_targets=config.model.cache_targets is not None,
        texts=counts,
    )
    if config.data.token_budget is not None:
        check_budget(shards, costs.tokens, config.data.token_budget)
    source = f"estimated from characters (no {path})" if counts is None else f"counted ({path})"
    return costs, f"tokens {source}"


def measure_folders(config: Config, encoder: Encoder, shards: ShardFolders) -> tuple[Costs, str]:
    """As `measure_samples`, of all folders of a run."""
    measured = [measure_samples(config, encoder, folder) for folder in shards.folders]
    return joined([costs for costs, _ in measured]), "; ".join(source for _, source in measured)


def require_same(costs: Costs, source: str, shards: ShardFolders) -> None:
    """Ranks that dealt by other costs would compute samples twice, or never, or wait for each other without end.

    Args:
        source: what `measure_samples` says of the costs.
    Raises:
        DataError: on every rank.
    """
    arrays = shards.digest.encode() + costs.tokens.tobytes() + costs.costs.tobytes()
    found = distributed.gather((source, hashlib.sha256(arrays).hexdigest(), socket.gethostname()))
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
