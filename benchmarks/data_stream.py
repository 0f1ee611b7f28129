"""What an image costs a data worker: our path and transformers' image processor, each from the bytes of its file.

    python benchmarks/data_stream.py

    decode       Pillow alone: bytes to pixels, and nothing else
    worker       ours: bytes to patches, as `data/stream.py` calls it: `images.decode`, then `patches.ImageProcessor`
    processor    transformers' Qwen2VLImageProcessorPil: bytes to its float32 patches, decoded by Pillow
    patches      ours without decoding: resize, and patches
    theirs       transformers' image processor without decoding
    sample       a complete row of stage 2 with this image, to a micro-batch of one row: image, text of its own,
                 positions, collating

Before they are timed, the patches of both are compared: values of ours are looked up as the tower does, and must be
theirs in every bit. Times are processor time of one thread (other programs that share the cores count little), medians
of rounds in which all ways follow each other. A photo is smooth noise with a little grain; a drawing has lines and
filled shapes, as puzzles and charts do. Sides that are multiples of 28 are not resized; the others are, to the nearest.

Bars: cost: `worker` takes at most 3 times as long as `decode`; rate: at least 3 times that of `processor`, both from
the bytes of a file; bytes: an eighth of them to the device. The last column names those that are not met. Where
decoding takes most of the time of both, no path can have 3 times the rate; `theirs / patches` leaves decoding out.

`--small` only tests the script; its times mean nothing.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measuring import environment
from PIL import Image, ImageDraw, features
from PIL import __version__ as pillow_version
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.images import decode
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.rows import Sample
from mirage_ds.hf.preset import write_tiny

SIDES = (84, 504, 512, 1008, 1024)
KINDS = ("photo JPEG", "photo PNG", "drawing PNG")
WAYS = ("decode", "worker", "processor", "patches", "theirs", "sample")
FASTER, COST, SMALLER = 3, 3, 8  # the bars
RATIOS = {
    "worker / decode": ("worker", "decode"),
    "processor / worker": ("processor", "worker"),
    "theirs / patches": ("theirs", "patches"),
}
HEAD = (
    *("image", "side"),
    *(f"{name} ms" for name in WAYS),
    *("images/s", "samples/s", *RATIOS, "bytes", "not met"),
)


def draw_image(kind: str, side: int) -> Image.Image:
    """The same in every run."""
    draw = np.random.default_rng(side)
    coarse = draw.integers(0, 256, (side // 16 + 1, side // 16 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    if kind.startswith("photo"):
        grain = draw.integers(-3, 4, (side, side, 3))
        return Image.fromarray((np.asarray(image).astype(int) + grain).clip(0, 255).astype(np.uint8))
    drawing = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(drawing)
    cell = side // 6
    for x in range(0, side, cell):
        pen.line([(x, 0), (x, side)], "gray")
        pen.line([(0, x), (side, x)], "gray")
        for y in range(0, side, cell):
            color = tuple(draw.integers(0, 256, 3).tolist())
            pen.ellipse([(x + 3, y + 3), (x + cell - 3, y + cell - 3)], color, outline="black")
    return drawing


def encode_file(kind: str, side: int) -> bytes:
    file = io.BytesIO()
    settings = {"quality": 90} if kind.endswith("JPEG") else {}
    draw_image(kind, side).save(file, kind.split()[-1], **settings)
    return file.getvalue()


def load(data: bytes) -> Image.Image:
    """Pillow alone."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def tiny_encoder(folder: Path) -> Encoder:
    row = {"text_input": "<image>Which way is it to the goal?", "text_output": "Up, <output_image>then right."}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    write_tiny(folder / "rows.jsonl", folder / "model", seed=0)
    return load_encoder(str(folder / "model"), stage="stage2", latent_size=4)


def ways_of(data: bytes, plain: Qwen2VLImageProcessorPil, encoder: Encoder) -> dict[str, Callable[[], Any]]:
    """All that are timed, by name; each row of `sample` has a question of its own, so that no text comes again."""
    ours, image = ImageProcessor(plain), decode(data, "image")
    number = iter(range(10**9))

    def sample() -> Any:
        question = f"<image>Which way is it to goal {next(number)}?"
        return collate([encoder(Sample("0", question, "Up, <output_image>", (data,), (data,)))], align_latents=True)

    return {
        "decode": lambda: load(data),
        "worker": lambda: ours([decode(data, "image")]),
        "processor": lambda: plain([load(data)], return_tensors="pt"),
        "patches": lambda: ours([image]),
        "theirs": lambda: plain([image], return_tensors="pt"),
        "sample": sample,
    }


def compare(ways: dict[str, Callable[[], Any]], levels: torch.Tensor) -> float:
    """Of the bytes of both results, theirs over ours.

    Raises:
        AssertionError: a value differs.
    """
    patches, _ = ways["worker"]()
    theirs = ways["processor"]()["pixel_values"]
    colors = patches.view(len(patches), -1, 3).transpose(1, 2).long()
    values = levels.expand(len(patches), -1, -1).gather(2, colors)
    assert torch.equal(torch.stack([values, values], dim=2).flatten(1), theirs), "other values than transformers'"
    return theirs.nbytes / patches.nbytes


def measure(ways: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Milliseconds of each way: medians of rounds of all of them, after one that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs + 1):
        for name, way in ways.items():
            started = time.process_time()
            way()
            spent[name].append(1e3 * (time.process_time() - started))
    return {name: median(each[1:]) for name, each in spent.items()}


def run(kind: str, side: int, encoder: Encoder, runs: int) -> dict[str, Any]:
    data, plain = encode_file(kind, side), Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12_845_056)
    ways = ways_of(data, plain, encoder)
    smaller = compare(ways, ImageProcessor(plain).pixel_levels)
    ms = measure(ways, runs)
    ratios = {name: ms[over] / ms[under] for name, (over, under) in RATIOS.items()}
    missed = {
        "cost": ratios["worker / decode"] > COST,
        "rate": ratios["processor / worker"] < FASTER,
        "bytes": smaller < SMALLER,
    }
    return {
        "kind": kind,
        "side": side,
        "file_bytes": len(data),
        "ms": ms,
        "ratios": ratios,
        "smaller": smaller,
        "missed": [name for name, is_missed in missed.items() if is_missed],
    }


def line(found: dict[str, Any]) -> str:
    ms = found["ms"]
    cells = [
        found["kind"],
        str(found["side"]),
        *(f"{ms[name]:.2f}" for name in WAYS),
        *(f"{1e3 / ms[name]:.0f}" for name in ("worker", "sample")),
        *(f"{ratio:.1f}" for ratio in found["ratios"].values()),
        f"1/{found['smaller']:.0f}",
        ", ".join(found["missed"]) or "-",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="measured rounds; default: 25")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--small", action="store_true", help="one side, to test the script")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    facts["versions"] |= {"pillow": pillow_version, "numpy": np.__version__}
    facts["versions"]["libjpeg-turbo"] = features.version_feature("libjpeg_turbo")
    facts["versions"]["zlib"] = features.version_codec("zlib")
    print(json.dumps(facts))
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" + " ---: |" * (len(HEAD) - 2) + " --- |")
    results = []
    with TemporaryDirectory() as folder:
        encoder = tiny_encoder(Path(folder))
        for kind in KINDS:
            for side in SIDES[:1] if arguments.small else SIDES:
                results.append(run(kind, side, encoder, arguments.runs))
                print(line(results[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
