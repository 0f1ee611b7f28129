"""Greedy decoding with the reference's rule (the model emits the end token, limit 8): the same ids and latents.

One row at a time, as the reference decodes, and all rows of the set in one batch, which it does not support: each row
enters and leaves latent mode by itself.
"""

from dataclasses import replace

import golden_set
import pytest
import torch
from deviations import check, check_equal

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.inference.feed import zeroed
from mirage_ds.inference.generate import Decoder, Generation
from mirage_ds.model.backbone import load_backbone
from mirage_ds.tokens import TokenIds

LIMIT = 8


def token_ids() -> TokenIds:
    ids = golden_set.numbers("golden")["ids"]
    return TokenIds(
        im_start=ids["im_start"],
        im_end=ids["im_end"],
        end_of_text=ids["pad"],
        vision_start=ids["vision_start"],
        vision_end=ids["vision_end"],
        image_pad=ids["image_pad"],
        video_pad=ids["video_pad"],
        latent_pad=ids["latent_pad"],
        latent_start=ids["latent_start"],
        latent_end=ids["latent_end"],
    )


def prompt(index: int) -> EncodedSample:
    """The set's prompt of sample `index`, with its user images."""
    input_ids = golden_set.tensors("golden")[f"gen{index}.prompt_ids"][0].long()
    row = golden_set.encoded(index, "stage2")
    length = len(input_ids)
    return replace(
        row,
        input_ids=input_ids,
        labels=torch.full((length,), -100),
        position_ids=row.position_ids[:, :length],
        image_mask=input_ids == token_ids().image_pad,
        latent_mask=torch.zeros(length).bool(),
        latent_sizes=[],
        prompt_length=length,
    )


def expectations() -> list[dict]:
    return golden_set.numbers("golden")["generation"]


def decode(indices: list[int], max_new_tokens: int, **settings: object) -> list[Generation]:
    backbone = load_backbone(golden_set.MODEL, dtype=torch.float32)
    settings = {"latent_size": LIMIT, "latent_end": "model"} | settings
    decoder = Decoder(backbone, token_ids(), max_new_tokens=max_new_tokens, **settings)
    return decoder.generate(collate([prompt(index) for index in indices], align_latents=True))


def check_row(row: Generation, expected: dict) -> None:
    check_equal("decoding: ids", row.ids, expected["new_ids"])
    latents = golden_set.tensors("golden")[f"gen{expected['sample']}.latents_fed"]
    assert len(row.latents) == expected["n_latent_pads"]
    check("decoding: latents fed back", torch.stack(row.latents), latents, 1e-4, "relative to the largest")


@pytest.mark.parametrize("expected", expectations(), ids=lambda expected: str(expected["sample"]))
def test_one_by_one(expected: dict) -> None:
    (row,) = decode([expected["sample"]], expected["max_new_tokens"])
    check_row(row, expected)


def test_in_one_batch() -> None:
    rows = decode([expected["sample"] for expected in expectations()], expectations()[0]["max_new_tokens"])
    for row, expected in zip(rows, expectations(), strict=True):
        check_row(row, expected)


@pytest.mark.parametrize("size", [1, 5])
def test_a_block_of_fixed_length(size: int) -> None:
    """Exactly K states, whatever the model would emit; then <|latent_end|> and text again."""
    ids = token_ids()
    for row in decode([expected["sample"] for expected in expectations()], 24, latent_end="fixed", latent_size=size):
        start = row.ids.index(ids.latent_start)
        assert row.ids[start + 1 : start + 2 + size] == [ids.latent_pad] * size + [ids.latent_end]
        assert len(row.latents) == row.ids.count(ids.latent_pad)


def test_what_is_fed_matters() -> None:
    """With the states replaced by zeros the answers change."""
    changed = decode([expected["sample"] for expected in expectations()], 24, feed=zeroed)
    assert [row.ids for row in changed] != [expected["new_ids"] for expected in expectations()]
    assert not any(latent.any() for row in changed for latent in row.latents)
