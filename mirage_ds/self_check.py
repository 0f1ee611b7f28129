"""Whether the installed packages compute what the method needs, on a tiny model: a loss of stage 2, a decoded state.

A version that nobody tried, or a patched one, may compute something else and raise no error: other positions, another
mask, a cache that is not used. What is computed of two rows, with an image, padding and different numbers of latents,
depends on all of these. The true values were worked out without a cache and without padding
(tests/unit/test_self_check.py does so again), with weights that depend on no random generator.
"""

import math
import traceback
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version

import torch
from transformers import DynamicCache

from mirage_ds.batch import Batch
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.positions import mrope_positions
from mirage_ds.errors import ConfigError
from mirage_ds.model.backbone import Backbone, random_model
from mirage_ds.model.mirage import MirageModel
from mirage_ds.model.targets import build_inputs_embeds
from mirage_ds.model.tower import Tower
from mirage_ds.tokens import IGNORE_INDEX, TokenIds
from mirage_ds.versions import TESTED

LOSS, GRAD_NORM, DECODING_LOSS = 10.960265, 22.346391, 8.673332
TOLERANCE = 1e-4  # relative; float32 deviates by about 1e-6

IDS = TokenIds(
    im_start=1,
    im_end=2,
    end_of_text=3,
    vision_start=4,
    vision_end=5,
    image_pad=6,
    video_pad=7,
    latent_pad=8,
    latent_start=9,
    latent_end=10,
)
VOCAB_SIZE = 64
NUM_FED = 2
MASK32 = 2**32 - 1
PATCH_BYTES = 588
PIXEL_LEVELS = torch.stack([(torch.arange(256) - middle) / 128 for middle in (100.0, 128.0, 150.0)])
GRID = (1, 12, 8)  # 6 x 4 merged patches: more than one window of the tower
IMAGE = [IDS.vision_start, *[IDS.image_pad] * (GRID[1] * GRID[2] // 4), IDS.vision_end]
# Question, first word of the answer, start of the latents: one row with an image, one without.
PROMPTS = ([20, *IMAGE, 21, 22, 40, IDS.latent_start], [23, 24, 41, IDS.latent_start])
# The rest of each row: its latents, and what follows them.
ANSWERS = (
    [*[IDS.latent_pad] * 2, IDS.latent_end, 30, 31, IDS.im_end],
    [*[IDS.latent_pad] * 3, IDS.latent_end, 32, 33, 34, 35, IDS.im_end],
)


def check_training() -> None:
    """Computes a loss of stage 2 and its gradient on the CPU, in a fraction of a second; needs no files.

    Raises:
        ConfigError: they are not what they should be, or cannot be computed.
    """
    refuse_deviations("training", stage2_loss, {"loss": LOSS, "gradient norm": GRAD_NORM})


def check_decoding() -> None:
    """Decodes two latents on the CPU, in a fraction of a second; needs no files.

    Raises:
        ConfigError: their states are not what they should be, or cannot be computed.
    """
    refuse_deviations("decoding", decoding_loss, {"loss": DECODING_LOSS})


def refuse_deviations(what: str, compute: Callable[[], dict[str, float]], true: dict[str, float]) -> None:
    """Refuses packages with which a tiny model computes other values than the true ones, or none.

    Raises:
        ConfigError: it names the versions.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small, threads that share cores with other ranks take seconds
    try:
        found = compute()
    except Exception as error:  # whatever a changed interface leads to
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise refusal(
            f"cannot do {what}",
            f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno}); expected the interface of the "
            "tested versions",
        ) from error
    finally:
        torch.set_num_threads(threads)
    for name, value in true.items():
        if not math.isclose(found[name], value, rel_tol=TOLERANCE):
            raise refusal(
                f"compute something else in {what}",
                f"the {name} is {found[name]:.6f}; expected {value:.6f}, and a relative deviation of at most "
                f"{TOLERANCE:.0e}",
            )


def refusal(problem: str, found: str) -> ConfigError:
    """The error, with the versions that have this problem."""
    installed = ", ".join(f"{name} {version(name)}" for name in TESTED)
    return ConfigError(
        f"the installed packages {problem} (in the self-check with a tiny model; {installed}): {found}; install "
        "versions that docs/versions.md lists, unmodified: pip install -c constraints.txt -e ."
    )


def stage2_loss() -> dict[str, float]:
    """The loss of the two rows, and the norm of its gradient over all trained parameters."""
    model = MirageModel(tiny_backbone(), stage="stage2", ce_loss_weight=1.0)
    losses = model(tiny_batch())
    losses.loss.backward()
    grads = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return {"loss": losses.loss.item(), "gradient norm": torch.stack(grads).norm().item()}


@torch.inference_mode()
def decoding_loss() -> dict[str, float]:
    """The losses of <|latent_end|> after each row's state was fed back twice, summed."""
    backbone, batch, cache = tiny_backbone(), tiny_batch(answers=([], [])), DynamicCache()
    image_embeds, nothing = Tower(backbone.visual, trained=False, attention=backbone.attention).encode(batch)
    embeds = build_inputs_embeds(backbone.embed_tokens(batch.input_ids), image_embeds, nothing, batch)
    mask, positions = batch.attention_mask, batch.position_ids
    for _ in range(1 + NUM_FED):
        hidden = backbone.step(embeds, positions, mask, cache)
        embeds, positions = hidden[:, None], positions.amax(dim=(0, 2)).expand(3, -1)[..., None] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    ends = torch.full((len(hidden),), IDS.latent_end)
    return {"loss": torch.nn.functional.cross_entropy(backbone.hf.lm_head(hidden), ends, reduction="sum").item()}


def tiny_backbone() -> Backbone:
    """A small Qwen2.5-VL in float32 on the CPU; each weight is a function of its name and place alone."""
    hf = random_model(VOCAB_SIZE, IDS, seed=0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            values = noise(parameter.numel(), zlib.crc32(name.encode())).view_as(parameter)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.2 * values if is_norm else 2.5 * values / parameter[0].numel() ** 0.5)
    hf.model.visual.requires_grad_(False)
    return Backbone(hf, "sdpa")


def noise(count: int, seed: int) -> torch.Tensor:
    """[count] float64 between -1 and 1, from integer arithmetic alone: the same on every machine and version."""
    mixed = (torch.arange(count) * 2654435761 + seed) & MASK32
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & MASK32
    return (mixed ^ (mixed >> 16)).double() / 2**31 - 1


def tiny_batch(answers: Sequence[list[int]] = ANSWERS) -> Batch:
    """The two rows, aligned at their latents."""
    rows = [tiny_sample(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return collate(rows, align_latents=True)


def tiny_sample(prompt: list[int], answer: list[int]) -> EncodedSample:
    """A row, supervised from the last two tokens of its prompt on."""
    input_ids = torch.tensor([*prompt, *answer])
    image_mask, latent_mask = input_ids == IDS.image_pad, input_ids == IDS.latent_pad
    supervised = (torch.arange(len(input_ids)) >= len(prompt) - 2) & ~latent_mask
    grids = torch.tensor([GRID] if image_mask.any() else [], dtype=torch.int64).reshape(-1, 3)
    num_patches = int(grids.prod(dim=1).sum())
    return EncodedSample(
        key="self-check",
        input_ids=input_ids,
        labels=torch.where(supervised, input_ids, IGNORE_INDEX),
        position_ids=mrope_positions(image_mask, grids, merge_size=2),
        image_mask=image_mask,
        latent_mask=latent_mask,
        prompt_length=len(prompt),
        pixel_values=((noise(num_patches * PATCH_BYTES, 0) + 1) * 128).byte().reshape(num_patches, PATCH_BYTES),
        image_grid_thw=grids,
        pixel_values_latent=torch.zeros(0, PATCH_BYTES, dtype=torch.uint8),
        image_grid_thw_latent=torch.zeros(0, 3, dtype=torch.int64),
        pixel_levels=PIXEL_LEVELS,
        latent_sizes=[latents] if (latents := answer.count(IDS.latent_pad)) else [],
    )
