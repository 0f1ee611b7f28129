"""Every wrong input, given to its command: exit code 2, one message, no traceback, nothing written.

Each case lists the parts that its message must have: what is wrong and where, what is allowed, what to do. The tests
of the single modules have more wrong inputs. Elsewhere: versions (test_versions.py), a full disk (test_full_disk.py).
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import launching
import pytest
from generated_rows import image_bytes, make_row, write_jsonl, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config
from zero3_files import complete_by_hand

import ds_configs
from data_tools import cli
from data_tools.build import build
from mirage_ds.data.plan import ORDER
from mirage_ds.data.shards import load_manifest
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.recipe import load_config

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"


@dataclass(frozen=True)
class Case:
    says: tuple[str, ...]  # regular expressions: what and where, what is allowed, what to do
    overrides: tuple[str, ...] = ()
    prepare: Callable[[Path], None] = lambda folder: None  # gets the working directory of the command


def deepspeed_json(**changes: Any) -> Callable[[Path], None]:
    content = json.loads((Path(ds_configs.__path__[0]) / "zero3.json").read_text())

    def write(folder: Path) -> None:
        (folder / "ds.json").write_text(json.dumps(content | changes))

    return write


NO_INPUT = {"image_input": None, "text_input": "Which way?"}
OWN_JSON = ("distributed.deepspeed_config=./ds.json",)


def shards_spoiled_by(spoil: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda folder: (spoil(folder / "shards"), None)[1]


def manifest_without_samples(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"num_samples": 0, "shards": []}))


def shards_of(*rows: dict[str, Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        shutil.rmtree(folder / "shards")
        path = write_rows(folder / "rows", len(rows))
        build(write_jsonl(path, list(rows)), folder / "shards", maxcount=4, maxsize=10**9)

    return write


def other_model(folder: Path) -> None:
    Qwen2Config().save_pretrained(folder / "model")


def model_without_latents(folder: Path) -> None:
    """The tokenizer has 3 tokens more than the embeddings, like the latent tokens with a small model from the hub."""
    hf = load_backbone(str(folder / "model"), dtype=None).hf
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    hf.resize_token_embeddings(len(tokenizer) - 3)
    hf.save_pretrained(folder / "model")


def truncate_weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def drop_a_weight(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, {"format": "pt"})


def run_of(**changes: Any) -> Callable[[Path], None]:
    """A run with the parts of a checkpoint that are read: the configuration of these tests with `changes`."""

    def write(folder: Path) -> None:
        overrides = [*OVERRIDES, *changes.pop("overrides", ())]
        facts: dict[str, Any] = {
            "step": 2,
            "position": 4,
            "world_size": 1,
            "global_batch_size": 2,
            "max_steps": 20,
            "manifest_digest": load_manifest(folder / "shards").digest,
            "order": ORDER,
            "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
            "config": load_config(RECIPE, overrides).model_dump(mode="json"),
        }
        checkpoint = folder / "run" / "checkpoints" / "global_step2"
        checkpoint.mkdir(parents=True)
        (checkpoint / "run.json").write_text(json.dumps(facts | changes))
        complete_by_hand(checkpoint)
        (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')

    return write


OVERRIDES = ("run.dir=run", "model.path=model", "data.shards=shards", "data.num_workers=0")

TRAIN = {
    # unknown or misspelt configuration key; wrong type or choice
    "key misspelt": Case(
        (r"recipe.*unknown key train\.warmup_step:", "did you mean 'warmup_steps'", "allowed here", "correct each"),
        ("train.warmup_step=1",),
    ),
    "wrong type": Case((r"train\.lr: .*valid number.*got 'fast'", "correct each"), ("train.lr=fast",)),
    "wrong choice": Case((r"train\.stage: .*'text', 'stage1' or 'stage2'", "correct each"), ("train.stage=stage3",)),
    # batch arithmetic that does not divide
    "batch and micro-batch": Case(
        (r"global_batch_size is 7, not a multiple of the 2 samples", r"set train\.global_batch_size to a multiple"),
        ("train.global_batch_size=7",),
    ),
    "batch and ranks": Case(
        (
            r"train\.global_batch_size=8 does not divide over 1 rank with train\.micro_batch_.*=1 and .*_steps=2;",
            "allowed: multiples of 1 with train.gradient_accumulation_steps unset",
            r"set for example train\.global_batch_size=8 train\.gradient_accumulation_steps=null, or",
        ),
        ("train.global_batch_size=8",),
    ),
    # a DeepSpeed JSON that contradicts the run, has a misspelt key, or an optimizer section
    "deepspeed contradicts": Case(
        (
            r"gradient_clipping is 3 in the file, but 1\.0 in .* \(distributed\.deepspeed_config=\./ds\.json",
            'write "auto"',
        ),
        OWN_JSON,
        deepspeed_json(gradient_clipping=3),
    ),
    "deepspeed misspelt": Case(
        (r"unknown key zero_optimisation \(.*ds\.json\): did you mean 'zero_optimization'", "rename or delete it"),
        OWN_JSON,
        deepspeed_json(zero_optimisation={}),
    ),
    "deepspeed misspelt inside": Case(
        (r"unknown key zero_optimization\.overlap_com \(.*ds\.json\): did you mean 'overlap_comm'", "correct it"),
        OWN_JSON,
        deepspeed_json(zero_optimization={"stage": 3, "overlap_com": True}),
    ),
    "deepspeed optimizer": Case(
        (r"optimizer must not be set \(.*ds\.json\)", "configuration owns it", r"delete it there and set train\.lr"),
        OWN_JSON,
        deepspeed_json(optimizer={"type": "AdamW"}),
    ),
    # flash_attention_2 requested but not installed
    "flash attention": Case(
        (r"model\.attention is flash_attention_2, which cannot run", "needs a GPU", "install flash-attn, or set"),
        ("model.attention=flash_attention_2",),
    ),
    # missing or empty shards
    "shards missing": Case(
        (r"no manifest\.json.*\(nowhere/manifest\.json\)", "folder that `mirage-data build` wrote", "or build one"),
        ("data.shards=nowhere",),
    ),
    "validation shards missing": Case(
        (r"no manifest\.json.*\(nowhere/manifest\.json\)",), ("evaluation.shards=nowhere",)
    ),
    "shard missing": Case(
        (r"the shard is missing \(shards/shard-000001\.tar\)", "the manifest says", "copy it again, or build again"),
        prepare=shards_spoiled_by(lambda shards: (shards / "shard-000001.tar").unlink()),
    ),
    "shard empty": Case(
        (
            r"the shard has size 0 \(shards/shard-000001\.tar\)",
            r"the manifest says \d+ bytes",
            "copy it again",
        ),
        prepare=shards_spoiled_by(lambda shards: (shards / "shard-000001.tar").write_bytes(b"")),
    ),
    "no samples": Case(
        (r"num_samples is 0, .*\(shards/manifest\.json\)", "at least 1", "build the shards again"),
        prepare=shards_spoiled_by(manifest_without_samples),
    ),
    # latent_size larger than a helper image's patches
    "latent_size and patches": Case(
        (
            r"9 merged patches for 10 latents \(shard-000000\.tar/000000000\.helper_0\)",
            r"model\.latent_size <= merged patches",
            r"larger image or data\.min_pixels, or set another model\.latent_size",
        ),
        ("model.latent_size=10",),
    ),
    # rows that have no image for the places of an arm's helper images
    "input as helper, without input": Case(
        (
            r"rows with a helper image but no input image: 2 \(shards\): shard-000000\.tar/000000001, .*/000000003; ",
            r"data\.helper=input puts the input image in place .*, so each of these rows needs one",
            r"build the shards without these rows, or use another data\.helper",
        ),
        ("data.helper=input",),
        shards_of(*[make_row(number) | (NO_INPUT if number % 2 else {}) for number in range(4)]),
    ),
    "shuffled, one row": Case(
        (r"rows with helper images: 1 \(shards\)", "needs at least 2", r"use other shards, or another data\.helper"),
        ("data.helper=shuffled", "evaluation.shards=shards"),
        shards_of(make_row(0)),
    ),
    # a model folder that is not Qwen2.5-VL or lacks the latent tokens
    "no model": Case(
        (
            r"the model folder does not exist \(model\.path=nowhere\)",
            "a Hugging Face folder .* a hub id",
            "correct it",
        ),
        ("model.path=nowhere",),
    ),
    "other model": Case(
        (r"the model is a qwen2 \(model\)", "only qwen2_5_vl can be trained", "name a Qwen2.5-VL"), prepare=other_model
    ),
    "model without latents": Case(
        (
            r"the latent token id \d+ has no embedding \(model\)",
            "every id of the tokenizer must be below that",
            "`mirage init --from model --output FOLDER` writes",
        ),
        prepare=model_without_latents,
    ),
    "model without weights": Case(
        (r"the weights cannot be loaded \(model\): ", "a model folder must have the files", "copy the folder again"),
        prepare=lambda folder: (folder / "model" / "model.safetensors").unlink(),
    ),
    "model truncated": Case(
        (r"the weights cannot be loaded \(model\): ", "complete", "copy the folder again"), prepare=truncate_weights
    ),
    "model without one weight": Case(
        (r"missing weights: 1, for example .*norm\.weight \(model\)", "copy the folder again"), prepare=drop_a_weight
    ),
    # a checkpoint of another latent_size or another manifest
    "checkpoint, latent_size": Case(
        (r"started with another configuration \(in run/.*global_step2\)", r"model\.latent_size: 8 -> 4", "undo these"),
        ("run.resume=auto",),
        run_of(overrides=["model.latent_size=8"]),
    ),
    "checkpoint, manifest": Case(
        (r"started with another configuration \(in run/.*global_step2\)", "manifest_digest: 'other' -> ", "undo these"),
        ("run.resume=auto",),
        run_of(manifest_digest="other"),
    ),
    "start from another latent_size": Case(
        (r"trained with latent_size 8, .*\(run\.init_from=run\)", "both must agree", r"set model\.latent_size=8"),
        ("run.init_from=run", "run.dir=next"),
        run_of(overrides=["model.latent_size=8"]),
    ),
    "the only checkpoint, damaged": Case(
        (
            r"WARNING: run/.*global_step2 is damaged and skipped: run\.json has size 1, expected \d+ bytes",
            r"all checkpoints of the run are damaged \(run/checkpoints\): global_step2; .*; copy one there again",
        ),
        ("run.resume=auto",),
        lambda folder: (run_of()(folder), (folder / "run/checkpoints/global_step2/run.json").write_text("{"))[1],
    ),
    "start from a damaged checkpoint": Case(
        (
            r"is damaged \(run/checkpoints/global_step2\): run\.json has size 1, expected \d+ bytes",
            "the files that the run wrote",
            "name another one",
        ),
        ("run.init_from=run", "run.dir=next"),
        lambda folder: (run_of()(folder), (folder / "run/checkpoints/global_step2/run.json").write_text("{"))[1],
    ),
    # a run folder that belongs to another run
    "run folder taken": Case(
        (r"holds another run already \(run\.dir=run\)", "a folder of its own", r"set run\.dir to a new one, or"),
        prepare=run_of(),
    ),
    "run folder that cannot be made": Case(
        (r"cannot be written: .* \(/dev/null/run\)", "a place where you may write", r"set run\.dir to a folder"),
        ("run.dir=/dev/null/run",),
    ),
    "nothing to extend": Case(
        (r"no complete checkpoint \(run/checkpoints\)", "a run that has saved one", "train it first"),
        ("run.resume=extend",),
    ),
    "extend to fewer steps": Case(
        (r"train\.max_steps: 20 -> 10", "max_steps: 20 -> 10", "undo these"),
        ("run.resume=extend", "train.max_steps=10"),
        run_of(),
    ),
    "longer without extend": Case(
        (r"train\.max_steps: 20 -> 30", r"a longer run alone is possible with run\.resume=extend"),
        ("run.resume=auto", "train.max_steps=30"),
        run_of(),
    ),
}


def contents(folder: Path) -> dict[str, str | None]:
    """Every path under a folder, with the sha256 of files."""
    paths = sorted(folder.rglob("*"))
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and shards."""
    folder = tmp_path_factory.mktemp("ground")
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    return folder


