"""Exports of LoRA runs, of checkpoints written by zero3_files: by plain peft and plain transformers.

A model with random adapter weights computes the logits that both forms of the export must give.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generated_rows import write_rows
from peft import PeftModel
from transformers import Qwen2_5_VLForConditionalGeneration
from zero3_files import complete_by_hand, write_run

from mirage_ds.config import Dtype, ModelConfig
from mirage_ds.data.conversation import load_tokenizer
from mirage_ds.errors import CheckpointError, ConfigError
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import DTYPES, load_backbone
from mirage_ds.model.latent_settings import read_latent_settings
from mirage_ds.model.trained import choose_trained
from mirage_ds.tokens import TokenIds

MASK = 2**64 - 1
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders, `untied` and `tied`; the second has several files."""
    folder = tmp_path_factory.mktemp("adapter")
    write_tiny(write_rows(folder / "rows"), folder / "untied", seed=0)
    write_tiny(folder / "rows" / "rows.jsonl", folder / "tied", seed=1)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "tied")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    (folder / "tied" / "model.safetensors").unlink()
    model.save_pretrained(folder / "tied", max_shard_size="300KB")
    assert (folder / "tied" / "model.safetensors.index.json").exists()
    return folder


def factor(number: int) -> int:
    """SplitMix64's output for a state, odd; in Python's integers."""
    bits = ((number + 1) * 0x9E3779B97F4A7C15) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return (bits ^ (bits >> 31)) | 1


COLUMNS = np.array([factor(column) for column in range(2**16)], dtype=np.uint64)


def digest(weights: dict[str, torch.Tensor]) -> str:
    """The digest of a base by its definition."""
    lines = []
    for name, weight in sorted(weights.items()):
        bits = weight.flatten().view(INTEGERS[weight.dtype]).numpy().astype(np.int64).view(np.uint64)
        rows = np.array([factor(row + 2**16) for row in range(-(-len(bits) // 2**16))], dtype=np.uint64)
        factors = np.resize(COLUMNS, len(bits)) * np.repeat(rows, 2**16)[: len(bits)]
        total = (bits * factors).sum(dtype=np.uint64)
        lines.append(f"{name} {total}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def ids(base: Path) -> torch.Tensor:
    """Ids among which are the latent tokens, as inputs and as the next tokens."""
    latents = TokenIds.of(load_tokenizer(str(base / "untied"))).latents
    return torch.tensor([[5, 9, *latents, 7, latents[1], latents[0], 3]])


def run_of(
    base: Path, folder: Path, kind: str, lora: dict[str, Any], ids: torch.Tensor, dtype: Dtype = "fp32"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A run folder whose adapter is random; the logits of that model, and its weights."""
    backbone = load_backbone(str(base / kind), dtype=DTYPES[dtype])
    started = {name: weight.detach().clone() for name, weight in backbone.hf.named_parameters()}
    settings = {"path": str(base / kind), "lora": lora}
    latents = TokenIds.of(load_tokenizer(str(base / kind))).latents
    choose_trained(backbone, ModelConfig.model_validate(settings), latents, seed=0)
    torch.manual_seed(3)
    trained = {name: weight for name, weight in backbone.hf.named_parameters() if weight.requires_grad}
    for weight in trained.values():
        weight.data = torch.randn(weight.shape).mul(0.1).to(weight.dtype)
    with torch.no_grad():
        logits: torch.Tensor = backbone.hf(input_ids=ids).logits
    checkpoint = write_run(
        folder,
        base / kind,
        {name: weight.detach().float() for name, weight in trained.items()},
        settings={"model": {"lora": lora}, "train": {"dtype": dtype}},
    )
    facts = json.loads((checkpoint / "run.json").read_text())
    frozen = {name: weight for name, weight in started.items() if name not in trained}
    facts["base"] = {"path": str(base / kind), "digest": digest(frozen)}
    (checkpoint / "run.json").write_text(json.dumps(facts))
    complete_by_hand(checkpoint)
    return logits, {name: weight.detach() for name, weight in backbone.hf.named_parameters()}


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.parametrize("embeddings", ["latent_rows", "none", "all"])
@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_both_forms_give_the_logits_of_the_adapter(
    base: Path, tmp_path: Path, kind: str, embeddings: str, ids: torch.Tensor
) -> None:
    lora = {"rank": 4, "alpha": 6.0, "target_modules": "all", "train_embeddings": embeddings}
    expected, _ = run_of(base, tmp_path / "run", kind, lora, ids)
    export_checkpoint(tmp_path / "run", tmp_path / "merged", form="merge", max_shard_size="500KB")
    export_checkpoint(tmp_path / "run", tmp_path / "adapter", form="adapter")

    merged, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "merged", output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading.values()), loading
    torch.testing.assert_close(logits_of(merged, ids), expected, rtol=0, atol=1e-5)
    assert read_latent_settings(tmp_path / "merged") is not None

    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(base / kind, dtype=torch.float32)
    before = logits_of(plain, ids)
    with_adapter = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(with_adapter, ids), expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 0.1
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir() if file.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert embeddings == "all" or size < 0.3 * sum(file.stat().st_size for file in (tmp_path / "merged").iterdir())


def test_a_run_in_bf16_is_merged_in_float32(base: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    _, weights = run_of(base, tmp_path / "run", "untied", {"rank": 4, "alpha": 8.0}, ids, "bf16")
    export_checkpoint(tmp_path / "run", tmp_path / "merged", form="merge")
    merged = dict(Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "merged").named_parameters())
    module = "model.language_model.layers.2.mlp.down_proj"
    first, second = (weights[f"{module}.lora_{which}.default.weight"].float() for which in "AB")
    whole = weights[f"{module}.base_layer.weight"].float() + 2 * second @ first
    assert merged[f"{module}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(merged[f"{module}.weight"], whole.bfloat16(), rtol=2**-7, atol=0)
    assert torch.equal(merged["model.visual.merger.ln_q.weight"], weights["model.visual.merger.ln_q.weight"])


def test_refusals(base: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    run_of(base, tmp_path / "run", "untied", {"rank": 2}, ids)
    with pytest.raises(ConfigError, match=r"trained an adapter .*give --merge for the first, or --adapter"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"trained on other weights .*restore that model"):
        export_checkpoint(tmp_path / "run", tmp_path / "out", form="merge", model=str(changed(base, tmp_path)))
    backbone = load_backbone(str(base / "untied"), dtype=torch.float32)
    weights = {name: weight.detach() for name, weight in backbone.hf.named_parameters()}
    write_run(tmp_path / "full", base / "untied", weights)
    with pytest.raises(ConfigError, match=r"the run has no adapter .*--adapter .*leave the option out"):
        export_checkpoint(tmp_path / "full", tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


def changed(base: Path, folder: Path) -> Path:
    """A copy of the base in which one element differs."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base / "untied")
    model.model.language_model.layers[0].mlp.up_proj.weight.data[1, 2] += 0.5
    write_tiny(base / "rows" / "rows.jsonl", folder / "other", seed=0)
    model.save_pretrained(folder / "other")
    return folder / "other"
