"""Heat maps: their cosines against transformers' own tower, and the picture that shows them."""

import numpy as np
import plain_loop
import pytest
import torch
from generated_rows import image_bytes, write_rows
from PIL import Image

from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import Sample
from mirage_ds.evaluation.latents.heat import heat_maps, overlay
from mirage_ds.hf.preset import write_tiny
from mirage_ds.inference.generate import Decoder, load_decoder

SAMPLE = Sample("row", "where?", "", (image_bytes((140, 84), seed=1), image_bytes((84, 112), seed=2)))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Encoder]:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(write_rows(folder / "rows"), folder / "model", seed=0)
    return load_decoder(str(folder / "model"), latent_size=4, dtype=torch.float32)


def patches(decoder: Decoder, encoder: Encoder) -> list[torch.Tensor]:
    """The patch embeddings of each image, by transformers' own tower."""
    prompt = encoder.prompt(SAMPLE)
    values = plain_loop.normalized(vars(prompt))
    with torch.no_grad():
        return decoder.backbone.hf.model.get_image_features(values, prompt.image_grid_thw).pooler_output


def test_a_state_is_hottest_where_its_patch_is(loaded: tuple[Decoder, Encoder]) -> None:
    """States: the patch in row 1, column 3 of the first image, times 5; minus the last one of the second image."""
    first, second = patches(*loaded)
    maps = heat_maps(*loaded, SAMPLE, [5 * first[1 * 5 + 3], -second[-1]])
    assert [each.shape for each in maps] == [(2, 3, 5), (2, 4, 3)]
    assert np.unravel_index(maps[0][0].argmax(), (3, 5)) == (1, 3)
    assert maps[0][0].max() == pytest.approx(1, abs=1e-5)
    assert maps[1][1, 3, 2] == pytest.approx(-1, abs=1e-5)
    assert all(np.abs(each).max() <= 1 + 1e-5 for each in maps)


def test_cosines_with_every_patch(loaded: tuple[Decoder, Encoder]) -> None:
    states = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    maps = heat_maps(*loaded, SAMPLE, list(states))
    for image, found in zip(patches(*loaded), maps, strict=True):
        expected = [[torch.cosine_similarity(state, patch, dim=0).item() for patch in image] for state in states]
        assert found.reshape(3, -1).tolist() == [pytest.approx(row, abs=1e-5) for row in expected]


def test_nothing_to_draw(loaded: tuple[Decoder, Encoder]) -> None:
    assert heat_maps(*loaded, Sample("row", "where?", ""), [torch.ones(128)]) == []
    assert [each.shape[0] for each in heat_maps(*loaded, SAMPLE, [])] == [0, 0]


def test_the_picture() -> None:
    """Each patch has its part of the image, which shows through; the larger the cosine, the lighter the colour."""
    image = Image.new("RGB", (60, 40), "gray")
    image.paste("white", (40, 0, 60, 40))
    pixels = np.asarray(overlay(image, np.array([[0.5, 0.25, -0.5], [2.0, 0.0, 0.5]], np.float32), 0.0, 0.5)).astype(
        int
    )
    assert pixels.shape == (40, 60, 3)
    cells = pixels.reshape(2, 20, 3, 20, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    (high, middle, below_on_white), (above, low, high_on_white) = cells[:, 0, :, 0]
    assert (above == high).all()  # beyond the range is its end
    assert high.sum() > middle.sum() > low.sum()
    assert (high_on_white > high).all()
    assert np.ptp(high_on_white - high) <= 1
    assert (below_on_white - low == high_on_white - high).all()


@pytest.mark.parametrize("value", [0.3, -1.0])
def test_patches_that_are_all_alike(value: float) -> None:
    """One colour, whatever the range."""
    heat = np.full((2, 3), value, np.float32)
    assert (
        len(np.unique(np.asarray(overlay(Image.new("RGB", (60, 40)), heat, value, value)).reshape(-1, 3), axis=0)) == 1
    )
