"""`mirage init --from`: copies are equal to the source bit for bit, and additions are correct."""

import json
import shutil
import sys
from pathlib import Path

import golden_set
import pytest
import torch
from generated_rows import write_rows
from real_vocabulary import real_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from mirage_ds import cli
from mirage_ds.data.conversation import load_tokenizer
from mirage_ds.data.encode import load_encoder
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.hf.preset import CHAT_TEMPLATE, write_tiny
from mirage_ds.hf.pretrained import copy_pretrained
from mirage_ds.model.backbone import check_latent_ids, load_backbone, random_model
from mirage_ds.tokens import LATENT_TOKENS, TokenIds

__all__ = ["real_tokenizer"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pretrained")
    write_tiny(write_rows(base / "rows"), base / "tiny", seed=0)
    return base / "tiny"


def without_latents(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer without latent tokens, like Qwen2.5-VL's own."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in LATENT_TOKENS]
    for token in LATENT_TOKENS:
        state["model"]["vocab"].pop(token, None)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    plain.chat_template = tokenizer.chat_template
    return plain


def write_hub_like(tiny: Path, folder: Path, spare_rows: int, tied: bool = False) -> int:
    """A model without latent tokens and `spare_rows` rows beyond its tokenizer; returns the tokenizer's length."""
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    plain = without_latents(tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    plain.save_pretrained(folder)
    model = random_model(len(plain) + spare_rows, TokenIds.of(tokenizer), seed=1)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    return len(plain)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check_as_the_trainer_does(folder: Path) -> None:
    encoder = load_encoder(str(folder), stage="stage1", latent_size=4)
    check_latent_ids(encoder.ids, load_backbone(str(folder), dtype=torch.float32), str(folder))


def test_spare_rows_are_used(tiny: Path, tmp_path: Path) -> None:
    """The trainer accepts such a model directly, with the same ids as its copy."""
    first = write_hub_like(tiny, tmp_path / "hub", spare_rows=3)
    copy_pretrained(str(tmp_path / "hub"), tmp_path / "copy")
    before, after = weights(tmp_path / "hub"), weights(tmp_path / "copy")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for folder in ("hub", "copy"):
        check_as_the_trainer_does(tmp_path / folder)
        ids = load_tokenizer(str(tmp_path / folder)).convert_tokens_to_ids(list(LATENT_TOKENS))
        assert ids == [first, first + 1, first + 2]
    plain = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert plain.convert_tokens_to_ids(list(LATENT_TOKENS)) == ids
    assert plain.chat_template == CHAT_TEMPLATE
    assert len(plain("a<|latent_pad|>b")["input_ids"]) == 3


@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_added_only_where_ids_do_not_fit(tiny: Path, tmp_path: Path, tied: bool) -> None:
    first = write_hub_like(tiny, tmp_path / "hub", spare_rows=2, tied=tied)
    with pytest.raises(ConfigError, match=rf"id {first + 2} has no embedding.*`mirage init --from {tmp_path}/hub "):
        check_as_the_trainer_does(tmp_path / "hub")

    copy_pretrained(str(tmp_path / "hub"), tmp_path / "copy")
    check_as_the_trainer_does(tmp_path / "copy")
    num_rows = AutoConfig.from_pretrained(tmp_path / "copy").text_config.vocab_size
    assert num_rows % 64 == 0
    assert first + 3 <= num_rows < first + 3 + 64
    before, after = weights(tmp_path / "hub"), weights(tmp_path / "copy")
    assert before.keys() == after.keys()
    for name, old in before.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = old.double().mean(dim=0).float().expand(num_rows - len(old), -1)
            assert torch.equal(after[name][: len(old)], old)
            torch.testing.assert_close(after[name][len(old) :], mean, rtol=0, atol=1e-7)
        else:
            assert torch.equal(after[name], old)
    assert load_backbone(str(tmp_path / "copy"), dtype=torch.float32).tied == tied


def test_a_checkpoint_of_the_reference(tiny: Path, tmp_path: Path, real_tokenizer: PreTrainedTokenizerBase) -> None:
    """151668 rows, flat config, old key names, bfloat16, the tokenizer with the latent tokens, no processor files."""
    checkpoint = tmp_path / "checkpoint-1000"
    ids = TokenIds.of(real_tokenizer)
    config = json.loads((golden_set.FOLDER / "model" / "config.json").read_text()) | {
        "vocab_size": 151668,
        "image_token_id": ids.image_pad,
        "vision_start_token_id": ids.vision_start,
        "torch_dtype": "bfloat16",
    }
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).bfloat16()
    model.save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "generation_config.json").unlink()
    real_tokenizer.save_pretrained(checkpoint)
    assert {name.split(".")[0] for name in weights(checkpoint)} == {"visual", "model", "lm_head"}

    with pytest.raises(ConfigError, match=rf"no image processor.*--from {checkpoint} --processor-from"):
        load_encoder(str(checkpoint), stage="stage2", latent_size=4)
    with pytest.raises(ConfigError, match=rf"no image processor \({checkpoint}\).*--processor-from"):
        copy_pretrained(str(checkpoint), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()

    copy_pretrained(str(checkpoint), tmp_path / "copy", str(tiny))
    check_as_the_trainer_does(tmp_path / "copy")
    assert load_tokenizer(str(tmp_path / "copy")).convert_tokens_to_ids("<|latent_end|>") == 151667
    before, after = weights(checkpoint), weights(tmp_path / "copy")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert (after[name].dtype, after[name].shape) == (torch.bfloat16, weight.shape)
        assert torch.equal(after[name], weight)


def golden_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with the special tokens at the golden model's ids."""
    names = {"im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"}
    ids = golden_set.numbers("golden")["ids"]
    tokens = {ids["pad"]: "<|endoftext|>"} | {ids[name]: f"<|{name}|>" for name in names}
    tokens |= {ids[f"latent_{name}"]: f"<|latent_{name}|>" for name in ("pad", "start", "end")}
    special = [AddedToken(token, special=True, normalized=False) for token in tokens.values()]
    vocabulary = {tokens.get(number, f"word{number}"): number for number in range(1000)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="word9"))
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE)


