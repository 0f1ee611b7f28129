"""What the demo shows at its end: the table, what follows from its numbers, and the picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from rich.table import Table

from mirage_ds.data.images import open_image
from mirage_ds.data.rows import Sample
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.rates import Difference, difference, wilson_interval

LABELS = {
    "untrained": "before training",
    "text": "text baseline",
    "stage1": "stage 1",
    "stage1_oracle": "  with oracle latents",
    "stage2": "stage 1 + stage 2",
    "stage2_shuffled": "  with shuffled latents",
    "stage2_mean": "  with mean latents",
    "stage2_noise": "  with noise added",
    "stage2_zeroed": "  with zeroed latents",
    "stage2_oracle": "  with oracle latents",
}
REPLACED = ("stage2_shuffled", "stage2_mean", "stage2_noise", "stage2_zeroed", "stage2_oracle")


def solved(answer: Answer) -> bool:
    """Whether an answer's moves, strictly parsed, end on the goal of the row's map."""
    return answer.scores["strict"].success == 1


def rate(answers: Sequence[Answer]) -> float:
    """The share of answers that solve their maps."""
    return sum(map(solved, answers)) / len(answers)


def count_malformed(answers: Sequence[Answer]) -> int:
    """Answers without valid moves in a box, or without an end."""
    return sum(answer.scores["strict"].status == "Invalid" or not answer.complete for answer in answers)


def results_table(answers: dict[str, list[Answer]], samples_seen: dict[str, int]) -> Table:
    """A line for each entry of LABELS."""
    num_maps = len(answers["untrained"])
    table = Table(
        title=f"Shortest paths on {num_maps} held-out 3x3 maps",
        caption="malformed: the answer has no valid moves in a box, or does not end",
    )
    for heading in ("model", "solved", "95% interval", "malformed", "samples seen"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, label in LABELS.items():
        low, high = wilson_interval(sum(map(solved, answers[name])), num_maps)
        figures = (f"{rate(answers[name]):.1%}", f"{low:.1%} - {high:.1%}", f"{count_malformed(answers[name])}")
        table.add_row(label, *figures, f"{samples_seen[name]}")
    return table


def conclusions(answers: dict[str, list[Answer]]) -> list[str]:
    """What the numbers say of the latents, in sentences that depend on the numbers; differences are paired by map."""
    own = answers["stage2"]
    from_text, from_shuffled, from_mean, from_noise, from_zeroed, from_oracle = (
        difference(own, answers[name]) for name in ("text", *REPLACED)
    )
    shuffled_minus_zeroed = difference(answers["stage2_shuffled"], answers["stage2_zeroed"])
    in_stage1 = difference(answers["stage1_oracle"], answers["stage1"])
    with_latents = sum(answer.num_latents > 0 for answer in own)
    kept = sum(one.num_latents - one.num_replaced for name in REPLACED for one in answers[name])
    malformed = {name: count_malformed(answers[name]) for name in LABELS}
    content = ("the content helps", "the content harms", "no effect of the content is shown")
    return [
        f"{with_latents} of {len(own)} answers of stage 1 + stage 2 have latents.",
        "Differences over the same maps (the intervals do not cover the variation between training runs):",
        f"- own latents minus text only: {from_text}: "
        + verdict(from_text, "better than text only", "worse than text only", "no difference is shown"),
        f"What the content of the latents is worth ({malformed['stage2']} answers are malformed with own latents, "
        f"{malformed['stage2_shuffled']} with shuffled, {malformed['stage2_mean']} with mean, "
        "and malformed answers count as failed):",
        f"- own minus shuffled latents: {from_shuffled}: " + verdict(from_shuffled, *content),
        f"- own minus mean latents: {from_mean}: " + verdict(from_mean, *content),
        f"How exact they have to be: own minus own with noise: {from_noise}",
        "What zeros do, which the model never saw in training:",
        f"- own minus zeroed latents: {from_zeroed}; {malformed['stage2_zeroed']} answers are malformed with zeros",
        f"- shuffled minus zeroed latents: {shuffled_minus_zeroed}: "
        + verdict(
            shuffled_minus_zeroed,
            "zeroing overstates what the content is worth",
            "zeroing understates what the content is worth",
            "no difference between the two is shown",
        ),
        "What the latents of the true helper image (oracle) would give:",
        f"- stage 1, oracle minus own: {in_stage1}",
        f"- stage 2, which was not trained on them, own minus oracle: {from_oracle}; "
        f"{malformed['stage2_oracle']} answers are malformed",
        *([f"{kept} latents could not be replaced and kept their own states"] if kept else []),
    ]


def verdict(found: Difference, above: str, below: str, unclear: str) -> str:
    """One of three statements, by where the 95 % interval lies: above 0, below 0, or around it."""
    return above if found.low > 0 else below if found.high < 0 else unclear


def draw_picture(samples: list[Sample], answers: dict[str, list[Answer]], path: Path, rows: int = 8) -> None:
    """Map, helper image and the answers of the trained models, side by side."""
    names = [name for name in LABELS if name != "untrained"]
    cell, left, column_width = 84, 200, 235
    picture = Image.new("RGB", (left + column_width * len(names), 30 + (cell + 12) * rows), "white")
    draw = ImageDraw.Draw(picture)
    for column, title in enumerate(["map", "helper"]):
        draw.text((10 + column * (cell + 10), 8), title, fill="black")
    for column, name in enumerate(names):
        draw.text((left + column_width * column, 8), LABELS[name].strip(), fill="black")
    for row, sample in enumerate(samples[:rows]):
        top = 30 + row * (cell + 12)
        for column, data in enumerate([sample.input_images[0], sample.helper_images[0]]):
            image = open_image(data, sample.key).convert("RGB").resize((cell, cell))
            picture.paste(image, (10 + column * (cell + 10), top))
        for column, name in enumerate(names):
            answer = answers[name][row]
            latents = "[latent] " * answer.num_latents
            mark = "solved" if solved(answer) else "failed"
            text = f"{latents.strip()}\n{answer.text.strip()[:34]}\n{mark}"
            color = "darkgreen" if solved(answer) else "firebrick"
            draw.text((left + column_width * column, top + 20), text, fill=color)
    picture.save(path)
