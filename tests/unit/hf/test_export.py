"""Exports, read back by plain transformers, tokenizers and safetensors, of checkpoints written by zero3_files.

Real two-rank checkpoints, and logits against the trainer's: tests/distributed/test_exported_runs.py.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from generated_rows import image_bytes, write_rows
from PIL import Image
from real_vocabulary import real_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
)
from zero3_files import complete_by_hand, write_run

from mirage_ds import cli
from mirage_ds.data.conversation import load_tokenizer
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.images import decode
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.rows import read_rows
from mirage_ds.errors import CheckpointError, ConfigError, DataError, MirageError
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.hf.preset import write_tiny
from mirage_ds.inference.generate import load_decoder
from mirage_ds.model.backbone import empty_model
from mirage_ds.model.latent_settings import read_latent_settings

__all__ = ["real_tokenizer"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders, `untied` and `tied`, and `rows`."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny(write_rows(folder / "rows"), folder / "untied", seed=0)
    shutil.copytree(folder / "untied", folder / "tied")
    change_config(folder / "tied", tie_word_embeddings=True)
    for name in ("untied", "tied"):
        (folder / name / "model.safetensors").unlink()  # an export must not need it
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def random_weights(model: Path) -> dict[str, torch.Tensor]:
    """Random weights of a model by transformers' names, as after training; a tied head once."""
    generator = torch.Generator().manual_seed(7)
    shapes = {name: parameter.shape for name, parameter in empty_model(str(model)).named_parameters()}
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


def load_plain(folder: Path) -> torch.nn.Module:
    model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files_of(folder))}


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("train_tower", [False, True])
def test_plain_transformers_loads_every_weight(
    base: Path, tmp_path: Path, kind: str, ranks: int, train_tower: bool
) -> None:
    weights = random_weights(base / kind)
    settings = {"model": {"train_tower": train_tower}}
    write_run(tmp_path / "run", base / kind, weights, ranks=ranks, sub_group_numel=50_000, settings=settings)
    export_checkpoint(tmp_path / "run", tmp_path / "out", max_shard_size="1MB" if ranks == 3 else "5GB")
    model = load_plain(tmp_path / "out")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == (kind == "tied")


def test_names_are_those_that_transformers_saves(base: Path, tmp_path: Path) -> None:
    """And all files have the same permissions. (A loaded model keeps the names that it found, so this one is new.)"""
    weights = random_weights(base / "untied")
    write_run(tmp_path / "run", base / "untied", weights)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    new = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(base / "untied"))
    new.load_state_dict(weights)
    new.save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "saved"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len({path.stat().st_mode for path in files_of(tmp_path / "out")}) == 1


