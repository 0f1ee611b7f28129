"""Decodes the rows of a file in every arm, on all ranks. What is decoded does not depend on how it is scored.

The rows are cut into batches that do not depend on the number of ranks. A unit of work is one batch in one arm; a rank
does its units alone, and the ranks wait for each other only at the start, where an arm needs the states of all rows,
and at the end.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Answer, Row
from mirage_ds.evaluation.batches import Batch, cut, deal, question_tokens
from mirage_ds.evaluation.latents.arms import OWN, Arm
from mirage_ds.evaluation.latents.health import LatentHealth, health_of, mean_norm
from mirage_ds.evaluation.latents.replacements import Replacements
from mirage_ds.evaluation.latents.states import States
from mirage_ds.evaluation.parts import Decoded, Parts
from mirage_ds.evaluation.ranks import Ranks
from mirage_ds.inference.feed import Slot
from mirage_ds.inference.generate import Decoder, Generation


@dataclass(frozen=True)
class Unit:
    """A batch in an arm: what one rank decodes at a time."""

    arm: Arm
    sample: int  # of the row's answers
    batch: int
    rows: Batch
    cost: int  # tokens of its prompts, with their padding

    @property
    def name(self) -> str:
        return f"{self.arm.name}/{self.sample}/{self.batch}"


@dataclass(frozen=True)
class Engine:
    """The rows of a file, and all that decides their answers."""

    decoder: Decoder
    encoder: Encoder
    rows: Sequence[Row]
    arms: Sequence[Arm]  # `own` first
    batch_size: int
    samples: int = 1
    seed: int = 0

    def run(self, parts: Parts, ranks: Ranks, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Decodes what the parts lack; after it, `parts` has all answers and states, on every rank.

        Args:
            progress: called after each unit with the rows that this rank has decoded, and with those of its share.

        Raises:
            ConfigError: the model computes something that is not finite.
            DataError: this rank does not see what another one has written.
        """
        replacements = Replacements(self.decoder, self.encoder, self.rows, self.seed)
        ranks.wait()  # all files are open, and nobody writes
        complete = ranks.of_first(parts.units())  # a disk that is shared may show another rank something else
        shares = [
            self.share([arm for arm in self.arms if arm.needs_states == needs_states], complete, ranks)
            for needs_states in (False, True)
        ]
        total = sum(len(unit.rows) for share in shares for unit in share)
        done = 0
        for needs_states, share in zip((False, True), shares, strict=True):
            states = parts.states() if needs_states else States({}, parts.state_size)
            for unit in share:
                parts.add(unit.name, self.decode(unit, replacements, states))
                done += len(unit.rows)
                progress(done, total)
            ranks.wait()
            self._check_seen(parts, needs_states)

    def _check_seen(self, parts: Parts, needs_states: bool) -> None:
        """Refuses to continue without what other ranks have written.

        Raises:
            DataError: a disk that is shared does not show it.
        """
        units = {unit.name for arm in self.arms if arm.needs_states <= needs_states for unit in self.units(arm)}
        if missing := units - parts.units():
            raise DataError(
                f"{len(missing)} of {len(units)} batches of answers are not seen by this process ({parts.folder}); "
                "all ranks must see one folder, without delay; write --output, in training run.dir, to a disk that all "
                "nodes share, and start again"
            )

    def share(self, arms: Iterable[Arm], complete: Collection[str], ranks: Ranks) -> list[Unit]:
        """What this rank decodes of these arms: the same split on every rank."""
        units = [unit for arm in arms for unit in self.units(arm) if unit.name not in complete]
        return [units[number] for number in deal([unit.cost for unit in units], ranks.size)[ranks.rank]]

    @cached_property
    def batches(self) -> list[tuple[Batch, int]]:
        """All rows, in batches, each with its cost."""
        lengths = {row.number: question_tokens(row.sample, self.encoder.image_tokens) for row in self.rows}
        batches = cut(self.rows, [lengths[row.number] for row in self.rows], self.batch_size)
        return [(batch, len(batch) * max(lengths[row.number] for row in batch)) for batch in batches]

    def units(self, arm: Arm) -> list[Unit]:
        """All work of an arm."""
        return [
            Unit(arm, sample, number, batch, cost)
            for sample in range(self.samples)
            for number, (batch, cost) in enumerate(self.batches)
        ]

    def decode(self, unit: Unit, replacements: Replacements, states: States) -> list[Decoded]:
        """The answers to the rows of a unit."""
        decoder = replacements.decoder_of(unit.arm, states)
        own = OwnStates()
        if unit.arm.name == OWN and unit.sample == 0:
            decoder = replace(decoder, feed=own)
        prompts = [replacements.prompt(unit.arm, row) for row in unit.rows]
        if unit.sample:  # with a key of its own, an answer has draws of its own
            prompts = [replace(prompt, key=f"{prompt.key}/{unit.sample}") for prompt in prompts]
        generations = decoder.generate(collate(prompts, align_latents=True))
        return [
            Decoded(self.answer(unit, row, generation), row.sample.key, own.by_row.get(row.sample.key, {}))
            for row, generation in zip(unit.rows, generations, strict=True)
        ]

    def rehearse(self) -> tuple[int, int]:
        """Takes the memory of the batch with the longest questions, whose answers reach their limit.

        Returns:
            How many questions it has, and its columns.
        """
        rows, _ = self.batches[0]
        prompts = collate([self.encoder.prompt(row.sample) for row in rows], align_latents=True)
        self.decoder.rehearse(prompts)
        return len(rows), prompts.input_ids.shape[1] + self.decoder.max_new_tokens

    def answer(self, unit: Unit, row: Row, generation: Generation) -> Answer:
        """A row's answer, not scored yet."""
        return Answer(
            number=row.number,
            where=row.where,
            arm=unit.arm.name,
            sample=unit.sample,
            text=self.encoder.text_of(generation.ids).strip(),
            num_tokens=len(generation.ids),
            num_blocks=generation.ids.count(self.decoder.ids.latent_start),
            num_latents=len(generation.latents),
            num_replaced=generation.num_replaced,
            latents_at=self.latents_at(generation.ids),
            complete=bool(self.decoder.is_end(torch.tensor(generation.ids[-1]))),
            row=row.sample.extra,
        )

    def latents_at(self, ids: Sequence[int]) -> list[int]:
        """Of each latent the number of characters of the answer's text before it; those of a block have the same."""
        places, before = [], 0
        for number, token in enumerate(ids):
            if token == self.decoder.ids.latent_start:
                before = len(self.encoder.text_of(ids[:number]).lstrip())
            elif token == self.decoder.ids.latent_pad:
                places.append(before)
        return places

    def health(self, states: States, own: Sequence[Answer]) -> LatentHealth:
        """The health of the own states; with targets where helper images were read."""
        replacements = Replacements(self.decoder, self.encoder, self.rows, self.seed)
        has_targets = any(row.sample.helper_images for row in self.rows)
        embedding_norm = mean_norm(self.decoder.backbone.embed_tokens.weight)
        return health_of(states, own, embedding_norm, replacements.targets if has_targets else None)

    def in_order(self, answers: Sequence[Answer]) -> dict[str, list[Answer]]:
        """Answers by arm; in each, by row, then by sample."""
        return {
            arm.name: sorted(
                (each for each in answers if each.arm == arm.name), key=lambda each: (each.number, each.sample)
            )
            for arm in self.arms
        }


class OwnStates:
    """Feeds every row its own states, and keeps a copy of them on the CPU, in float32."""

    def __init__(self) -> None:
        self.by_row: dict[str, dict[Slot, torch.Tensor]] = {}

    def __call__(self, key: str, slot: Slot, own: torch.Tensor) -> None:
        # Without a copy, a row of [B, D] would keep all of it in memory.
        self.by_row.setdefault(key, {})[slot] = own.to("cpu", torch.float32, copy=True)
