"""Pixels against Pillow and numpy alone: the tower's input depends only on the image bytes, not on other packages."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from generated_rows import image_bytes
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.images import decode, open_image
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.errors import ConfigError

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    image = decode(image_bytes((56, 28), image_format=image_format, mode=mode), "here")
    assert (image.mode, image.size) == ("RGB", (56, 28))


def test_transparent_pixels_become_white() -> None:
    import io

    buffer = io.BytesIO()
    Image.new("RGBA", (28, 28), (255, 0, 0, 0)).save(buffer, format="PNG")
    assert decode(buffer.getvalue(), "here").getcolors() == [(28 * 28, (255, 255, 255))]


@pytest.mark.parametrize(("size", "resized"), [((84, 56), (84, 56)), ((192, 192), (196, 196)), ((20, 300), (28, 308))])
def test_patches_are_the_resized_pixels(
    image_processor: ImageProcessor, size: tuple[int, int], resized: tuple[int, int]
) -> None:
    image = decode(image_bytes(size, seed=3), "here")
    patches, grid_thw = image_processor([image])
    width, height = resized[0] // 14, resized[1] // 14
    assert grid_thw.tolist() == [[1, height, width]]

    pixels = np.asarray(image.resize(resized, Image.Resampling.BICUBIC))
    # Rows of patches in the order of the merged tokens: 2 x 2 patches are adjacent.
    expected = [
        pixels[y * 14 : y * 14 + 14, x * 14 : x * 14 + 14].ravel()
        for block_y in range(0, height, 2)
        for block_x in range(0, width, 2)
        for y in (block_y, block_y + 1)
        for x in (block_x, block_x + 1)
    ]
    assert torch.equal(patches, torch.from_numpy(np.stack(expected)))
    levels = (np.arange(256, dtype=np.float32) / 255 - MEAN[:, None]) / STD[:, None]
    torch.testing.assert_close(image_processor.pixel_levels, torch.from_numpy(levels), rtol=0, atol=1e-5)


def test_images_follow_each_other(image_processor: ImageProcessor) -> None:
    images = [decode(image_bytes(size), "here") for size in ((56, 56), (84, 112))]
    patches, grid_thw = image_processor(images)
    assert grid_thw.tolist() == [[1, 4, 4], [1, 8, 6]]
    assert torch.equal(patches, torch.cat([image_processor([image])[0] for image in images]))
    assert image_processor.num_merged(grid_thw) == [4, 12]


@pytest.mark.parametrize("size", [(56, 28), (84, 56), (192, 193), (20, 300), (8, 8), (1000, 601)])
@pytest.mark.parametrize(("smallest", "largest"), [(3136, 12845056), (50176, 100352)])
def test_the_size_alone_gives_the_merged_tokens(size: tuple[int, int], smallest: int, largest: int) -> None:
    processor = ImageProcessor(Qwen2VLImageProcessorPil(min_pixels=smallest, max_pixels=largest))
    _, grid_thw = processor([decode(image_bytes(size), "here")])
    assert [processor.merged_grid_of(*size)] == processor.merged_grids(grid_thw)


def test_no_images(image_processor: ImageProcessor) -> None:
    patches, grid_thw = image_processor([])
    assert (patches.shape, patches.dtype) == ((0, 588), torch.uint8)
    assert (grid_thw.shape, grid_thw.dtype) == ((0, 3), torch.int64)
    assert image_processor.num_merged(grid_thw) == []


def test_a_folder_without_processor_is_named(tmp_path: object) -> None:
    with pytest.raises(ConfigError, match=f"no image processor .{tmp_path}"):
        ImageProcessor.load(str(tmp_path))


@pytest.mark.parametrize("step", ["do_resize", "do_rescale", "do_normalize"])
def test_a_processor_that_leaves_out_a_step_is_refused(tmp_path: Path, step: str) -> None:
    Qwen2VLImageProcessorPil(**{step: False}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{step} is false .*preprocessor_config.json"):
        ImageProcessor.load(str(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """An image processor with the limits of Qwen2.5-VL's own folder."""
    Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("limits", "small", "large"),
    [
        ({}, (56, 56), (280, 280)),
        ({"min_pixels": 112 * 112}, (112, 112), (280, 280)),
        ({"max_pixels": 140 * 140}, (56, 56), (140, 140)),
        ({"min_pixels": 84 * 84, "max_pixels": 84 * 84}, (84, 84), (84, 84)),
    ],
)
def test_limits_replace_those_of_the_folder(
    folder: str, limits: dict[str, int], small: tuple[int, int], large: tuple[int, int]
) -> None:
    """Square images whose sides are multiples of 28 are resized to exactly the limit that they exceed."""
    processor = ImageProcessor.load(folder, **limits)
    for side, (width, height) in ((28, small), (280, large)):
        image = decode(image_bytes((side, side), seed=3), "here")
        patches, grid_thw = processor([image])
        assert grid_thw.tolist() == [[1, height // 14, width // 14]]
        resized = ImageProcessor.load(folder)([image.resize((width, height), Image.Resampling.BICUBIC)])[0]
        assert torch.equal(patches, resized)


def test_limits_that_contradict_each_other(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"at least 785 and at most 784 pixels .data\.min_pixels, data\.max_pixels"):
        ImageProcessor.load(folder, min_pixels=785, max_pixels=784)
    with pytest.raises(ConfigError, match="at least 3136 and at most 784 pixels"):
        ImageProcessor.load(folder, max_pixels=784)


def photo(orientation: int, image_format: str) -> bytes:
    """56 x 28 pixels, left half blue, right half red, with an EXIF orientation."""
    image = Image.new("RGB", (56, 28), "red")
    image.paste("blue", (0, 0, 28, 28))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, image_format, exif=exif, **({"lossless": True} if image_format == "WEBP" else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("orientation", "blue_at"), [(6, (14, 7)), (8, (14, 49)), (3, (49, 14)), (1, (7, 14))])
def test_photos_are_upright(image_format: str, orientation: int, blue_at: tuple[int, int]) -> None:
    """6: the camera was turned by 90 degrees, so the left half belongs on top."""
    image = decode(photo(orientation, image_format), "here")
    assert image.size == ((28, 56) if orientation in (6, 8) else (56, 28))
    assert image.size == open_image(photo(orientation, image_format), "here").size, "what the index says"
    red, _, blue = image.getpixel(blue_at)
    assert blue > 200 > 50 > red
    stored = decode(photo(orientation, image_format), "here", exif_orientation=False)
    assert stored.size == (56, 28)


def test_photos_with_other_damaged_exif_tags_are_decoded() -> None:
    """Against the size of the upright photo; EXIF that cannot be read at all turns nothing."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x1a\0\x05\0\0\0\x01\xff\xff\xff\xff"
    for tags, size in ((exif, (28, 56)), (exif[:16], (56, 28)), (b"Exif\0\0II", (56, 28))):
        buffer = io.BytesIO()
        Image.new("RGB", (56, 28), "red").save(buffer, "JPEG", exif=tags)
        assert decode(buffer.getvalue(), "here").size == size


def test_sixteen_bits_become_eight() -> None:
    values = np.linspace(0, 65535, 112 * 56).astype(np.uint16).reshape(56, 112)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    decoded = np.asarray(decode(buffer.getvalue(), "here"))
    assert np.array_equal(decoded, np.repeat((values // 256)[..., None], 3, axis=2))


def test_sixteen_bits_with_a_transparent_value() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 51200]], dtype=np.uint16)).save(buffer, "PNG", transparency=256)
    assert np.asarray(decode(buffer.getvalue(), "here"))[0, :, 0].tolist() == [0, 255, 200]


def test_an_animated_file_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (28, 28), color) for color in ("red", "blue")]
    for image_format in ("GIF", "PNG", "WEBP"):
        buffer = io.BytesIO()
        frames[0].save(buffer, image_format, save_all=True, append_images=frames[1:])
        red, _, blue = decode(buffer.getvalue(), "here").getpixel((0, 0))
        assert red > 200 > 50 > blue, image_format
