"""Model folders that are damaged or cannot be trained: one message that names the file, whatever a library raised."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from generated_rows import write_rows
from safetensors.torch import load_file, save_file

from mirage_ds.data.encode import load_encoder
from mirage_ds.errors import ConfigError
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model_folder import check_model

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny(write_rows(folder / "rows", 4), folder / "model", seed=0)
    return folder / "model"


def entries(name: str, section: str | None = None, **changes: object) -> Damage:
    """Changes entries of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (content[section] if section else content).update(changes)
        (folder / name).write_text(json.dumps(content))

    return change


def written(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def more_rows(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:10]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {')


def only_gguf(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "q4.gguf").touch()


ADAPTER = b'{"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}'
DAMAGES: dict[str, tuple[Damage, str]] = {
    "awq": (entries("config.json", quantization_config={"quant_method": "awq"}), r"quantized \(awq; .*unquantized one"),
    "bits": (entries("config.json", quantization_config={"load_in_4bit": True}), "quantized .*name the unquantized"),
    "adapter": (written("adapter_config.json", ADAPTER), "adapter .LoRA. of 'Qwen/Qwen2.5-VL-7B.*merge it"),
    "gguf": (only_gguf, r"no config\.json .*q4\.gguf.*not GGUF"),
    "rows": (more_rows, r"another shape, for example .*vocab_size"),
    "index": (cut_index, r"damaged \(.*model\.safetensors\.index\.json\): .*line 1"),
    "template": (written("chat_template.jinja", b"{% for m in messages %}"), "chat template cannot be used: Template"),
    "template fails": (written("chat_template.jinja", b"{{ nothing.x.y }}"), "chat template cannot be used: Undefined"),
    "size": (entries("preprocessor_config.json", size={"height": 448, "width": 448}), "size is .*448.*shortest_edge"),
    "patches": (entries("preprocessor_config.json", patch_size=0), "patch_size is 0 .*preprocessor_config"),
    "tower": (
        entries("preprocessor_config.json", patch_size=16),
        "patch_size is 16 .*patch_size is 14 ",
    ),
    "mean": (entries("preprocessor_config.json", image_mean="x"), "image_mean is 'x'"),
    "heads": (entries("config.json", "text_config", num_attention_heads=0), r"config\.json describes no model"),
    "rope": (
        entries("config.json", "text_config", rope_parameters={"rope_type": "x"}, rope_scaling=None),
        "describes no model",
    ),
    "dropout": (entries("config.json", "text_config", attention_dropout=0.1), "attention_dropout=0.1 .*only 0 .*set"),
    "text": (entries("config.json", text_config=None), "text_config is no object"),
    "twice": (written("config.json", b'{"a": 1, "a": 2}'), r'damaged \(.*config\.json\): the key "a" stands twice'),
    "defaults": (
        written("generation_config.json", b"null"),
        r"damaged \(.*generation_config\.json\): it is a NoneType",
    ),
    "tokenizer": (written("tokenizer.json", b"{}"), "no tokenizer"),
    "a folder": (lambda folder: (folder / "x.json").mkdir(), r"cannot be read \(.*x\.json\): Is a directory"),
    "a text file": (written("tokenizer_config.json", b"\xff\xfe"), r"damaged \(.*tokenizer_config\.json\): 'utf-8'"),
}


def load(folder: str) -> None:
    load_backbone(folder, dtype=torch.float32)
    load_encoder(folder, stage="stage1", latent_size=4)


@pytest.mark.parametrize("name", DAMAGES)
def test_one_message(model: Path, tmp_path: Path, name: str) -> None:
    damage, says = DAMAGES[name]
    folder = tmp_path / "model"
    copytree(model, folder)
    damage(folder)
    with pytest.raises(ConfigError) as refused:
        load(str(folder))
    assert re.search(says, str(refused.value)), str(refused.value)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}/y", "a/" + "x" * 300])
def test_a_path_that_the_system_refuses(name: str) -> None:
    with pytest.raises(ConfigError, match=r"the model folder does not exist \(model\.path=.*allowed: "):
        check_model(name, f"model.path={name[:9]}")


def test_a_run_is_not_a_model(tmp_path: Path) -> None:
    """Its files do not matter; what to do is said in full."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=f"folder of a run, .*: mirage export --checkpoint {tmp_path} --output DIR$"):
        check_model(str(tmp_path), f"--model {tmp_path}")
