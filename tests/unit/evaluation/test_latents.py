"""`mirage evaluate --latents` against decoding by hand; the permutation of `shuffled`; what is counted and refused."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from generated_rows import write_jsonl
from talkative import write_questions, write_talkative
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from mirage_ds.cli import app
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, load_encoder
from mirage_ds.data.rows import Sample, read_questions
from mirage_ds.errors import DataError
from mirage_ds.evaluation.feeds import MeanStates, OwnStates, ShuffledStates, next_rows
from mirage_ds.inference.feed import Slot
from mirage_ds.inference.generate import Decoder, Generation, load_decoder

NUM_ROWS, LATENT_SIZE, MAX_NEW_TOKENS, SEED = 14, 4, 20, 5
CLOSE = 1e-4  # sums in another order could swap two tokens whose logits are closer than this

States = dict[tuple[int, int], torch.Tensor]  # by (block, place in the block)
Replace = Callable[[tuple[int, int]], torch.Tensor | None]  # None: the row's own state


@dataclass
class Decoded:
    """One row, decoded by hand."""

    ids: list[int] = field(default_factory=list)
    states: States = field(default_factory=dict)  # that the model made, whatever was fed
    num_replaced: int = 0


class ByHand:
    """Plain transformers, one row at a time, everything computed again for every token: no Decoder, batch or cache."""

    def __init__(self, model: str, questions: Path, latent_end: str) -> None:
        self.hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
        encoder = load_encoder(model, stage="stage2", latent_size=LATENT_SIZE, system_turn=True, cache_dir=None)
        self.model, self.questions, self.latent_end, self.ids = model, questions, latent_end, encoder.ids
        self.prompts = [encoder.prompt(sample) for _, sample in read_questions(questions)]
        self.own = [self.decode(prompt, lambda slot: None) for prompt in self.prompts]

    @torch.no_grad()
    def decode(self, prompt: EncodedSample, replace: Replace) -> Decoded:
        row, ids = Decoded(), self.ids
        embed = self.hf.get_input_embeddings()
        embeds, positions = embed(prompt.input_ids), prompt.position_ids
        if len(prompt.image_grid_thw):
            images = self.hf.model.get_image_features(prompt.pixel_values, prompt.image_grid_thw).pooler_output
            embeds[prompt.input_ids == ids.image_pad] = torch.cat(images)
        block, place = -1, None
        while len(row.ids) < MAX_NEW_TOKENS and not {ids.im_end, ids.end_of_text} & set(row.ids):
            inputs = {"inputs_embeds": embeds[None], "position_ids": positions[:, None]}
            hidden = self.hf.model.language_model(**inputs, use_cache=False).last_hidden_state[0, -1]
            first, second = (logits := self.hf.lm_head(hidden)).topk(2).values
            token = int(logits.argmax())
            ends_here = place == LATENT_SIZE or (self.latent_end == "model" and token == ids.latent_end)
            assert place == LATENT_SIZE or first - second > CLOSE, "choose other questions: two tokens are too close"
            if place is not None and ends_here:
                token, place = ids.latent_end, None
            if place is not None:
                token, row.states[block, place] = ids.latent_pad, hidden
                replacement = replace((block, place))
                row.num_replaced += replacement is not None
                following = hidden if replacement is None else replacement
                place += 1
            else:
                following = embed(torch.tensor(token))
                if token == ids.latent_start:
                    block, place = block + 1, 0
            row.ids.append(token)
            embeds = torch.cat([embeds, following[None]])
            positions = torch.cat([positions, positions.max().expand(3, 1) + 1], dim=1)
        return row

    def decode_all(self, latents: str) -> list[Decoded]:
        replacements: dict[str, Callable[[int], Replace]] = {
            "fed": lambda row: lambda slot: None,
            "shuffled": self.shuffled,
            "mean": self.mean,
            "zeroed": lambda row: lambda slot: torch.zeros(self.hf.config.text_config.hidden_size),
        }
        return [self.decode(prompt, replacements[latents](row)) for row, prompt in enumerate(self.prompts)]

    def shuffled(self, row: int) -> Replace:
        following = {int(key): int(after) for key, after in next_rows(keyed(NUM_ROWS), SEED).items()}

        def replace(slot: tuple[int, int]) -> torch.Tensor | None:
            other = following[row]
            while slot not in self.own[other].states and other != row:
                other = following[other]
            return None if other == row else self.own[other].states[slot]

        return replace

    def mean(self, row: int) -> Replace:
        def replace(slot: tuple[int, int]) -> torch.Tensor | None:
            made = [one.states[slot].tolist() for one in self.own if slot in one.states]
            return torch.tensor([sum(column) / len(made) for column in zip(*made, strict=True)]) if made else None

        return replace


@pytest.fixture(scope="module", params=["fixed", "model"])
def by_hand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    folder = tmp_path_factory.mktemp("by_hand")
    head_scales = {"<|latent_start|>": 3.0, "<|im_end|>": 3.0}
    model = write_talkative(folder / "talkative", head_scales, closes_blocks=request.param == "model")
    return ByHand(str(model), write_questions(folder / "rows", NUM_ROWS), request.param)


def keyed(count: int) -> list[tuple[str, Sample]]:
    return [(f"file:{row + 1}", Sample(key=f"{row:09d}", text_input="?", text_output="")) for row in range(count)]


def evaluate(model: str, data: Path, output: Path, *more: object) -> str:
    options = ("--latent-size", LATENT_SIZE, "--max-new-tokens", MAX_NEW_TOKENS, *more)
    arguments = ["evaluate", "--task", "vsp-spatial-planning", "--model", model, "--data", data, "--output", output]
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, *options)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_of_all_kinds(by_hand: ByHand) -> None:
    """Otherwise the next test would say little: rows without a block, with several, and with short ones."""
    sizes = [[sum(block == number for block, _ in row.states) for number in range(4)] for row in by_hand.own]
    assert any(sum(row) == 0 for row in sizes)
    assert sum(sum(row) > 0 for row in sizes) >= 3
    assert any(row[1] > 0 for row in sizes)
    if by_hand.latent_end == "model":
        assert any(0 < row[0] < LATENT_SIZE for row in sizes)


@pytest.mark.parametrize("latents", ["fed", "shuffled", "mean", "zeroed"])
def test_against_decoding_by_hand(
    latents: str, by_hand: ByHand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ids in every row of every pass, and the same numbers of latents and replacements."""
    found: list[Generation] = []
    generate = Decoder.generate

    def spy(*inputs: object) -> list[Generation]:
        rows = generate(*inputs)
        found.extend(rows)
        return rows

    monkeypatch.setattr(Decoder, "generate", spy)
    options = ("--latents", latents, "--seed", SEED, "--latent-end", by_hand.latent_end, "--batch-size", 5)
    printed = evaluate(by_hand.model, by_hand.questions, tmp_path / "results", *options)
    rows = by_hand.decode_all(latents)
    first_pass = by_hand.own if latents in ("shuffled", "mean") else []
    assert [row.ids for row in found] == [row.ids for row in (*first_pass, *rows)]
    assert latents == "fed" or [row.ids for row in rows] != [row.ids for row in by_hand.own]
    records = lines(tmp_path / "results")
    assert [record["num_tokens"] for record in records] == [len(row.ids) for row in rows]
    assert [record["num_latents"] for record in records] == [len(row.states) for row in rows]
    assert [record["num_replaced"] for record in records] == [row.num_replaced for row in rows]
    num_latents, num_replaced = sum(len(row.states) for row in rows), sum(row.num_replaced for row in rows)
    summary = json.loads((tmp_path / "results.summary.json").read_text())
    assert (summary["num_latents"], summary["num_replaced"]) == (num_latents, num_replaced)
    assert (f"{num_replaced} of {num_latents} latents were replaced" in printed) == (latents != "fed")
    assert ("kept the row's own state" in printed) == (latents != "fed" and num_replaced < num_latents)


