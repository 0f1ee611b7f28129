"""`mirage evaluate --latents` against decoding by hand, in every arm; what is counted; `own` is plain decoding."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

import plain_loop
import pytest
import torch
from generated_rows import image_bytes, write_jsonl
from hidden_latents import hide_latents
from talkative import write_questions, write_talkative
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from mirage_ds.cli import app
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample, load_encoder
from mirage_ds.data.rows import Sample, read_questions
from mirage_ds.evaluation.engine import OwnStates
from mirage_ds.evaluation.latents.fed_states import NoisyStates, cycle_of, next_rows
from mirage_ds.inference.feed import Slot
from mirage_ds.inference.generate import Decoder, load_decoder

NUM_ROWS, LATENT_SIZE, MAX_NEW_TOKENS, SEED = 14, 4, 20, 5
CLOSE = 1e-4  # sums in another order could swap two tokens whose logits are closer than this
HEAD_SCALES = {"<|latent_start|>": 3.0, "<|im_end|>": 3.0}
ARMS = ("own", "none", "markers", "zeroed", "mean", "fixed", "noise:0.5", "shuffled", "oracle", "first")
KEYS = [f"{row:09d}" for row in range(NUM_ROWS)]

States = dict[Slot, torch.Tensor]
Replace = Callable[[Slot, torch.Tensor], torch.Tensor | None]  # from the own state; None: it is kept


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
        self.encoder = load_encoder(model, stage="stage1", latent_size=LATENT_SIZE, system_turn=True, cache_dir=None)
        self.model, self.questions, self.latent_end, self.ids = model, questions, latent_end, self.encoder.ids
        self.samples = [sample for _, sample in read_questions(questions, helpers=True)]
        self.prompts = [self.encoder.prompt(sample) for sample in self.samples]
        self.own = [self.decode(prompt, lambda slot, own: None) for prompt in self.prompts]

    @torch.no_grad()
    def decode(
        self, prompt: EncodedSample, replace: Replace, latent_size: int = LATENT_SIZE, forbidden: int | None = None
    ) -> Decoded:
        row, ids = Decoded(), self.ids
        embed = self.hf.get_input_embeddings()
        embeds, positions = embed(prompt.input_ids), prompt.position_ids
        if len(prompt.image_grid_thw):
            values = plain_loop.normalized(vars(prompt))
            images = self.hf.model.get_image_features(values, prompt.image_grid_thw).pooler_output
            embeds[prompt.input_ids == ids.image_pad] = torch.cat(images)
        block, place = -1, None
        while len(row.ids) < MAX_NEW_TOKENS and not {ids.im_end, ids.end_of_text} & set(row.ids):
            inputs = {"inputs_embeds": embeds[None], "position_ids": positions[:, None]}
            hidden = self.hf.model.language_model(**inputs, use_cache=False).last_hidden_state[0, -1]
            logits = self.hf.lm_head(hidden)
            if forbidden is not None:
                logits[forbidden] = -torch.inf
            first, second = logits.topk(2).values
            token = int(logits.argmax())
            ends_here = place == latent_size or (self.latent_end == "model" and token == ids.latent_end)
            assert place == latent_size or first - second > CLOSE, "choose other questions: two tokens are too close"
            if place is not None and ends_here:
                token, place = ids.latent_end, None
            if place is not None:
                slot = Slot(block, place)
                token, row.states[slot] = ids.latent_pad, hidden
                replacement = replace(slot, hidden)
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

    def decode_all(self, arm: str) -> list[Decoded]:
        if arm == "own":
            return self.own
        if arm == "none":
            return [self.decode(prompt, nothing, forbidden=self.ids.latent_start) for prompt in self.prompts]
        if arm == "markers":
            return [self.decode(prompt, nothing, latent_size=0) for prompt in self.prompts]
        replacements: dict[str, Callable[[int], Replace]] = {
            "zeroed": lambda row: lambda slot, own: torch.zeros(len(own)),
            "mean": self.mean,
            "fixed": self.fixed,
            "noise:0.5": lambda row: lambda slot, own: NoisyStates(0.5, SEED)(KEYS[row], slot, own),
            "shuffled": self.shuffled,
            "oracle": self.oracle,
            "first": self.first,
        }
        return [self.decode(prompt, replacements[arm](row)) for row, prompt in enumerate(self.prompts)]

    def shuffled(self, row: int) -> Replace:
        following = {int(key): int(after) for key, after in next_rows(KEYS, SEED).items()}

        def replace(slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
            other = following[row]
            while slot not in self.own[other].states and other != row:
                other = following[other]
            return None if other == row else self.own[other].states[slot]

        return replace

    def mean(self, row: int) -> Replace:
        def replace(slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
            made = [one.states[slot].tolist() for one in self.own if slot in one.states]
            return torch.tensor([sum(column) / len(made) for column in zip(*made, strict=True)]) if made else None

        return replace

    def fixed(self, row: int) -> Replace:
        others = [int(key) for key in cycle_of(KEYS, SEED) if int(key) != row]
        state = next(self.own[other].states[Slot(0, 0)] for other in others if Slot(0, 0) in self.own[other].states)
        return lambda slot, own: state

    def oracle(self, row: int) -> Replace:
        """By pooling that is written another way, of patches that transformers' own tower encodes."""
        encoded = self.encoder(self.samples[row])
        targets = []
        if len(encoded.image_grid_thw_latent):
            targets = plain_loop.targets(self.hf, vars(encoded)).detach().split(encoded.latent_sizes)

        def replace(slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
            known = slot.block < len(targets) and slot.place < len(targets[slot.block])
            return targets[slot.block][slot.place] if known else None

        return replace

    def first(self, row: int) -> Replace:
        firsts: list[torch.Tensor] = []

        def replace(slot: Slot, own: torch.Tensor) -> torch.Tensor | None:
            if slot.place == 0:
                firsts.append(own)
            return firsts[-1] if slot.place else None

        return replace


def nothing(slot: Slot, own: torch.Tensor) -> None:
    """Keeps the own state."""


def write_with_helpers(folder: Path) -> Path:
    """Questions of which some have a helper image, some two, and some a K of their own."""
    path = write_questions(folder, NUM_ROWS)
    rows = lines(path)
    for number, row in enumerate(rows):
        names = [f"helper_{number}_{place}.png" for place in range((0, 1, 2, 1)[number % 4])]
        for place, name in enumerate(names):
            (folder / name).write_bytes(image_bytes((84, 56 + 28 * place), seed=50 + number + place))
        row["image_output"] = names
        if len(names) == 2:
            row["text_output"] = "first <output_image> then <output_image>"
        if number % 4 == 3:
            row["latent_size"] = LATENT_SIZE - 1
    return write_jsonl(path, rows)


@pytest.fixture(scope="module", params=["fixed", "model"])
def by_hand(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ByHand:
    folder = tmp_path_factory.mktemp("by_hand")
    model = write_talkative(folder / "talkative", HEAD_SCALES, closes_blocks=request.param == "model")
    return ByHand(str(model), write_with_helpers(folder / "rows"), request.param)


def evaluate(by_hand: ByHand, output: Path, *more: object) -> dict[str, list[dict]]:
    """The lines of the results file, by arm."""
    options = ("--latent-size", LATENT_SIZE, "--latent-end", by_hand.latent_end, "--max-new-tokens", MAX_NEW_TOKENS)
    files = ("--model", by_hand.model, "--data", by_hand.questions, "--output", output)
    arguments = ["evaluate", "--task", "none", "--seed", SEED, *files, *options, *more]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return by_arm(output)


def by_arm(output: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for line in lines(output):
        found.setdefault(line["arm"], []).append(line)
    return found


@pytest.fixture(scope="module")
def output(by_hand: ByHand, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results file of all arms."""
    path = tmp_path_factory.mktemp("evaluated") / "all"
    evaluate(by_hand, path, "--latents", ",".join(ARMS), "--batch-size", 5)
    return path


@pytest.fixture(scope="module")
def evaluated(output: Path) -> dict[str, list[dict]]:
    return by_arm(output)


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
    assert any(
        row.states and not sample.helper_images for row, sample in zip(by_hand.own, by_hand.samples, strict=True)
    )


@pytest.mark.parametrize("arm", ARMS)
def test_against_decoding_by_hand(arm: str, by_hand: ByHand, evaluated: dict[str, list[dict]]) -> None:
    """The same text in every row, and the same numbers of tokens, latents and replacements."""
    rows, found = by_hand.decode_all(arm), evaluated[arm]
    assert [line["number"] for line in found] == list(range(NUM_ROWS))
    assert [line["text"] for line in found] == [by_hand.encoder.text_of(row.ids).strip() for row in rows]
    assert [line["num_tokens"] for line in found] == [len(row.ids) for row in rows]
    assert [line["num_blocks"] for line in found] == [row.ids.count(by_hand.ids.latent_start) for row in rows]
    assert [line["num_latents"] for line in found] == [len(row.states) for row in rows]
    assert [line["num_replaced"] for line in found] == [row.num_replaced for row in rows]
    changes_nothing = ("own", "first") if by_hand.latent_end == "fixed" else ("own",)  # this model's states are alike
    assert arm in changes_nothing or [row.ids for row in rows] != [row.ids for row in by_hand.own]
    replaced, kept = sum(row.num_replaced for row in rows), sum(len(row.states) - row.num_replaced for row in rows)
    assert (replaced > 0) == (arm not in ("own", "none", "markers"))
    assert (kept > 0) >= (arm in ("own", "oracle", "first"))


def test_without_states(evaluated: dict[str, list[dict]]) -> None:
    """Without a block no row opens one; with empty ones, rows do."""
    assert [line["num_blocks"] for line in evaluated["none"]] == [0] * NUM_ROWS
    assert [line["num_latents"] for line in evaluated["markers"]] == [0] * NUM_ROWS
    assert any(line["num_blocks"] for line in evaluated["markers"])


def test_the_summary_has_the_latents_health(by_hand: ByHand, output: Path) -> None:
    """Of the arm `own`: rows by slot, the cosine between rows, and with their targets."""
    health = json.loads(Path(f"{output}.summary.json").read_text())["health"]
    made = {
        f"{slot.block}.{slot.place}": {
            row: each.states[slot] for row, each in enumerate(by_hand.own) if slot in each.states
        }
        for slot in sorted({slot for row in by_hand.own for slot in row.states})
    }
    assert health["slots"] == list(made)
    assert health["num_rows"] == list(map(len, made.values()))
    opened = [row for row in by_hand.own if by_hand.ids.latent_start in row.ids]
    assert health["opened"] == len(opened) / NUM_ROWS
    pairs = [torch.cosine_similarity(one, other, dim=0) for one, other in permutations(made["0.0"].values(), 2)]
    assert health["row_cosines"][0] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    to_targets = [
        torch.cosine_similarity(state, target, dim=0)
        for row, state in made["0.0"].items()
        if (target := by_hand.oracle(row)(Slot(0, 0), state)) is not None
    ]
    assert health["target_cosines"][0] == pytest.approx(torch.stack(to_targets).mean().item(), abs=1e-5)


def test_answers_do_not_depend_on_the_batch_size(
    by_hand: ByHand, evaluated: dict[str, list[dict]], tmp_path: Path
) -> None:
    arms = ("own", "noise:0.5", "shuffled", "first")
    again = evaluate(by_hand, tmp_path / "again", "--latents", ",".join(arms), "--batch-size", 2)
    assert again == {arm: evaluated[arm] for arm in arms}


def decoder_of(by_hand: ByHand) -> Decoder:
    decoder, _ = load_decoder(
        by_hand.model,
        latent_size=LATENT_SIZE,
        latent_end=by_hand.latent_end,
        max_new_tokens=MAX_NEW_TOKENS,
        dtype=torch.float32,
    )
    return decoder


def test_own_is_plain_decoding(by_hand: ByHand) -> None:
    """Bit for bit: recording the states changes nothing, and what is recorded is what was fed."""
    decoder, own = decoder_of(by_hand), OwnStates()
    batch = collate(by_hand.prompts, align_latents=True)
    plain, recorded = decoder.generate(batch), replace(decoder, feed=own).generate(batch)
    assert any(row.latents for row in plain)
    for key, one, other in zip(KEYS, plain, recorded, strict=True):
        states = list(own.by_row.get(key, {}).values())
        assert one.ids == other.ids
        assert other.num_replaced == 0
        assert [state.tolist() for state in one.latents] == [state.tolist() for state in other.latents]
        assert [state.tolist() for state in one.latents] == [state.tolist() for state in states]


def test_hidden_latents_change_no_answer(by_hand: ByHand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No later column attends to a latent. Blocks have a fixed length, or a state would decide where its block ends."""
    arms = [arm for arm in ARMS if arm not in ("none", "markers")]
    load = load_decoder

    def load_hiding(*arguments: object, **options: object) -> tuple:
        decoder, encoder = load(*arguments, **options)
        return hide_latents(decoder), encoder

    monkeypatch.setattr("mirage_ds.inference.generate.load_decoder", load_hiding)
    hidden = evaluate(by_hand, tmp_path / "hidden", "--latents", ",".join(arms), "--latent-end", "fixed")
    assert sum(line["num_latents"] for line in hidden["own"]) > 0
    for arm in arms:
        assert [line["text"] for line in hidden[arm]] == [line["text"] for line in hidden["own"]], arm


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
    decoder, encoder = load_decoder(
        str(write_talkative(tmp_path / "talkative", HEAD_SCALES)), latent_size=3, max_new_tokens=40, dtype=torch.float32
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


@pytest.mark.parametrize("latents", ["shuffled", "mean", "fed"])
def test_one_question_has_no_other_rows(latents: str) -> None:
    result = CliRunner().invoke(app, ["generate", "--model", "some/model", "--prompt", "?", "--latents", latents])
    assert result.exit_code == 2
    assert all(f"'{name}'" in result.output for name in ("own", "none", "markers", "zeroed"))


@pytest.mark.parametrize("latents", ["own", "none", "markers", "zeroed"])
def test_one_question(latents: str, by_hand: ByHand) -> None:
    """`mirage generate` prints a mark per latent."""
    prompt = next(
        s.text_input for s, row in zip(by_hand.samples, by_hand.own, strict=True) if row.states and not s.input_images
    )
    options = ["--latent-size", LATENT_SIZE, "--max-new-tokens", MAX_NEW_TOKENS, "--latent-end", by_hand.latent_end]
    arguments = ["generate", "--model", by_hand.model, "--prompt", prompt, "--latents", latents, *options]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    row = Sample(KEYS[0], prompt, "")
    (expected,) = [self_decoded(by_hand, row, latents)]
    assert result.stdout.count("\N{BLACK SMALL SQUARE}") == len(expected.states)


def self_decoded(by_hand: ByHand, sample: Sample, latents: str) -> Decoded:
    prompt = by_hand.encoder.prompt(sample)
    if latents == "none":
        return by_hand.decode(prompt, nothing, forbidden=by_hand.ids.latent_start)
    zeros = (lambda slot, own: torch.zeros(len(own))) if latents == "zeroed" else nothing
    return by_hand.decode(prompt, zeros, latent_size=0 if latents == "markers" else LATENT_SIZE)