def test_the_index_has_the_file_of_each_weight(base: Path, tmp_path: Path) -> None:
    weights = random_weights(base / "tied")
    write_run(tmp_path / "run", base / "tied", weights)
    export_checkpoint(tmp_path / "run", tmp_path / "out", max_shard_size="500KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            found |= {name: file.name for name in content.keys()}  # noqa: SIM118
            assert content.metadata() == {"format": "pt"}
        assert file.stat().st_size < 550_000
    assert index["weight_map"] == found
    assert len(found) == len(weights)
    assert index["metadata"]["total_size"] == 4 * sum(weight.numel() for weight in weights.values())


def test_one_file_has_no_index(base: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", base / "tied", random_weights(base / "tied"))
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix() for path in files_of(tmp_path / "out")} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "custom_generate/generate.py",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_same_checkpoint_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Whatever the number of ranks that saved the weights."""
    weights = random_weights(base / "untied")
    checkpoint = write_run(tmp_path / "run" / "a", base / "untied", weights, ranks=2)
    write_run(tmp_path / "run" / "b", base / "untied", weights, ranks=5)
    for name, path in {"once": checkpoint, "again": checkpoint, "b": tmp_path / "run" / "b"}.items():
        export_checkpoint(path, tmp_path / name, max_shard_size="1MB")
    assert digests(tmp_path / "once") == digests(tmp_path / "again") == digests(tmp_path / "b")


@pytest.mark.parametrize(
    ("run_dtype", "dtype", "stored"),
    [
        ("fp32", None, torch.float32),
        ("fp32", "bf16", torch.bfloat16),
        ("bf16", None, torch.bfloat16),
        ("bf16", "fp32", torch.float32),
    ],
)
def test_dtype_is_the_runs_by_default(
    base: Path, tmp_path: Path, run_dtype: str, dtype: str | None, stored: torch.dtype
) -> None:
    """An fp32 export of a bf16 run has the full masters; its frozen tower was never more precise than bf16."""
    weights = random_weights(base / "untied")
    write_run(tmp_path / "run", base / "untied", weights, settings={"train": {"dtype": run_dtype}})
    export_checkpoint(tmp_path / "run", tmp_path / "out", dtype=dtype)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == stored
    for name, parameter in load_plain(tmp_path / "out").named_parameters():
        assert parameter.dtype == stored
        wanted = weights[name].bfloat16() if run_dtype == "bf16" and ".visual." in name else weights[name]
        assert torch.equal(parameter, wanted.to(stored)), name


def test_real_ids_are_kept(base: Path, tmp_path: Path, real_tokenizer: PreTrainedTokenizerBase) -> None:
    """From a model folder like the hub's, whose tokenizer ends before the latent tokens."""
    model = tmp_path / "model"
    shutil.copytree(base / "tied", model)
    state = json.loads(real_tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 151665]
    real_tokenizer.save_pretrained(model)
    (model / "tokenizer.json").write_text(json.dumps(state))
    config = json.loads((model / "config.json").read_text())
    ids = {name: real_tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "vision_start")}
    change_config(
        model,
        text_config=config["text_config"] | {"vocab_size": 151936, "hidden_size": 32, "intermediate_size": 32},
        vision_config=config["vision_config"] | {"out_hidden_size": 32},
        image_token_id=ids["image_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    assert len(AutoTokenizer.from_pretrained(model)) == 151665
    write_run(tmp_path / "run", model, random_weights(model))
    export_checkpoint(tmp_path / "run", tmp_path / "out")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    latents = "<|latent_pad|><|latent_start|><|latent_end|>"
    assert tokenizer(latents)["input_ids"] == [151665, 151666, 151667]
    text = "<|im_start|>user\nWhere? <|image_pad|>" + latents + "\u00e9t\u00e9 12\n"
    assert tokenizer(text)["input_ids"] == real_tokenizer(text)["input_ids"]
    settings = read_latent_settings(tmp_path / "out")
    assert settings.latent_token_ids.model_dump() == {"pad": 151665, "start": 151666, "end": 151667}
    assert load_plain(tmp_path / "out").config.image_token_id == 151655


def test_latent_settings_are_in_config_json(base: Path, tmp_path: Path) -> None:
    """Also as plain transformers reads it."""
    settings = {
        "model": {"latent_size": 6, "compress_strategy": "grid", "answer_sees_image": False},
        "data": {"system_turn": False},
        "train": {"stage": "stage1", "dtype": "fp32"},
    }
    write_run(tmp_path / "run", base / "untied", random_weights(base / "untied"), settings=settings)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    ids = load_tokenizer(str(base / "untied")).get_vocab()
    wanted = {
        "latent_size": 6,
        "stage": "stage1",
        "system_turn": False,
        "exif_orientation": True,
        "compress_strategy": "grid",
        "answer_sees_image": False,
        "text_dropout_image": 0.0,
        "latent_token_ids": {name: ids[f"<|latent_{name}|>"] for name in ("pad", "start", "end")},
    }
    assert read_latent_settings(tmp_path / "out").model_dump() == wanted
    assert AutoConfig.from_pretrained(tmp_path / "out").mirage == wanted
    assert load_plain(tmp_path / "out").config.mirage == wanted
    decoder, _ = load_decoder(str(tmp_path / "out"))
    assert not decoder.answer_sees_image


def test_a_share_of_hidden_images_is_kept_for_the_record(base: Path, tmp_path: Path) -> None:
    """Decoding leaves the images visible."""
    settings = {"data": {"text_dropout_image": 0.3}, "train": {"stage": "stage2", "dtype": "fp32"}}
    write_run(tmp_path / "run", base / "untied", random_weights(base / "untied"), settings=settings)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert read_latent_settings(tmp_path / "out").text_dropout_image == 0.3
    decoder, _ = load_decoder(str(tmp_path / "out"))
    assert decoder.answer_sees_image


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, r"latent_size: Field required; stage: Field required"),
        ({"latent_size": 0}, r"entry 'mirage'\): latent_size: .* greater than 0.*export the run again"),
        ({"latents": 4}, r"latents: Extra inputs"),
    ],
)
def test_invalid_latent_settings(base: Path, tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    shutil.copytree(base / "untied", tmp_path / "out")
    assert read_latent_settings(tmp_path / "out") is None
    change_config(tmp_path / "out", mirage=entry)
    with pytest.raises(ConfigError, match=message):
        read_latent_settings(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"cannot be read \(.*none\).*`mirage export` wrote"):
        read_latent_settings(str(tmp_path / "none"))


@pytest.mark.parametrize("limits", [{}, {"min_pixels": 28 * 28 * 20, "max_pixels": 28 * 28 * 30}])
def test_tokenizer_and_image_processor_are_the_runs(base: Path, tmp_path: Path, limits: dict[str, int]) -> None:
    """The same patches and ids as from the trainer's encoder, without the run's configuration."""
    write_run(tmp_path / "run", base / "untied", random_weights(base / "untied"), settings={"data": limits})
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    trainer = load_encoder(str(base / "untied"), stage="stage1", latent_size=4, **limits)
    exported = load_encoder(str(tmp_path / "out"), stage="stage1", latent_size=4)
    for _, sample in read_rows(base / "rows" / "rows.jsonl"):
        ours, theirs = trainer(sample), exported(sample)
        for name in ("input_ids", "labels", "position_ids", "pixel_values", "pixel_values_latent", "image_grid_thw"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    plain = AutoImageProcessor.from_pretrained(tmp_path / "out")
    wanted = (limits.get("min_pixels", 3136), limits.get("max_pixels", 12845056))
    assert (plain.size["shortest_edge"], plain.size["longest_edge"]) == wanted
    images = [decode(image_bytes(size), "test") for size in ((30, 30), (900, 600))]
    processor = ImageProcessor.load(str(base / "untied"), **limits)
    for image in images:
        assert torch.equal(plain(image, return_tensors="pt")["image_grid_thw"], processor([image])[1])
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == AutoTokenizer.from_pretrained(base / "untied").chat_template


def test_the_joint_processor(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="transformers builds Qwen2.5-VL's processor only with torchvision")
    limits = {"min_pixels": 28 * 28 * 20, "max_pixels": 28 * 28 * 30}
    write_run(tmp_path / "run", base / "untied", random_weights(base / "untied"), settings={"data": limits})
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    features = processor(text=[text], images=[Image.new("RGB", (900, 600))], return_tensors="pt")
    num_merged = int(features["image_grid_thw"].prod()) // 4
    assert 20 <= num_merged <= 30
    image_pad = load_tokenizer(str(base / "untied")).convert_tokens_to_ids("<|image_pad|>")
    assert (features["input_ids"] == image_pad).sum() == num_merged


def test_generation_defaults(base: Path, tmp_path: Path) -> None:
    """Those of the model that the run started from, or if it has none, of its configuration."""
    weights = random_weights(base / "untied")
    write_run(tmp_path / "run", base / "untied", weights)
    export_checkpoint(tmp_path / "run", tmp_path / "out")
    started, exported = (GenerationConfig.from_pretrained(folder) for folder in (base / "untied", tmp_path / "out"))
    assert exported.to_dict() == started.to_dict()
    assert len(exported.eos_token_id) == 2
    shutil.copytree(base / "untied", tmp_path / "model")
    hub = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-06, "top_k": 1, "top_p": 0.001}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(hub))
    export_checkpoint(tmp_path / "run", tmp_path / "hub", model=str(tmp_path / "model"))
    assert hub.items() <= GenerationConfig.from_pretrained(tmp_path / "hub").to_dict().items()
    (tmp_path / "model" / "generation_config.json").unlink()
    export_checkpoint(tmp_path / "run", tmp_path / "bare", model=str(tmp_path / "model"))
    ids = load_tokenizer(str(base / "untied")).get_vocab()
    assert GenerationConfig.from_pretrained(tmp_path / "bare").eos_token_id == ids["<|im_end|>"]