def test_both_passes_are_reported(by_hand: ByHand, tmp_path: Path) -> None:
    printed = evaluate(by_hand.model, by_hand.questions, tmp_path / "shuffled", "--latents", "shuffled", "--seed", SEED)
    evaluate(by_hand.model, by_hand.questions, tmp_path / "fed")
    shuffled, fed = (json.loads((tmp_path / f"{name}.summary.json").read_text()) for name in ("shuffled", "fed"))
    assert shuffled["settings"]["latents"] == "shuffled"
    assert shuffled["settings"]["seed"] == SEED
    assert shuffled["rates_fed"] == fed["rates"]
    assert set(shuffled["fed_minus_replaced"]) == {"value", "low", "high"}
    assert "rates_fed" not in fed
    for words in (
        "latents fed",
        "latents shuffled",
        "fed minus shuffled (strict): ",
        "95% interval",
        "over the same 14",
    ):
        assert words in printed


def test_answers_do_not_depend_on_the_batch_size(by_hand: ByHand, tmp_path: Path) -> None:
    options = ("--latents", "shuffled", "--latent-end", by_hand.latent_end)
    for size in (1, 16):
        evaluate(by_hand.model, by_hand.questions, tmp_path / f"{size}", *options, "--batch-size", size)
    assert lines(tmp_path / "1") == lines(tmp_path / "16")


