"""The target cache of a run: which file is its own, and how targets get from the device into it."""

from collections import deque
from collections.abc import Sequence

import PIL
import torch
from deepspeed import DeepSpeedEngine

from mirage_ds.config import Config
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.target_cache import TargetCache, TargetCaches
from mirage_ds.model.targets import LatentTargets
from mirage_ds.training.start import Start
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import GIB, weights_digest


def open_target_cache(engine: DeepSpeedEngine, config: Config, start: Start) -> TargetCaches | None:
    """The caches in `model.cache_targets`, one for each folder of shards; None if there are to be none.

    The model fills them from now on.

    Every rank calls it, after the weights are loaded: the digest of the tower's weights is in the file's name.

    Raises:
        DataError: the folder cannot be written.
    """
    if config.model.cache_targets is None:
        return None
    tower = engine.module.tower
    facts = (
        start.encoder.helper_facts()
        | Helpers.of(config).facts()
        | {
            "tower": weights_digest(tower),
            "vision_config": tower.visual.config.to_dict(),  # with the version of transformers, whose blocks compute
            # What computes decides the last bits.
            "dtype": config.train.dtype,
            "attention": tower.attention,
            "device": start.device.type,
            "torch": torch.__version__,
            "pillow": PIL.__version__,  # decodes and scales
        }
    )
    caches: list[TargetCache] = []
    limit_bytes = int(config.model.cache_targets_gib * GIB)
    for folder in start.shards.folders:
        cache = TargetCache.open(
            config.model.cache_targets,
            folder,
            facts,
            latent_size=config.model.latent_size,
            values=tower.visual.config.out_hidden_size + 1,
            limit_bytes=limit_bytes,
        )
        caches.append(cache)
        size_bytes = int(cache.offsets[cache.num_slots])
        limit_bytes -= size_bytes  # what the folders before leave
        if distributed.is_main():
            print(
                f"Keeps the latent targets of {cache.num_slots} of {cache.first_slots[-1]} helper images: {cache.path},"
                f" at most {size_bytes / GIB:.2f} GiB",
                flush=True,
            )
    targets = TargetCaches(tuple(caches))
    engine.module.keep_targets = TargetWriter(targets)
    return targets


class TargetWriter:
    """Writes targets into a cache, without waiting for the device: as soon as they have been copied to the host.

    The last ones of a run may never be written. Then another run computes them.
    """

    def __init__(self, cache: TargetCache | TargetCaches) -> None:
        self.cache = cache
        self.copies: deque[tuple[Sequence[int], Sequence[int], torch.Tensor, torch.cuda.Event | None]] = deque()

    def __call__(self, slots: Sequence[int], latent_sizes: Sequence[int], pooled: LatentTargets) -> None:
        """
        Args:
            slots, latent_sizes: of helper images.
            pooled: their latents.
        """
        values = torch.cat([pooled.targets, pooled.inverse_norms[:, None]], dim=1)
        on_host = values.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        copied = torch.cuda.Event() if values.is_cuda else None
        if copied is not None:
            copied.record()
        self.copies.append((slots, latent_sizes, on_host, copied))
        while self.copies and is_over(self.copies[0][-1]):
            slots, latent_sizes, on_host, _ = self.copies.popleft()
            self.cache.write(slots, [image.numpy().tobytes() for image in on_host.split(list(latent_sizes))])


def is_over(copied: torch.cuda.Event | None) -> bool:
    return copied is None or copied.query()
