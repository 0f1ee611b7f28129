"""`mirage init`: a complete folder that plain transformers loads, made offline and reproducibly."""

import json
import sys
from pathlib import Path

import pytest
import torch
from generated_rows import write_rows
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds import cli
from mirage_ds.hf.preset import QWEN_SPECIAL_TOKENS, write_tiny
from mirage_ds.tokens import LATENT_TOKENS, TokenIds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("preset")
    write_tiny(write_rows(base / "rows"), base / "tiny", seed=0)
    return base / "tiny"


def test_the_tokenizer_has_qwens_special_tokens_with_the_latents_last(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [*QWEN_SPECIAL_TOKENS, *LATENT_TOKENS]
    first = len(tokenizer) - len(special)
    assert tokenizer.convert_tokens_to_ids(special) == list(range(first, len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in special:
        assert len(tokenizer(f"a{token}b")["input_ids"]) == 3


@pytest.mark.parametrize("text", ["Here is the map", " caf\u00e9 \u5730\u56fe\U0001f5fa\t\r\n  x", "line\n\n  1234"])
def test_any_text_survives_encoding_and_decoding(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_text_is_normalized_and_split_as_in_qwen(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("cafe\u0301")["input_ids"] == tokenizer("caf\u00e9")["input_ids"]  # NFC
    assert len(tokenizer("111")["input_ids"]) == 3  # each digit is a token


def test_the_words_of_a_turn_are_single_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("<|im_start|>assistant\n")[:2] == ["<|im_start|>", "assistant"]


def test_the_model_covers_the_tokenizer(folder: Path) -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    vocab_size = config.text_config.vocab_size
    assert vocab_size % 64 == 0
    assert 0 <= vocab_size - len(tokenizer) < 64
    assert config.model_type == "qwen2_5_vl"
    ids = TokenIds.of(tokenizer)
    assert (config.image_token_id, config.vision_start_token_id) == (ids.image_pad, ids.vision_start)


def test_processor_and_generation_defaults(folder: Path) -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12845056)
    ids = TokenIds.of(AutoTokenizer.from_pretrained(folder))
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [ids.im_end, ids.end_of_text]
    assert generation.pad_token_id == ids.end_of_text


def test_the_seed_decides_the_weights_and_the_text_the_tokenizer(tmp_path: Path, folder: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    write_tiny(rows, tmp_path / "same", seed=0)
    write_tiny(rows, tmp_path / "other", seed=1)
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "same").iterdir()} == names
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    differing = {name for name in names if (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()}
    assert differing == {"model.safetensors"}


def run_cli(monkeypatch: pytest.MonkeyPatch, rows: Path, output: Path) -> int:
    arguments = ["init", "--preset", "tiny", "--text", str(rows), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["mirage", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows")
    before = torch.get_rng_state()
    assert run_cli(monkeypatch, rows, tmp_path / "tiny") == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    capsys.readouterr()
    assert run_cli(monkeypatch, rows, tmp_path / "tiny") == 2
    assert f"the output already exists ({tmp_path / 'tiny'})" in capsys.readouterr().err
    assert run_cli(monkeypatch, tmp_path / "none.jsonl", tmp_path / "new") == 2
    assert f"no such file (--text {tmp_path / 'none.jsonl'})" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
