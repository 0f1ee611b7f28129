"""What a run computes, in two lines for the start of its log."""

from mirage_ds.config import Config
from mirage_ds.data.mixture import order_of
from mirage_ds.model.backbone import Backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.training.start import Start
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import whole_numel


def describe(config: Config, start: Start, model: MirageModel, backbone: Backbone) -> str:
    """What will be computed, for the start of the log."""
    train, ranks = config.train, distributed.world_size()
    size = train.samples_per_step(ranks)
    cut = f"{ranks} ranks x {train.micro_batch_size} x {train.accumulation_steps(ranks)} accumulated"
    if config.data.packing:
        cut = f"rows of at most {config.data.token_budget} tokens on {ranks} ranks"
    controls = "".join(f", {key}={value}" for key, value in config.controls.items())
    shards, num_positions = start.shards, order_of(config, start.shards).num_positions
    samples = f"{shards.num_samples} samples"
    if len(shards.folders) > 1:
        parts = zip(shards.names, shards.folders, shards.weights, strict=True)
        sets = ", ".join(f"{name} {folder.num_samples} x {weight:g}" for name, folder, weight in parts)
        samples += f" in {len(shards.folders)} sets ({sets}), {num_positions} in an epoch"
    if config.data.shuffle == "window":
        samples += f", shuffled in windows of {config.data.shuffle_window} shards"
    numel = {True: 0, False: 0}
    for parameter in model.parameters():
        numel[parameter.requires_grad] += whole_numel(parameter)
    adapter = ""
    if (lora := config.model.lora) is not None:
        adapter = f" as LoRA (rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.modules)}; embeddings: "
        adapter += f"{lora.train_embeddings})"
    return (
        f"{train.stage}: {numel[True] / 1e6:.1f} M parameters trained{adapter}, {numel[False] / 1e6:.1f} M frozen, "
        f"{train.dtype} on {start.device.type}, attention {backbone.describe_attention()}, "
        f"latent_size {config.model.latent_size}{controls}\n"
        f"{samples}; global batch {size} = {cut}; {start.max_steps} steps = "
        f"{start.max_steps * size / num_positions:.1f} epochs; {start.costs_source}"
    )
