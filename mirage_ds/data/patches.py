"""RGB images -> patches, always by Pillow and numpy, so that pixels do not depend on installed packages.

Patches are bytes, an eighth of the float32 values of transformers' image processor, which has each of them twice: an
image is a video of two equal frames. `model/tower.py` makes these values of them on the device, bit for bit.

Shape legend: P patches, N images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from mirage_ds.errors import MALFORMED, ConfigError

# Names in preprocessor_config.json -> in config.json's vision_config, and what Qwen2.5-VL has where it is left out.
TOWER_ENTRIES = {
    "patch_size": ("patch_size", 14),
    "merge_size": ("spatial_merge_size", 2),
    "temporal_patch_size": ("temporal_patch_size", 2),
}


class ImageProcessor:
    """Resizes images to the patch grid and splits them into patches, in the order of the merged tokens.

    A patch has 588 bytes: 14 rows of 14 pixels, each red, green and blue, as in an image. So a row of a patch is copied
    in one piece. The tower puts the colors apart.
    """

    def __init__(self, processor: Qwen2VLImageProcessorPil) -> None:
        self._processor = processor
        self.merge_size: int = processor.merge_size
        self.patch_bytes: int = 3 * processor.patch_size**2
        mean, std = (np.array(each, dtype=np.float32) for each in (processor.image_mean, processor.image_std))
        # In float64 first, as transformers does, so that every bit is the same.
        rescaled = (np.arange(256) * processor.rescale_factor).astype(np.float32)
        self.pixel_levels = torch.from_numpy((rescaled - mean[:, None]) / std[:, None])

    @classmethod
    def load(
        cls,
        model_path: str,
        cache_dir: Path | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> "ImageProcessor":
        """Reads preprocessor_config.json of a model folder or hub id.

        Args:
            min_pixels: smaller images are scaled up to it; None: the folder's limit.
            max_pixels: larger images are scaled down to it; None: the folder's limit.
        Raises:
            ConfigError: there is none, it leaves out a step, or the limits contradict each other.
        """
        try:
            processor = Qwen2VLImageProcessorPil.from_pretrained(model_path, cache_dir=cache_dir)
        except MALFORMED as error:
            raise ConfigError(
                f"no image processor ({model_path}): {error}; a model folder has preprocessor_config.json; name "
                "one that `mirage init` wrote, or add it from another folder with `mirage init "
                f"--from {model_path} --processor-from FOLDER`"
            ) from error
        if left_out := [step for step in ("do_resize", "do_rescale", "do_normalize") if not getattr(processor, step)]:
            raise ConfigError(
                f"{', '.join(left_out)} is false ({model_path}/preprocessor_config.json); images are always resized, "
                "rescaled and normalized, as for Qwen2.5-VL; set it to true there"
            )
        cls._check_numbers(processor, model_path)
        cls._check_tower(processor, model_path, cache_dir)
        smallest = min_pixels or processor.size["shortest_edge"]
        largest = max_pixels or processor.size["longest_edge"]
        if smallest > largest:
            raise ConfigError(
                f"images must have at least {smallest} and at most {largest} pixels (data.min_pixels, data.max_pixels; "
                f"where unset, from {model_path}); the first must not be above the second; set both"
            )
        processor.size = {"shortest_edge": smallest, "longest_edge": largest}
        return cls(processor)

    @staticmethod
    def _check_numbers(processor: Qwen2VLImageProcessorPil, model_path: str) -> None:
        """Refuses a file whose numbers are of another image processor.

        Raises:
            ConfigError: the message names the entry.
        """
        limits = [dict(processor.size).get(edge) for edge in ("shortest_edge", "longest_edge")]
        sizes = {name: getattr(processor, name) for name in ("patch_size", "merge_size", "temporal_patch_size")}
        wrong = {name: value for name, value in sizes.items() if not isinstance(value, int) or value < 1}
        if not all(isinstance(limit, int) and limit > 0 for limit in limits):
            wrong["size"] = dict(processor.size)
        for name in ("image_mean", "image_std"):
            value = getattr(processor, name)
            numbers = list(value) if isinstance(value, (list, tuple)) else []
            if len(numbers) != 3 or not all(type(number) in (int, float) for number in numbers):
                wrong[name] = value
        if wrong:
            name, value = next(iter(wrong.items()))
            raise ConfigError(
                f"{name} is {value!r:.80} ({model_path}/preprocessor_config.json); expected what Qwen2.5-VL has: size "
                "with shortest_edge and longest_edge in pixels, three numbers each for mean and std, whole patches; "
                "correct it"
            )

    @staticmethod
    def _check_tower(processor: Qwen2VLImageProcessorPil, model_path: str, cache_dir: Path | None) -> None:
        """Refuses patches that the model's tower does not take.

        Raises:
            ConfigError: the message has both numbers.
        """
        config = PreTrainedConfig.get_config_dict(model_path, cache_dir=cache_dir)[0]
        for name, (entry, usual) in TOWER_ENTRIES.items():
            found, expected = getattr(processor, name), config.get("vision_config", {}).get(entry, usual)
            if found != expected:
                raise ConfigError(
                    f"{name} is {found} ({model_path}/preprocessor_config.json), but {entry} is {expected} "
                    "(config.json); both must agree; take both files from one model"
                )

    def __call__(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns patches [P, patch_bytes] uint8 of all images and their grids [N, 3] int64 (time, height, width)."""
        merge, side = self.merge_size, self._processor.patch_size
        grids = [self.merged_grid_of(*image.size) for image in images]
        ends = np.cumsum([0, *(rows * columns * merge**2 for rows, columns in grids)])
        patches = np.empty((ends[-1], self.patch_bytes), dtype=np.uint8)
        for image, (rows, columns), start, end in zip(images, grids, ends, ends[1:], strict=False):
            width, height = columns * merge * side, merge * side
            if image.size != (width, rows * height):
                image = image.resize((width, rows * height), self._processor.resample)
            own = patches[start:end].reshape(rows, columns, merge, merge, side, side * 3)
            # A row of merged patches at a time: for the pixels of a complete image the system would have to map memory
            # for every image again, which costs more than copying them (docs/results.md).
            for row in range(rows):
                pixels = np.asarray(image.crop((0, row * height, width, (row + 1) * height)))
                own[row] = pixels.reshape(merge, side, columns, merge, side * 3).transpose(2, 0, 3, 1, 4)
        grid_thw = [(1, rows * merge, columns * merge) for rows, columns in grids]
        return torch.from_numpy(patches), torch.tensor(grid_thw, dtype=torch.int64).reshape(-1, 3)

    def merged_grid_of(self, width: int, height: int) -> tuple[int, int]:
        """What `merged_grids` will return for an image whose file has this size."""
        side = self._processor.patch_size * self.merge_size
        limits = self._processor.size
        rows, columns = smart_resize(height, width, side, limits["shortest_edge"], limits["longest_edge"])
        return rows // side, columns // side

    def merged_grids_of(self, sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[N, 2]: rows and columns, as `merged_grid_of`, of images of these sizes (width, height) [N, 2]."""
        heights_widths = np.asarray(sizes, np.int64).reshape(-1, 2)[:, ::-1]
        side, limits = self._processor.patch_size * self.merge_size, self._processor.size
        return smart_grids(heights_widths, side, limits["shortest_edge"], limits["longest_edge"])

    def image_tokens(self, sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[N]: language-model tokens of images whose files have these sizes (width, height) [N, 2]."""
        return self.merged_grids_of(sizes).prod(axis=1)

    def facts(self) -> dict[str, Any]:
        """What decides the patches of an image."""
        names = ("size", "image_mean", "image_std", "rescale_factor", "resample")
        sizes = ("patch_size", "merge_size", "temporal_patch_size")
        facts = {name: getattr(self._processor, name) for name in (*names, *sizes)}
        return facts | {"size": dict(self._processor.size), "resample": int(self._processor.resample)}

    def save(self, folder: Path) -> None:
        """Writes preprocessor_config.json, with the limits that are used."""
        self._processor.save_pretrained(folder)

    def num_merged(self, grid_thw: torch.Tensor) -> list[int]:
        """Language-model tokens of each image, from grids [N, 3] in patches."""
        merged: list[int] = (grid_thw.prod(dim=1) // self.merge_size**2).tolist()
        return merged

    def merged_grids(self, grid_thw: torch.Tensor) -> list[tuple[int, int]]:
        """Rows and columns of merged patches of each image, from grids [N, 3] in patches."""
        return [(rows, columns) for _, rows, columns in (grid_thw // self.merge_size).tolist()]


def smart_grids(sizes: npt.NDArray[np.int64], side: int, min_pixels: int, max_pixels: int) -> npt.NDArray[np.int64]:
    """[N, 2]: what transformers' `smart_resize` gives for each of [N, 2] sizes, in units of `side`.

    The same operations on float64 in the same order, so that the results are equal. Unlike there, sizes of any aspect
    ratio are accepted: images are checked where they are built into shards.
    """
    pixels = sizes.prod(axis=1, keepdims=True)
    grids = np.round(sizes / side)  # half to even, as Python's
    resized = grids.prod(axis=1, keepdims=True) * side**2
    smaller = np.maximum(1, np.floor(sizes / np.sqrt(pixels / max_pixels) / side))
    larger = np.ceil(sizes * np.sqrt(min_pixels / pixels) / side)
    return np.where(resized > max_pixels, smaller, np.where(resized < min_pixels, larger, grids)).astype(np.int64)
