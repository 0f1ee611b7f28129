"""From an evaluation to what the page shows of it."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mirage_ds.data.images import decode
from mirage_ds.data.spread import spread
from mirage_ds.data.turns import as_text
from mirage_ds.evaluation.answers import Answer, Row
from mirage_ds.evaluation.engine import Engine
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.evaluation.latents.health import MAX_SAMPLED, LatentHealth
from mirage_ds.evaluation.latents.heat import heat_maps, overlay
from mirage_ds.evaluation.latents.states import States
from mirage_ds.evaluation.rates import (
    Difference,
    differ,
    difference,
    num_cut_off,
    num_invalid,
    rate_of,
    success_rates,
    ways_of,
)
from mirage_ds.evaluation.report.contents import (
    ArmResult,
    Contents,
    Estimate,
    Health,
    Measure,
    Picture,
    Piece,
    Reply,
    RowView,
    Verdict,
)
from mirage_ds.evaluation.report.pictures import HEAT_SIDE_PX, picture
from mirage_ds.evaluation.report.pieces import changed_pieces, own_pieces
from mirage_ds.evaluation.scoring import Task
from mirage_ds.evaluation.tables import Figures, chance_level, warnings_of

# By an arm's name, without the factor of the noise.
MEANINGS = {
    OWN: "the model's own states",
    "none": "no block: its start is forbidden",
    "markers": "a block without a state in it",
    "zeroed": "zeros, which it never saw in training",
    "mean": "the mean state of all rows, slot by slot",
    "fixed": "one state of one row, at every latent of all others",
    "noise": "own states with noise added",
    "shuffled": "the states of another row",
    "oracle": "the pooled patches of the true helper image",
    "first": "the first state of the block, repeated",
    "image:gray": "own states; input images are gray",
    "image:other": "own states; input images of another row",
    "image:none": "own states; no input image",
}


def contents_of(
    engine: Engine,
    answers: Mapping[str, Sequence[Answer]],
    states: States,
    num_shown: int,
    *,
    model: str,
    data: str,
    task: Task,
    facts: Mapping[str, str],
) -> Contents:
    """All that the page shows of an evaluation.

    Args:
        answers: of each arm, in the order of the rows.
        states: the own states of the rows.
        num_shown: rows that are shown, spread evenly.
        facts: settings and versions.
    """
    rows, decoder, encoder = engine.rows, engine.decoder, engine.encoder
    turned = encoder.helper_facts()["exif_orientation"]
    shown = []
    for number in spread(len(rows), num_shown):
        row = rows[number]
        slots = states.slots(row.sample.key)
        made = [state for slot in slots if (state := states.at(row.sample.key, slot)) is not None]
        cosines = heat_maps(decoder, encoder, row.sample, made)
        names = [f"{slot.block}.{slot.place}" for slot in slots]
        replies = {name: arm[number] for name, arm in answers.items()}
        shown.append(row_view(row, replies, names, cosines, exif_orientation=turned))
    return Contents(
        model=model,
        data=data,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        task=task.name,
        way=next(iter(ways_of(answers[OWN])), ""),
        num_rows=len(rows),
        facts=facts,
        arms=arm_results(answers, task),
        has_invalid=task.has_invalid,
        chance_level=chance_level(answers[OWN]),
        warnings=warnings_of(answers),
        health=health_view(engine.health(states, answers[OWN])),
        rows=shown,
    )


def arm_results(answers: Mapping[str, Sequence[Answer]], task: Task) -> list[ArmResult]:
    """The lines of the replacement test, from the answers of each arm to the same rows in the same order."""
    own = answers[OWN]
    figures = Figures(answer for arm in answers.values() for answer in arm)
    ways = ways_of(own)
    results = []
    for name, arm in answers.items():
        scored = bool(ways_of(arm))
        results.append(
            ArmResult(
                name=name,
                meaning=MEANINGS[name.partition(":")[0] if name.startswith("noise") else name],
                num_answers=len(arm),
                invalid=_invalid(arm) if task.has_invalid else "",
                num_cut_off=num_cut_off(arm),
                num_with_block=sum(answer.num_blocks > 0 for answer in arm),
                success=figures.rate(success_rates(arm)[ways[0]]) if scored else "",
                difference=_minus_own(difference(arm, own), figures) if scored and name != OWN else None,
                changed=None if name == OWN else _changed(arm, own),
            )
        )
    return results


def _invalid(arm: Sequence[Answer]) -> str:
    return f"{num_invalid(arm)} of {sum(bool(answer.scores) for answer in arm)}"


def _minus_own(found: Difference, figures: Figures) -> Estimate:
    return Estimate(found.value, found.low, found.high, figures.difference(found))


def _changed(arm: Sequence[Answer], own: Sequence[Answer]) -> Estimate:
    rate = rate_of([float(differ(ours, theirs)) for ours, theirs in zip(arm, own, strict=True)])
    text = f"{rate['rate']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]"
    return Estimate(rate["rate"], rate["low"], rate["high"], text)


def health_view(health: LatentHealth) -> Health:
    """The table of the latent health; columns that are empty are left out."""
    rows, norms, ranks = health.num_rows, health.norms, health.effective_ranks
    measures = [
        Measure("rows", "Answers that have a state in this slot.", rows, 0, max(rows, default=1)),
        Measure(
            "norm",
            "Mean length of the states over that of the token embeddings. At 1 the inputs at latents are as long as "
            "all others; another value is no fault in itself.",
            norms,
            0,
            max(norms, default=1),
        ),
        Measure(
            "row cosine",
            "Mean cosine between the states of two rows. At 1 the slot says the same whatever the question. What "
            "trained models had is in docs/results.md of mirage_ds.",
            health.row_cosines,
            0,
            1,
        ),
        Measure(
            "next cosine",
            "Mean cosine between a state and the next one of its block. At 1 the latents of a block repeat each other.",
            health.next_cosines,
            0,
            1,
        ),
        Measure(
            "effective rank",
            "Number of directions in which the states of all rows lie: 1 if all are alike, at most the number of rows "
            "or the size of a state.",
            ranks,
            0,
            min(max(rows, default=1), MAX_SAMPLED),
        ),
        Measure(
            "target cosine",
            "Mean cosine between a state and its latent target, pooled from the row's helper image. Stage 1 trains it "
            "towards 1; a high one does not show that answers use it.",
            health.target_cosines,
            0,
            1,
        ),
    ]
    kept = [measure for measure in measures if any(value is not None for value in measure.values)]
    return Health(health.slots, kept, health.warning() or "")


def row_view(
    row: Row,
    replies: dict[str, Answer],
    slots: Sequence[str],
    cosines: Sequence[NDArray[np.float32]],
    *,
    exif_orientation: bool,
) -> RowView:
    """One row.

    Args:
        replies: the answer of each arm, `own` first.
        slots: of the row's M latents, in order.
        cosines: of each input image the heat maps [M, R, C] of the row's M latents.
    """
    sample = row.sample
    inputs, helpers = (
        [
            decode(data, f"{row.where}, {name} {number}", exif_orientation=exif_orientation)
            for number, data in enumerate(images)
        ]
        for name, images in (("input image", sample.input_images), ("helper image", sample.helper_images))
    )
    own, *others = replies.values()
    return RowView(
        number=row.number + 1,
        where=row.where,
        question=as_text(sample.turns[:-1]),
        expected=sample.text_output.strip(),
        inputs=[picture(image, f"Input image {number}", "input") for number, image in enumerate(inputs, 1)],
        helpers=[picture(image, f"Helper image {number}", "helper") for number, image in enumerate(helpers, 1)],
        heat=_heat(inputs, slots, cosines),
        own=_reply(own, own_pieces(own.text, dict(zip(slots, own.latents_at, strict=True))), own),
        replaced=[_reply(other, changed_pieces(own.text, other.text), own) for other in others],
    )


def _heat(images: Sequence[Image.Image], slots: Sequence[str], cosines: Sequence[NDArray[np.float32]]) -> list[Picture]:
    """By latent, then by image; the colours of a latent reach from its lowest to its highest cosine."""
    pictures = []
    for latent, slot in enumerate(slots if cosines else []):
        maps = [of_image[latent] for of_image in cosines]
        low, high = min(each.min() for each in maps), max(each.max() for each in maps)
        for number, (image, each) in enumerate(zip(images, maps, strict=True), 1):
            place = f"latent {slot}" + (f", image {number}" if len(maps) > 1 else "")
            cosine = f"{each.min():.2f} to {each.max():.2f}"
            alt = f"Heat map of {place}: cosines from {cosine}"
            pictures.append(picture(overlay(image, each, low, high), alt, f"{place}: {cosine}", HEAT_SIDE_PX))
    return pictures


def _reply(answer: Answer, pieces: Sequence[Piece], own: Answer) -> Reply:
    outcome = next(iter(answer.scores.values()), None)
    verdict: Verdict = "unscored" if answer.unscored else ""
    if outcome:
        verdict = "right" if outcome.success == 1 else "wrong" if outcome.success == 0 else "scored"
    status = outcome.status if outcome else answer.unscored
    return Reply(answer.arm, pieces, verdict, status, answer.complete, differ(answer, own))