def test_the_golden_model_with_everything_from_elsewhere(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    golden_tokenizer().save_pretrained(other)
    shutil.copy(tiny / "preprocessor_config.json", other)
    with pytest.raises(ConfigError, match=r"not a tokenizer of Qwen2\.5-VL"):
        load_tokenizer(golden_set.MODEL)
    with pytest.raises(ConfigError, match="no tokenizer"):
        copy_pretrained(golden_set.MODEL, tmp_path / "copy")
    copy_pretrained(golden_set.MODEL, tmp_path / "copy", str(other))
    check_as_the_trainer_does(tmp_path / "copy")
    encoder = load_encoder(str(tmp_path / "copy"), stage="stage1", latent_size=4)
    ids = golden_set.numbers("golden")["ids"]
    assert (encoder.ids.latent_pad, encoder.ids.latent_end) == (ids["latent_pad"], ids["latent_end"])
    before, after = weights(golden_set.FOLDER / "model"), weights(tmp_path / "copy")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_chat_template_alone_from_elsewhere(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        copy_pretrained(str(tmp_path / "bare"), tmp_path / "copy")
    copy_pretrained(str(tmp_path / "bare"), tmp_path / "copy", str(tiny))
    assert AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == CHAT_TEMPLATE


def test_what_cannot_be_copied(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"does not exist \(model {tmp_path}/none\)"):
        copy_pretrained(str(tmp_path / "none"), tmp_path / "copy")
    with pytest.raises(DataError, match="the output already exists"):
        copy_pretrained(str(tiny), tiny)
    with pytest.raises(ConfigError, match=r"the tokenizer has the ids .* for image pads .* the model \(5, 3\)"):
        copy_pretrained(golden_set.MODEL, tmp_path / "copy", str(tiny))
    shutil.copytree(tiny, tmp_path / "partial")
    state = weights(tiny)
    state.pop("model.norm.weight")
    save_file(state, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing weights: 1, for example .*norm\.weight"):
        copy_pretrained(str(tmp_path / "partial"), tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["partial"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--from", "TINY"], 0),
        ([], 2),
        (["--preset", "tiny"], 2),
        (["--preset", "tiny", "--text", "x.jsonl", "--from", "TINY"], 2),
        (["--preset", "tiny", "--from", "TINY"], 2),
        (["--from", "TINY", "--text", "x.jsonl"], 2),
        (["--preset", "tiny", "--text", "x.jsonl", "--processor-from", "TINY"], 2),
    ],
)
def test_the_command(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    given = [str(tiny) if argument == "TINY" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["mirage", "init", *given, "--output", str(tmp_path / "copy")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == code
    assert (tmp_path / "copy").exists() == (code == 0)
    if code:
        assert "do not name one model" in capsys.readouterr().err
