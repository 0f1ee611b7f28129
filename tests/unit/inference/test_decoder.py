"""Decoding: each row of a batch gets the same answer as alone; sampling; what the terminal shows."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from talkative import write_questions, write_talkative
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, Encoder
from mirage_ds.data.rows import read_questions
from mirage_ds.errors import ConfigError
from mirage_ds.inference.generate import Decoder, Generation, choose_device, load_decoder
from mirage_ds.inference.sampling import Sampling
from mirage_ds.inference.terminal import LATENT_MARK, answer

NUM_PROMPTS, MAX_NEW_TOKENS, CLOSE = 64, 24, 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_talkative(tmp_path_factory.mktemp("talkative")))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "rows", NUM_PROMPTS)


@dataclass(frozen=True)
class Recorder(Sampling):
    """Greedy, and records by how much the likeliest token led at each step."""

    margins: list[torch.Tensor] = field(default_factory=list)

    def choose(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        first, second = logits.topk(2, dim=-1).values.unbind(dim=-1)
        self.margins.append(first - second)
        return super().choose(logits, generators)


def load(model: str, **settings: object) -> tuple[Decoder, Encoder]:
    settings = {"latent_size": 3, "max_new_tokens": MAX_NEW_TOKENS, "dtype": torch.float32} | settings
    return load_decoder(model, **settings)


def prompts(encoder: Encoder, questions: Path) -> list[EncodedSample]:
    return [encoder.prompt(sample) for _, sample in read_questions(questions)]


def test_a_batch_of_64_equals_one_by_one(model: str, questions: Path) -> None:
    """Here with blocks of fixed length; with the model's own end, in tests/parity/test_generate.py."""
    decoder, encoder = load(model)
    rows = prompts(encoder, questions)
    together = decoder.generate(collate(rows, align_latents=True))
    close = []
    for number, (row, batched) in enumerate(zip(rows, together, strict=True)):
        decoder.sampling = Recorder()
        (alone,) = decoder.generate(collate([row], align_latents=True))
        doubtful = [step for step, margin in enumerate(decoder.sampling.margins) if margin.item() < CLOSE]
        close += [(number, step) for step in doubtful]
        until = doubtful[0] if doubtful else MAX_NEW_TOKENS
        assert batched.ids[:until] == alone.ids[:until], f"row {number}"
        if not doubtful:
            torch.testing.assert_close(batched.latents, alone.latents, rtol=1e-4, atol=1e-5)
    print("too close to compare (row, step):", close)
    assert len({number for number, _ in close}) <= NUM_PROMPTS // 8, "most rows were compared to their end"
    check_that_rows_differ(decoder, rows, together)


def check_that_rows_differ(decoder: Decoder, rows: list[EncodedSample], found: list[Generation]) -> None:
    """Otherwise the test above would say little."""
    starts = {row.ids.index(decoder.ids.latent_start) for row in found if decoder.ids.latent_start in row.ids}
    assert len(starts) >= 5
    assert len({len(row.ids) for row in found}) >= 5
    assert len({len(row.input_ids) for row in rows}) >= 20
    assert max(row.ids.count(decoder.ids.latent_start) for row in found) >= 2


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_a_rehearsal_takes_what_the_longest_answers_take(
    model: str, questions: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Its last pass has the shapes and the cache of the last pass over answers that never end."""
    decoder, encoder = load(model, max_new_tokens=limit)
    batch = collate(prompts(encoder, questions)[:6], align_latents=True)
    monkeypatch.setattr(decoder, "is_end", lambda tokens: torch.zeros_like(tokens, dtype=torch.bool))
    passes: list[tuple[object, ...]] = []
    step = decoder.backbone.step

    def watch(embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        hidden = step(embeds, positions, mask, cache)
        kept = [(layer.keys.shape, layer.values.shape) for layer in cache.layers]
        passes.append((embeds.shape, positions.tolist(), mask.tolist(), kept))
        return hidden

    monkeypatch.setattr(decoder.backbone, "step", watch)
    decoder.generate(batch)
    decoded, passes = passes, []
    decoder.rehearse(batch)
    assert len(decoded) == limit
    assert len(passes) == min(limit, 2)
    assert passes[0] == decoded[0]
    assert passes[-1] == decoded[-1]


def test_a_batch_ends_with_its_last_row(model: str, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward for the prompt and one for each token after the first: none after the last row has ended."""
    decoder, encoder = load(model, max_new_tokens=40)
    rows = prompts(encoder, questions)
    everything = decoder.generate(collate(rows, align_latents=True))
    ending = [row for row, found in zip(rows, everything, strict=True) if len(found.ids) < 40]
    calls = []
    step = decoder.backbone.step
    monkeypatch.setattr(decoder.backbone, "step", lambda *inputs: calls.append(inputs) or step(*inputs))
    found = decoder.generate(collate(ending, align_latents=True))
    assert len({len(row.ids) for row in found}) >= 3
    assert len(calls) == max(len(row.ids) for row in found) < 40
    assert all(row.ids.index(decoder.ids.im_end) == len(row.ids) - 1 for row in found)


def test_a_batch_that_is_cut_off_wastes_no_forward(
    model: str, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, encoder = load(model, max_new_tokens=5)
    calls = []
    step = decoder.backbone.step
    monkeypatch.setattr(decoder.backbone, "step", lambda *inputs: calls.append(inputs) or step(*inputs))
    found = decoder.generate(collate(prompts(encoder, questions), align_latents=True))
    assert max(len(row.ids) for row in found) == len(calls) == 5


def test_sampling_depends_only_on_seed_and_row(model: str, questions: Path) -> None:
    decoder, encoder = load(model, sampling=Sampling(0.7, 0.9, seed=1))
    rows = prompts(encoder, questions)[:8]
    first = [row.ids for row in decoder.generate(collate(rows, align_latents=True))]
    again = [row.ids for row in decoder.generate(collate(rows[::-1], align_latents=True))][::-1]
    alone = [decoder.generate(collate([row], align_latents=True))[0].ids for row in rows]
    assert first == again == alone
    decoder.sampling = Sampling(0.7, 0.9, seed=2)
    other = [row.ids for row in decoder.generate(collate(rows, align_latents=True))]
    assert sum(ours != theirs for ours, theirs in zip(first, other, strict=True)) >= 6


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.3, 0.5), (1.0, 1.0), (0.7, 1e-6)])
def test_draws_have_the_frequencies_of_transformers_warpers(temperature: float, top_p: float) -> None:
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits))
    expected = warped.softmax(dim=-1)[0]
    count = 5_000
    sampling = Sampling(temperature, top_p)
    draws = sampling.choose(logits.expand(count, -1), [sampling.generator("row")] * count)
    found = draws.bincount(minlength=12) / count
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)  # 4 standard deviations at most


