"""What the documents name exists: linked pages and headings, the project's files and folders, and tests in them."""

import re
from pathlib import Path

import pytest
from markdown_blocks import ROOT, documents
from markdown_it import MarkdownIt

FOLDERS = ("mirage_ds", "launch", "data_tools", "ds_configs", "benchmarks", "tests", "docs")
FILES = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}
FILES |= {path.name for path in ROOT.glob("*.*")}
# The reference's sources; a file that must not be; one of the user's own.
NOT_OURS = re.compile(r"src/.*|utils\.py|(runs/)?my_file\.py")

pages = pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))


def links(page: Path) -> list[str]:
    """The targets of links and images in a page."""
    spans = [
        child
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text())
        for child in token.children or []
    ]
    return [str(span.attrs.get("href") or span.attrs["src"]) for span in spans if span.type in ("link_open", "image")]


def anchors(page: Path) -> set[str]:
    """What a link may name behind a #, as GitHub makes it of the page's headings."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    titles = [tokens[number + 1].content for number, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong_link(page: Path, link: str) -> str:
    """What is wrong with a relative link; empty if nothing."""
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    if not target.exists():
        return f"{link}: there is no such file"
    return f"{link}: no such heading" if anchor and anchor not in anchors(target) else ""


def wrong_name(name: str) -> str:
    """What is wrong with a word that may name a file or folder of ours, or a test; empty if nothing.

    A path from the root must exist; a Python file, a script or a page may be named by the end of its path.
    """
    name, _, test = name.removeprefix("../").rstrip("./").partition("::")
    if re.search(r"[$*<>{}=~|]|[A-Z]{3,}(?!\w*\.md)", name) or NOT_OURS.fullmatch(name):
        return ""
    if name.partition("/")[0] in FOLDERS and not (ROOT / name).exists():
        return f"{name}: there is no such file or folder"
    if not name.endswith((".py", ".sh", ".md")):
        return ""
    found = [file for file in FILES if f"/{file}".endswith(f"/{name}")]
    if not found:
        return f"{name}: there is no such file"
    if test and not any(re.search(rf"def {test}\b", (ROOT / file).read_text()) for file in found):
        return f"{name}: there is no {test}"
    return ""


@pages
def test_links_lead_somewhere(page: Path) -> None:
    relative = [link for link in links(page) if not re.match(r"[a-z]+:", link)]
    assert not [problem for link in relative if (problem := wrong_link(page, link))]


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    """But for the changelog, which also names what is gone."""
    if page.name != "CHANGELOG.md":
        names = re.findall(r"[^\s`'\"()\[\],;:]+(?:::\w+)?", page.read_text())
        assert not [problem for name in names if (problem := wrong_name(name.partition("#")[0]))]


def test_what_is_missing_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A b: `c`\n[a](page.md#a-b-c) [b](#a-b) [c](gone.md)\n\n| t |\n| - |\n| ![d](gone.png) |\n")
    assert [wrong_link(page, link) for link in links(page)] == [
        "",
        "#a-b: no such heading",
        "gone.md: there is no such file",
        "gone.png: there is no such file",
    ]
    present = ["mirage_ds/data/encode.py", "data/encode.py", "encode.py", "tests/parity/", "launch/recipes/NAME.yaml"]
    present += ["tests/docs/test_links.py::test_what_is_missing_is_noticed", "src/trainer.py", "runs/a/config.yaml"]
    assert not [problem for name in present if (problem := wrong_name(name))]
    for gone in ("mirage_ds/encode.py", "ncode.py", "tests/parties", "launch/recipes/none.yaml", "encode.py::test_x"):
        assert wrong_name(gone)
