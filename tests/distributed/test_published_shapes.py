"""Rows of the shape of Monet-SFT-125K and of Zebra-CoT, made by hand: from JSONL through both stages to decoding.

Of the first: an answer with several helper images and text between them; `<observation>` marks what is read from one.
Of the second: several problem images in the question, and a trace under headings `THOUGHT n:` with its own images.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from generated_rows import image_bytes, write_jsonl
from scripted import Watched, cross_entropy
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

import data_tools.cli
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, load_encoder
from mirage_ds.data.rows import Sample, read_rows
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.hf.preset import write_tiny
from mirage_ds.inference.generate import load_decoder
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.tokens import IGNORE_INDEX

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
CONFIGURED, STEPS = 3, 4
# Widths and heights in cells of 28 pixels, each one merged patch: a helper image needs at least K of them.
MONET = [
    {
        "text_input": "<image>\nWhich shop has the lower price for the red cup?",
        "text_output": "I look closer at the left sign. <output_image><observation>It says 12.</observation> "
        "Now the right sign. <output_image><observation>It says 9.</observation> The right shop is cheaper. "
        "\\boxed{right}",
        "image_input": [(5, 3)],
        "image_output": [(2, 2), (3, 2)],
    },
    {
        "text_input": "<image>\nWhat is written on the third flag?",
        "text_output": "First I crop the flags. <output_image> The third is small, so I enlarge it. <output_image> "
        "<observation>Five letters, the first is an A.</observation> I mark the letters one by one. <output_image> "
        "They read ALPHA. \\boxed{ALPHA}",
        "image_input": [(4, 4)],
        "image_output": [(4, 2), (3, 3), (2, 3)],
        "latent_size": [2, 8, 4],
    },
    {
        "text_input": "<image>\nIs the table set for four?",
        "text_output": "I mark the plates. <output_image><observation>Four plates.</observation> Yes. \\boxed{yes}",
        "image_input": [(3, 3)],
        "image_output": [(3, 2)],
    },
]
ZEBRA = [
    {
        "text_input": "Here are two views of one solid. <image> <image> How many cubes has it?",
        "text_output": "THOUGHT 0: I draw the lowest layer. <output_image> THOUGHT 1: Four cubes; the layer above. "
        "<output_image> THOUGHT 2: Two more. <output_image> THOUGHT 3: One cube is on top. <output_image> In all 7.",
        "image_input": [(3, 2), (2, 3)],
        "image_output": [(2, 2), (2, 3), (3, 2), (2, 2)],
    },
    {
        "text_input": "<image> Black moves. Which move wins the rook?",
        "text_output": "THOUGHT 0: The knight can give check. <output_image> THOUGHT 1: Then the rook hangs. "
        "<output_image> Knight to c2.",
        "image_input": [(4, 4)],
        "image_output": [(3, 3), (3, 3)],
        "latent_size": 5,
    },
    {
        "text_input": "A ball leaves the table with 3 m/s and falls 1.25 m. How far does it fly?",
        "text_output": "THOUGHT 0: I sketch the path. <output_image> THOUGHT 1: It falls for 0.5 s, so 1.5 m.",
        "image_input": [],
        "image_output": [(4, 3)],
        "latent_size": [6],
    },
]
SIZES = [[3, 3], [2, 8, 4], [3], [3, 3, 3, 3], [5, 5], [6]]  # K of each block: of the row, or the configured one


@dataclass(frozen=True)
class Trained:
    """The rows, and the export of stage 2 on them."""

    rows: Path
    runs: dict[str, Path]
    export: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("shapes")
    rows = write(folder / "rows")
    write_tiny(rows, folder / "model", seed=0)
    arguments = ["build", "--input", str(rows), "--output", str(folder / "shards")]
    built = CliRunner().invoke(data_tools.cli.app, arguments, catch_exceptions=False)
    assert built.exit_code == 0, built.output
    train(folder, "stage1")
    train(folder, "stage2", f"run.init_from={folder / 'stage1'}")
    export_checkpoint(folder / "stage2", folder / "export")
    return Trained(rows, {stage: folder / stage for stage in ("stage1", "stage2")}, folder / "export")


def write(folder: Path) -> Path:
    """Writes the rows with images of their sizes."""
    (folder / "images").mkdir(parents=True)
    rows, number = [], 0
    for row in (*MONET, *ZEBRA):
        paths: dict[str, list[str]] = {"image_input": [], "image_output": []}
        for name, names in paths.items():
            for width, height in row[name]:
                number += 1
                names.append(f"images/{number}.png")
                (folder / names[-1]).write_bytes(image_bytes((28 * width, 28 * height), seed=number))
        rows.append(row | paths)
    return write_jsonl(folder / "rows.jsonl", rows)


def train(folder: Path, stage: str, *more: str) -> None:
    """One process, micro-batches of 3 rows with different numbers of blocks."""
    arguments = [
        *(str(RECIPES / f"tiny-{stage}.yaml"), f"run.dir={folder / stage}", f"model.path={folder / 'model'}"),
        *(f"model.latent_size={CONFIGURED}", f"data.shards={folder / 'shards'}", f"train.max_steps={STEPS}"),
        *("train.warmup_steps=1", "train.micro_batch_size_per_gpu=3", "data.num_workers=0", *more),
    ]
    with launching.start(1, *arguments, log=folder / f"{stage}.log") as run:
        run.finish(timeout_s=120)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_both_stages_learn_all_blocks(trained: Trained, stage: str) -> None:
    found = records(trained.runs[stage])
    assert len(found) == STEPS
    assert found[-1]["loss"] < found[0]["loss"]
    assert (found[0]["latent_loss"] > 0) == (stage == "stage1")


def test_plain_transformers_loads_the_export(trained: Trained) -> None:
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained.export, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.mirage["latent_size"] == CONFIGURED


def scripted(encoded: EncodedSample, im_end: int) -> EncodedSample:
    """The sample up to the end of its answer."""
    answer = encoded.input_ids[encoded.prompt_length :]
    end = encoded.prompt_length + int((answer == im_end).nonzero()[0]) + 1
    labels = torch.where(torch.arange(len(encoded.labels)) < end, encoded.labels, IGNORE_INDEX)
    return replace(encoded, labels=labels)


def samples(trained: Trained) -> Iterator[tuple[Sample, EncodedSample]]:
    encoder = load_encoder(str(trained.export), stage="stage2", latent_size=CONFIGURED)
    for _, sample in read_rows(trained.rows):
        yield sample, scripted(encoder(sample), encoder.ids.im_end)


def test_the_export_decodes_all_blocks_as_it_was_trained(trained: Trained) -> None:
    """Made to write a row's answer, decoding has its blocks, and its log-probabilities are minus stage 2's losses."""
    decoder, encoder = load_decoder(
        str(trained.export), latent_size=max(map(max, SIZES)), latent_end="model", dtype=torch.float32
    )
    backbone = load_backbone(str(trained.export), dtype=torch.float32)
    model = MirageModel(backbone, stage="stage2", ce_loss_weight=1.0)
    for sizes, (sample, encoded) in zip(SIZES, samples(trained), strict=True):
        labels = encoded.labels[encoded.prompt_length :].tolist()
        answer = encoded.input_ids[encoded.prompt_length :].tolist()
        decoder.sampling = Watched(script=iter(answer))
        (found,) = decoder.generate(collate([encoder.prompt(sample)], align_latents=True))
        assert found.ids == answer[: answer.index(encoder.ids.im_end) + 1]
        assert encoded.latent_sizes == sizes
        assert len(found.latents) == sum(sizes)
        assert found.ids.count(encoder.ids.latent_start) == found.ids.count(encoder.ids.latent_end) == len(sizes)
        assert cross_entropy(model, encoded) == pytest.approx(-decoder.sampling.of(0, labels), rel=1e-5)