@pytest.mark.parametrize("temperature", [1e-50, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    """The coldest takes the likeliest token, the hottest any."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(500, -1) * 1e4
    sampling = Sampling(temperature)
    draws = sampling.choose(logits, [sampling.generator("row")] * 500)
    assert len(draws.unique()) == 1 if temperature < 1 else len(draws.unique()) > 40
    assert temperature > 1 or draws[0] == logits[0].argmax()


@pytest.mark.parametrize(("temperature", "top_p"), [(-0.1, 0.9), (0.7, 0.0), (0.7, 1.1), (math.nan, 1), (math.inf, 1)])
def test_wrong_sampling_settings_are_refused(temperature: float, top_p: float) -> None:
    with pytest.raises(ConfigError, match="expected a finite temperature of at least 0 and 0 < top-p <= 1"):
        Sampling(temperature, top_p)


def test_the_terminal_shows_text_and_a_mark_for_each_latent(
    model: str, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder, encoder = load(model)
    shown = set()
    for _, question in list(read_questions(questions))[:8]:
        (row,) = decoder.generate(collate([encoder.prompt(question)], align_latents=True))
        assert answer(decoder, encoder, question) == (row.ids[-1] == decoder.ids.im_end)
        printed = capsys.readouterr().out
        assert printed.count(LATENT_MARK) == len(row.latents)
        assert printed.replace(LATENT_MARK, "").strip() == encoder.text_of(row.ids).strip()
        shown.add(len(row.latents))
    assert len(shown) > 1


def test_a_model_without_latent_settings_needs_the_latent_size(model: str) -> None:
    with pytest.raises(ConfigError, match=r"has no entry `mirage`.*set --latent-size"):
        load(model, latent_size=None)


def test_a_tokenizer_of_another_model_is_refused(model: str, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    ids = {"pad": 151665, "start": 151666, "end": 151667}
    config["mirage"] = {"latent_size": 4, "stage": "stage2", "system_turn": True, "latent_token_ids": ids}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"the tokenizer has the latent tokens .* config\.json says pad=151665"):
        load(str(tmp_path / "model"))


def test_a_model_of_another_kind_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="the model is a qwen2"):
        load(str(tmp_path), latent_size=None)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7)])
def test_a_model_that_computes_nan_is_named(model: str, questions: Path, sampling: Sampling) -> None:
    """Also where the first token was still fine."""
    decoder, encoder = load(model, sampling=sampling)
    rows = prompts(encoder, questions)[:2]
    steps = decoder.steps(collate(rows, align_latents=True))
    next(steps)
    with torch.no_grad():
        decoder.backbone.hf.lm_head.weight[7] = float("nan")
    with pytest.raises(ConfigError, match=f"logits are not finite .{model}, at {rows[0].key}.*--dtype fp32"):
        next(steps)


@pytest.mark.parametrize(
    ("there", "wanted", "device"),
    [(True, None, "cuda"), (True, "cuda", "cuda"), (True, "cpu", "cpu"), (False, None, "cpu")],
)
def test_the_device(monkeypatch: pytest.MonkeyPatch, there: bool, wanted: str | None, device: str) -> None:
    """DS_ACCELERATOR=cpu keeps decoding off a GPU too, as it does training."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if wanted:
        monkeypatch.setenv("DS_ACCELERATOR", wanted)
    assert choose_device() == device
