"""The report's page, from made-up contents: read back by html.parser, which knows nothing of the templates."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from html_page import Page
from PIL import Image
from written_answers import answers

from mirage_ds.evaluation.latents.arms import parse_arms
from mirage_ds.evaluation.latents.health import LatentHealth, SlotHealth
from mirage_ds.evaluation.latents.heat import overlay
from mirage_ds.evaluation.report.contents import ArmResult, Contents, Estimate, Health, Measure, Piece, Reply, RowView
from mirage_ds.evaluation.report.page import reading, render
from mirage_ds.evaluation.report.pictures import HEAT_SIDE_PX, picture
from mirage_ds.evaluation.report.pieces import changed_pieces, own_pieces
from mirage_ds.evaluation.report.view import arm_results, health_view
from mirage_ds.evaluation.scoring import load_task
from mirage_ds.inference.feed import Slot

ATTACK = '<script>alert("x")</script> & "quotes" \'too\''


def image(size: tuple[int, int] = (84, 56)) -> Image.Image:
    return Image.new("RGB", size, "teal")


def reply(arm: str, *pieces: Piece, changed: bool = True) -> Reply:
    return Reply(arm, pieces, "wrong", "Fell in hole", complete=arm != "zeroed", changed=changed)


def row(number: int, question: str = "Where is the goal?") -> RowView:
    heat = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    return RowView(
        number=number,
        where=f"rows.jsonl:{number + 1}",
        question=question,
        expected="\\boxed{LEFT}",
        inputs=[picture(image(), "Input image 1")],
        helpers=[picture(image(), "Helper image 1")],
        heat=[
            picture(overlay(image(), heat, -1, 1), f"Latent {latent}", "-1.00 to 1.00", HEAT_SIDE_PX)
            for latent in (1, 2)
        ],
        own=Reply("own", [Piece("latent", "latent 1"), Piece("same", f"so {ATTACK}")], "right", "Goal", True, False),
        replaced=[
            reply("mean", Piece("same", "so"), Piece("added", "new"), Piece("removed", "old")),
            reply("zeroed", changed=False),
            reply("first", Piece("same", "the"), Piece("added", "said"), changed=False),
        ],
    )


def contents(**changes: object) -> Contents:
    measures = [
        Measure("rows", "answers with a state", [90, 89], 0, 90),
        Measure("norm", "as long as an embedding: near 1", [1.25, None], 0, 2),
    ]
    made = Contents(
        model="runs/model",
        data="rows.jsonl",
        date="2026-11-26",
        task="exact",
        way="exact",
        num_rows=90,
        facts={"torch": "2.13.0", "seed": "0"},
        arms=[
            ArmResult("own", "the model's own states", 90, "1 of 88", 0, 90, "50% [40, 60]", None, None),
            ArmResult(
                *("mean", "means", 90, "17 of 88", 3, 89, "30% [20, 40]"),
                difference=Estimate(-0.2, -0.4, -0.1, "-20 [-40, -10]"),
                changed=Estimate(0.3, 0.2, 0.4, "30% [20, 40] changed"),
            ),
        ],
        has_invalid=True,
        chance_level="always the most frequent answer: 25.0%",
        warnings=["all answers are alike"],
        health=Health(["0.0", "0.1"], measures, "rows are alike"),
        rows=[row(number, ATTACK) for number in range(20)],
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def html() -> str:
    return render(contents())


def test_every_tag_is_closed_and_ids_are_unique(html: str) -> None:
    page = Page(html)
    assert not page.problems
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    named = {found["aria-labelledby"] for _, found in page.elements if "aria-labelledby" in found}
    assert named | {found["href"].removeprefix("#") for found in page.all("a")} <= set(ids)


def test_nothing_is_loaded(html: str) -> None:
    """Every address is a data: URL or a place in the page, and the page itself forbids all others."""
    page = Page(html)
    addresses = [
        found[name] for _, found in page.elements for name in ("src", "href", "srcset", "data") if name in found
    ]
    assert len(addresses) > 80
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert not re.search(r"url\(|@import|https?:", html)
    assert not page.all("link")
    (policy,) = [found["content"] for found in page.all("meta") if "http-equiv" in found]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_text_of_the_rows_is_text(html: str) -> None:
    page = Page(html)
    assert len(page.all("script")) == 1
    assert page.text.count(ATTACK) == 40  # as question and as answer of each row
    everywhere = contents(
        model=ATTACK, data=ATTACK, facts={ATTACK: ATTACK}, health=Health([], [], ATTACK), rows=[row(0, ATTACK)]
    )
    assert len(Page(render(everywhere)).all("script")) == 1


def test_every_row_is_there(html: str) -> None:
    page = Page(html)
    rows = page.all("details", "row")
    assert [found["id"] for found in rows] == [f"row-{number}" for number in range(20)]
    assert {found["data-changed"] for found in rows} == {"yes"}
    assert "changed by the arm mean" in page.text
    assert page.text.count("the same answer") == 2 * 20  # zeroed and first
    assert page.text.count("the same answer in other words") == len(page.all("ins")) - 1 - 20 == 20  # first
    assert len(page.all("span", "latent")) == 1 + 20
    assert len(page.all("img")) == 20 * (2 + 2)
    assert all(found["alt"] for found in page.all("img"))


def bars(page: Page) -> list[tuple[str, dict[str, str]]]:
    """The text of each bar and its rectangle."""
    labels = [found["aria-label"] for found in page.all("svg", "bar") if "aria-label" in found]
    return list(zip(labels, page.all("rect"), strict=False))


def test_the_replacement_test(html: str) -> None:
    page = Page(html)
    ((text, rectangle),) = bars(page)
    assert text == "-20 [-40, -10]"
    # The axis reaches from -40 to 40 points: the bar from -20 to 0.
    assert (float(rectangle["x"]), float(rectangle["width"])) == (25, 25)
    assert "-20 [-40, -10]: own is better" in page.text
    assert "50% [40, 60]" in page.text
    assert "3 of 90" in page.text
    assert "30% [20, 40] changed" in page.text
    assert "17 of 88" in page.text
    assert "Always the most frequent answer: 25.0%." in page.text
    assert "Warning: all answers are alike" in page.text
    assert "Many of either in an arm" in page.text
    assert {cell["data-label"] for cell in page.all("td") if "data-label" in cell} == {
        *("Success", "Minus own", "Answers that differ from own", "Invalid", "Never ended", "With a block")
    }


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(-0.3, -0.1, "own is better"), (0.1, 0.3, "own is worse"), (-0.1, 0.2, "no difference is shown")],
)
def test_what_an_interval_says(low: float, high: float, words: str) -> None:
    assert reading(Estimate((low + high) / 2, low, high, "")) == words


def test_without_a_task_changes_are_shown() -> None:
    arms = [dataclasses.replace(arm, success="", difference=None) for arm in contents().arms]
    page = Page(render(contents(task="none", way="", arms=arms, has_invalid=False, chance_level="", warnings=[])))
    ((text, rectangle),) = bars(page)
    assert text == "30% [20, 40] changed"
    assert (float(rectangle["x"]), float(rectangle["width"])) == (0, 30)
    for words in ("Success", "nvalid", "most frequent", "Warning: all"):
        assert words not in page.text


def test_every_arm_has_a_meaning_of_its_own() -> None:
    arms = {arm.name: answers("x.x", arm=arm.name) for arm in parse_arms("all", "all")}
    assert len({result.meaning for result in arm_results(arms, load_task("exact"))}) == len(arms) == 13


def test_health(html: str) -> None:
    text = " ".join(Page(html).text.split())
    assert "Warning: rows are alike" in text
    assert " 0.0 90 1.25" in text
    assert " 0.1 89 not defined" in text
    assert "No answer has a latent." in Page(render(contents(health=Health([], [], "")))).text


def test_an_effective_rank_is_short_of_the_number_of_rows() -> None:
    health = LatentHealth(1.0)
    for place, rank in enumerate((1.3, 1.2)):
        health.add(Slot(0, place), SlotHealth(num_rows=24, norm=1.0, row_cosine=0.9, effective_rank=rank))
    view = health_view(health)
    (measure,) = [measure for measure in view.measures if measure.title == "effective rank"]
    assert (measure.low, measure.high) == (0, 24)
    assert view.slots == ["0.0", "0.1"]


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


def test_pictures_are_small_and_keep_their_shape() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8))
    photo, drawing = picture(noise, "a photo"), picture(image(), "a drawing")
    assert (photo.width, photo.height) == decoded(photo.url).size == (480, 360)
    assert (drawing.width, drawing.height) == decoded(drawing.url).size == (84, 56)
    assert photo.url.startswith("data:image/jpeg")
    assert drawing.url.startswith("data:image/png")


def test_a_heat_map_lies_over_its_patches() -> None:
    """Two rows, three columns of patches on 84 x 56 pixels; only the last patch of the first row is high."""
    heat = np.zeros((2, 3), np.float32)
    heat[0, 2] = 0.5
    shown = np.asarray(decoded(picture(overlay(image(), heat, 0, 0.5), "").url).convert("L")).astype(int)
    cells = shown.reshape(2, 28, 3, 28).mean(axis=(1, 3))
    assert cells[0, 2] > 2 * cells.max(initial=0, where=heat == 0)


def text_of(pieces: list[Piece], kinds: set[str]) -> str:
    return "".join(piece.text for piece in pieces if piece.kind in kinds)


def test_latents_stand_where_they_were_decoded() -> None:
    pieces = own_pieces("so and so", {"0.0": 0, "0.1": 0, "1.0": 6, "2.0": 9})
    assert [(piece.kind, piece.text) for piece in pieces] == [
        ("latent", "0.0"),
        ("latent", "0.1"),
        ("same", "so and"),
        ("latent", "1.0"),
        ("same", " so"),
        ("latent", "2.0"),
    ]
    assert own_pieces("", {}) == []


@pytest.mark.parametrize(
    ("old", "new"), [("", "a b"), ("a  b", ""), ("\\boxed{LEFT, UP}", "\\boxed{LEFT, DOWN, UP}"), ("a\nb", "a b c")]
)
def test_changed_pieces_give_both_texts(old: str, new: str) -> None:
    pieces = changed_pieces(old, new)
    assert text_of(pieces, {"same", "removed"}) == old
    assert text_of(pieces, {"same", "added"}) == new


def test_what_changed_is_words() -> None:
    pieces = changed_pieces("\\boxed{LEFT, UP}", "\\boxed{LEFT, DOWN}")
    assert [piece.text for piece in pieces if piece.kind != "same"] == ["UP", "DOWN"]