@pytest.fixture(scope="module")
def starts(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, bool]]:
    """Exit code and output of each start, and whether its folder is unchanged."""
    folder = tmp_path_factory.mktemp("starts")
    outcomes = {}
    for name, case in TRAIN.items():
        place = folder / name / "cwd"
        for part in ("model", "shards"):
            shutil.copytree(ground / part, place / part)
        case.prepare(place)
        before, log = contents(place), folder / name / "log"
        with launching.start(1, str(RECIPE), *OVERRIDES, *case.overrides, log=log, cwd=place) as trainer:
            code = trainer.wait(timeout_s=300)
        outcomes[name] = (code, log.read_text(), contents(place) == before)
    return outcomes


@pytest.mark.parametrize("name", TRAIN)
def test_the_trainer_refuses(starts: dict[str, tuple[int, str, bool]], name: str) -> None:
    code, output, unchanged = starts[name]
    assert code == 2, output
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output
    for part in TRAIN[name].says:
        assert re.search(part, output, re.DOTALL), (part, output)
    assert unchanged


def row(**changes: Any) -> Callable[[Path], None]:
    """Three rows, the second one with `changes`."""
    return lambda rows: (write_jsonl(rows, [make_row(0), make_row(1) | changes, make_row(2)]), None)[1]


def damaged_image(rows: Path) -> None:
    (rows.parent / "images" / "1_0.png").write_bytes(image_bytes()[:100])


