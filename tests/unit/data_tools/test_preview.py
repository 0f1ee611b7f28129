"""`mirage-data preview`: the page read back by html.parser, with rows that try to break out of it."""

import base64
import io
import sys
from pathlib import Path

import pytest
from generated_rows import image_bytes, make_row, write_jsonl, write_rows
from html_page import Page
from PIL import Image

from data_tools import cli
from data_tools.build import build
from data_tools.preview import turn_views
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.hf.preset import write_tiny

ATTACK = "</p></script><script>alert('x')</script><img src=x onerror=alert(1)> & \"quotes\""
NUM_ROWS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("preview")
    rows = [make_row(number) for number in range(NUM_ROWS)]
    write_rows(place / "rows", NUM_ROWS)
    (place / "rows" / "images" / "large.png").write_bytes(image_bytes((960, 640)))
    rows[1] |= {"text_output": f"a<output_image>{ATTACK}<output_image>", "image_output": ["images/1_1.png"] * 2}
    rows[1] |= {"latent_size": [2, 20], "image_input": "images/large.png", "id": ATTACK}
    rows[2] = {"text_input": f"{ATTACK} only text", "text_output": "NEEDLE here"}
    path = write_jsonl(place / "rows" / "rows.jsonl", rows)
    write_tiny(path, place / "model", seed=0)
    build(path, place / "shards", maxcount=4, maxsize=10**9)
    return place


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["mirage-data", "preview", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_page_has_the_rows_and_nothing_of_them_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ("--model", str(place / "model"), "--latent-size", 3)
    assert not run(monkeypatch, place / "shards", "--output", tmp_path / "page.html", *model)
    html = (tmp_path / "page.html").read_text()
    page = Page(html)
    assert not page.problems
    assert page.text.count(ATTACK) == 3
    assert len(page.all("script")) == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "src=x" not in html.replace("&lt;img src=x", "")
    policy = next(each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert len(page.all("article", "row")) == NUM_ROWS
    # Squares: one in the legend; K = 3 of four rows; of row 1 its 2 and as many of its 20 as are drawn.
    assert len(page.all("span", "latent")) == 1 + 4 * 3 + 2 + 16
    assert "block 2: K = 20" in page.text
    images = page.all("img")
    assert len(images) == 2 * 4 + 3
    assert all(image["src"].startswith("data:image/") for image in images)
    assert "Input image 1: 960 x 640, scaled down here" in page.text
    large = next(image for image in images if (image["width"], image["height"]) == ("480", "320"))
    assert Image.open(io.BytesIO(base64.b64decode(large["src"].partition(",")[2]))).size == (480, 320)
    read = SampleReader(load_manifest(place / "shards"))
    encoder = load_encoder(str(place / "model"), stage="stage2", latent_size=3)  # which reads no helper image
    for number in range(NUM_ROWS):
        assert f"{len(encoder(read(number)).input_ids)} tokens: " in page.text


def test_rows_are_chosen_by_number_and_by_text(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def keys(name: str, *options: object) -> list[str]:
        assert not run(monkeypatch, place / "shards", "--output", tmp_path / name, *options)
        return [each["id"] for each in Page((tmp_path / name).read_text()).all("article")]

    assert keys("three", "--rows", 3) == ["row-0", "row-2", "row-4"]
    assert keys("match", "--match", "needle") == ["row-2"]
    assert keys("first", "--match", "then", "--rows", 2) == ["row-0", "row-3"]
    capsys.readouterr()
    assert run(monkeypatch, place / "shards", "--output", tmp_path / "none", "--match", "absent") == 2
    assert "no row has this text (--match absent)" in capsys.readouterr().err
    assert run(monkeypatch, place / "shards", "--output", tmp_path / "match") == 2
    assert f"delete this one first: rm {tmp_path / 'match'}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "match", "three"]


def test_pieces_stand_where_images_and_blocks_do() -> None:
    def of(question: str, answer: str, latent_sizes: list[int]) -> list[list[str]]:
        sample = Sample("", question, answer, (b"",) * 2, (b"",) * len(latent_sizes))
        turns = turn_views(sample, latent_sizes)
        return [[each.text if each.kind == "text" else f"[{each.text}]" for each in turn.pieces] for turn in turns]

    assert of("a<image>b<image>", "a", [4]) == [["a", "[image 1]", "b", "[image 2]"], ["[block 1: K = 4]", "a"]]
    two = ["[block 1: K = 4]", "a", "[block 2: K = 2]"]
    assert of("a", "<output_image>a<output_image>", [4, 2]) == [["[image 1]", "[image 2]", "a"], two]
    assert of("a", "a", [])[1] == ["a"]