@pytest.mark.parametrize("count", [2, 3, 50])
def test_the_permutation_is_one_cycle(count: int) -> None:
    """No row is its own next row, and a walk from any row visits all rows."""
    following = next_rows(keyed(count), seed=3)
    row, visited = "000000000", []
    for _ in range(count):
        row = following[row]
        visited.append(row)
    assert sorted(visited) == sorted(following) == [sample.key for _, sample in keyed(count)]
    assert all(row != after for row, after in following.items())


def test_the_permutation_depends_on_seed_and_number_of_rows_alone() -> None:
    found = [list(map(int, next_rows(keyed(20), seed).values())) for seed in range(5)]
    assert len({tuple(numbers) for numbers in found}) == 5
    renamed = [(where, Sample(key=f"key {sample.key}", text_input="!", text_output="")) for where, sample in keyed(20)]
    numbers = {int(key.split()[1]): int(after.split()[1]) for key, after in next_rows(renamed, 2).items()}
    assert numbers == {int(key): int(after) for key, after in next_rows(keyed(20), 2).items()}


def test_a_slot_that_a_row_lacks_is_taken_from_the_row_after_it() -> None:
    own = OwnStates()
    states = {key: torch.full((2,), float(number)) for number, key in enumerate("abcd")}
    for key in "bd":
        own(key, Slot(0, 0), states[key])
    own("d", Slot(0, 1), states["d"])
    shuffled = ShuffledStates(own, {"a": "b", "b": "c", "c": "d", "d": "a"})
    first = [shuffled(key, Slot(0, 0), states[key]) for key in "abcd"]
    assert [state[0].item() for state in first] == [1, 3, 3, 1]
    second = [shuffled(key, Slot(0, 1), states[key]) for key in "abcd"]
    assert [None if state is None else state[0].item() for state in second] == [3, 3, 3, None]
    mean = MeanStates(own)
    assert [mean(key, Slot(0, 0), states[key])[0].item() for key in "abcd"] == [2] * 4
    assert mean("a", Slot(1, 0), states["a"]) is None


def test_recorded_states_are_small_copies() -> None:
    """A view would keep the states of a whole batch in memory."""
    own, batch = OwnStates(), torch.randn(50, 8, dtype=torch.bfloat16)
    assert own("row", Slot(0, 0), batch[3]) is None
    state = own.by_row["row"][Slot(0, 0)]
    assert state.dtype == torch.float32
    assert state.untyped_storage().nbytes() == 8 * 4
    assert torch.equal(state.bfloat16(), batch[3])


def test_a_row_that_has_ended_makes_no_states(tmp_path: Path) -> None:
    """Its batch decodes on, and the row with it, perhaps into new blocks: they are not part of its answer."""
    head_scales = {"<|latent_start|>": 3.0, "<|im_end|>": 3.0}
    decoder, encoder = load_decoder(
        str(write_talkative(tmp_path / "talkative", head_scales)), latent_size=3, max_new_tokens=40, dtype=torch.float32
    )
    decoder.feed = own = OwnStates()
    prompts = [encoder.prompt(sample) for _, sample in read_questions(write_questions(tmp_path / "rows", 32))]
    in_a_block = []
    choose = decoder.next_tokens

    def spy(chosen: torch.Tensor, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        emitted, steps = choose(chosen, steps)
        in_a_block.append(steps > 0)
        return emitted, steps

    decoder.next_tokens = spy
    rows = decoder.generate(collate(prompts, align_latents=True))
    inside = torch.stack(in_a_block).sum(dim=0).tolist()
    assert any(steps > len(row.latents) for steps, row in zip(inside, rows, strict=True)), "no row opened one"
    found = [len(own.by_row.get(prompt.key, {})) for prompt in prompts]
    assert found == [len(row.latents) for row in rows]


def test_one_row_has_no_other_latents(tmp_path: Path) -> None:
    """Refused before a model is loaded or anything is written."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "?", "map_desc": [[1, 0], [0, 2]]}])
    with pytest.raises(DataError, match=r"only 1 row \(.*rows\.jsonl:1\).*--latents shuffled.*at least 2 rows"):
        evaluate("some/model", data, tmp_path / "results", "--latents", "shuffled")
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("latents", ["shuffled", "mean"])
def test_one_question_has_no_other_rows(latents: str) -> None:
    result = CliRunner().invoke(app, ["generate", "--model", "some/model", "--prompt", "?", "--latents", latents])
    assert result.exit_code == 2
    assert re.search(r"'fed',\W+'zeroed'", result.output)