def refused(tmp_path: Path, error: type[MirageError], message: str, **options: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        export_checkpoint(tmp_path / "run", tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_what_cannot_be_exported(base: Path, tmp_path: Path) -> None:
    """A message with what is wrong, where, what is allowed and what to do; and nothing is written."""
    refused(tmp_path, CheckpointError, rf"no complete checkpoint \({tmp_path}/run\); expected .*; name one")
    weights = random_weights(base / "untied")
    checkpoint = write_run(tmp_path / "run", base / "untied", weights)
    for size in ("5", "5 gallons", "GB"):
        refused(tmp_path, ConfigError, rf"'{size}' is not a size \(--max-shard-size\).*5GB", max_shard_size=size)
    refused(
        tmp_path, CheckpointError, r"parameters .* differ .*: lm_head.weight; .*model.path", model=str(base / "tied")
    )
    refused(
        tmp_path,
        ConfigError,
        r"does not exist \(model no/such/model\).*model.path=.*untied;.*--model",
        model="no/such/model",
    )

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused(tmp_path, DataError, rf"the output already exists \({tmp_path}/out\).*name another")
    shutil.rmtree(tmp_path / "out")

    file = checkpoint / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.rename(file.with_name("aside"))
    refused(tmp_path, CheckpointError, r"damaged .*zero_pp_rank_1_.* is missing; .*copy it there again")
    complete_by_hand(checkpoint)
    refused(tmp_path, CheckpointError, r"0 files match .*zero_pp_rank_1_.*copy the complete folder again")
    facts = json.loads((checkpoint / "run.json").read_text())
    facts["config"]["model"]["old_key"] = 1
    (checkpoint / "run.json").write_text(json.dumps(facts))
    complete_by_hand(checkpoint)
    refused(tmp_path, CheckpointError, r"(?s)run.json has no configuration of this version .*old_key")
    (checkpoint / "run.json").write_text("{")
    complete_by_hand(checkpoint)
    refused(tmp_path, CheckpointError, r"run.json cannot be read .*restore it")


def test_a_relative_model_path_that_is_gone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", "runs/models/mine", random_weights(base / "untied"))
    monkeypatch.chdir(tmp_path)
    refused(
        tmp_path,
        ConfigError,
        r"(cannot be loaded|does not exist) \((model )?runs/models/mine\).*started from model.path=runs.*--model",
    )
    export_checkpoint(tmp_path / "run", tmp_path / "out", model=str(base / "untied"))
    load_plain(tmp_path / "out")


FULL_DISK = """
import resource, sys
from pathlib import Path
from mirage_ds.errors import DataError
from mirage_ds.hf.export import export_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    export_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))
except DataError as error:
    print(error)
"""


def test_a_full_disk(base: Path, tmp_path: Path) -> None:
    """Simulated by a limit on the size of files."""
    write_run(tmp_path / "run", base / "untied", random_weights(base / "untied"))
    result = in_child(FULL_DISK, str(tmp_path / "run"), str(tmp_path / "out"))
    assert f"cannot be written ({tmp_path}/out)" in result
    assert "free some space there" in result
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def in_child(script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        # Tensors over 32 MiB always go back to the system when freed; with this, those of these small models do too.
        env=launching.environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# Not getrusage's ru_maxrss, which a child inherits from its parent.
MEMORY = """
import sys
from pathlib import Path
from mirage_ds.hf.export import export_checkpoint

def resident_bytes(name):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(name)]
    return int(line.split()[1]) * 1024

small, large, folder = (Path(argument) for argument in sys.argv[1:4])
export_checkpoint(small, folder / "small", dtype=sys.argv[4])  # late initialization, and what every export reads
base = resident_bytes("VmRSS")
export_checkpoint(large, folder / "large", dtype=sys.argv[4], max_shard_size=sys.argv[5])
print("memory", resident_bytes("VmHWM") - base)
"""


@pytest.fixture(scope="module")
def large_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 ranks' checkpoint of about 250 MB: 12 layers of 16 MB and a tower of 4 blocks of 12 MB, in float32."""
    folder = tmp_path_factory.mktemp("large")
    shutil.copytree(base / "untied", folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    text = {"hidden_size": 512, "intermediate_size": 2176, "num_hidden_layers": 12, "num_attention_heads": 16}
    text |= {"layer_types": ["full_attention"] * 12}
    vision = {"hidden_size": 512, "intermediate_size": 1280, "depth": 4, "out_hidden_size": 512}
    change_config(
        folder / "model",
        text_config=config["text_config"] | text,
        vision_config=config["vision_config"] | vision,
    )
    weights = random_weights(folder / "model")
    assert sum(weight.nbytes for weight in weights.values()) > 240e6
    write_run(folder / "run", folder / "model", weights, ranks=2)
    return folder


@pytest.mark.parametrize(("dtype", "shard_size"), [("fp32", 50_000_000), ("bf16", 25_000_000)])
def test_memory(base: Path, large_run: Path, tmp_path: Path, dtype: str, shard_size: int) -> None:
    """Peak resident memory above an export's own base: under 1.5 times the largest file plus one decoder layer."""
    write_run(tmp_path / "tiny", base / "untied", random_weights(base / "untied"))
    output = in_child(
        MEMORY, str(tmp_path / "tiny"), str(large_run / "run"), str(tmp_path), dtype, f"{shard_size // 1000}KB"
    )
    peak = int(output.split("memory ")[1])
    files = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    layer = sum(
        parameter.numel() * 4
        for name, parameter in empty_model(str(large_run / "model")).named_parameters()
        if ".language_model.layers.0." in name
    )
    assert sum(files) > 4 * max(files)
    print(f"peak {peak / 1e6:.1f} MB, largest file {max(files) / 1e6:.1f} MB, layer {layer / 1e6:.1f} MB")
    assert 0.9 * max(files) < peak < 1.5 * max(files) + layer


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 0, "wrote step 3 of"),
        (["--dtype", "bf16", "--max-shard-size", "1MB"], 0, "of bf16 weights"),
        (["--max-shard-size", "much"], 2, "'much' is not a size"),
        (["--dtype", "fp16"], 2, "fp16"),
        (["--model", "no/such/model"], 2, "--model"),
    ],
)
def test_the_command(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    checkpoint = write_run(tmp_path / "run", base / "untied", random_weights(base / "untied"))
    arguments = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", ["mirage", "export", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == code
    output = capsys.readouterr()
    assert message in (output.err if code else output.out)
    assert (tmp_path / "out").exists() == (code == 0)


def test_a_weight_that_is_not_finite_is_refused(base: Path, tmp_path: Path) -> None:
    weights = random_weights(base / "untied")
    weights["model.language_model.norm.weight"][3] = float("nan")
    write_run(tmp_path / "run", base / "untied", weights)
    with pytest.raises(CheckpointError, match=r"weight model\.norm\.weight is not finite .*global_step3"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