BUILD = {
    # a row with no text, a missing or undecodable image, slots that do not match the images
    "no text": ((r"text_input is ''", "expected a non-empty text", "fill it in"), row(text_input="")),
    "no such image": (
        (r"image_input cannot be read: 'no\.png'", "relative to", "fix the path"),
        row(image_input="no.png"),
    ),
    "damaged image": ((r"cannot be decoded: ", "allowed: PNG", "replace the image"), damaged_image),
    "<image>": (
        ("image slots in text_input: 2, input images: 1", "one <image> per image", "add or remove slots"),
        row(text_input="<image><image> Where?"),
    ),
    "<output_image>": (
        (
            "<output_image> slots in text_output: 0, helper images: 2",
            "one slot per image",
            "add or remove slots or images",
        ),
        row(text_output="A", image_output=["images/1_1.png", "images/2_1.png"]),
    ),
    "no rows": (("no rows", "at least one JSON object", "write some rows"), lambda rows: rows.write_text("")),
}


@pytest.mark.parametrize("name", BUILD)
def test_mirage_data_build_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    parts, spoil = BUILD[name]
    rows = write_rows(tmp_path / "rows", 3)
    spoil(rows)
    before = contents(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mirage-data", "build", "--input", str(rows), "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    message = capsys.readouterr().err
    assert left.value.code == 2
    where = str(rows) if name == "no rows" else f"{rows}:2"
    for part in (re.escape(where), *parts):
        assert re.search(part, message), (part, message)
    assert contents(tmp_path) == before
