"""The reader of the documents' code blocks: no command can hide from tests/docs/test_blocks.py."""

from pathlib import Path

import pytest
from markdown_blocks import Block, BlockError, blocks


def read(folder: Path, text: str) -> list[Block]:
    (folder / "page.md").write_text(text)
    return blocks(folder / "page.md", root=folder)


def test_blocks_with_their_places_and_headings(tmp_path: Path) -> None:
    text = "# A\n\n```bash\none \\\n  two\n```\n## B\n~~~~python\n```bash\n~~~~\n### C\n````json\n{}\n````\n"
    assert read(tmp_path, text) == [
        Block("page.md", 3, "bash", "one \\\n  two\n", "A"),
        Block("page.md", 8, "python", "```bash\n", "A / B"),
        Block("page.md", 12, "json", "{}\n", "A / B / C"),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1. first\n\n   ```bash\n   run me\n   ```\n", 3),
        ("- a\n  - b\n    ~~~bash\n    run me\n    ~~~\n", 3),
        ("> quoted\n> ```bash\n> run me\n> ```\n", 2),
        ("  ```bash\n  run me\n  ```\n", 1),
        ("text\n```bash\nrun me\n", 2),
    ],
    ids=["in a list", "in a list in a list", "quoted", "indented", "not closed"],
)
def test_blocks_inside_of_something(tmp_path: Path, text: str, line: int) -> None:
    assert [(block.line, block.language, block.text) for block in read(tmp_path, text)] == [(line, "bash", "run me\n")]


def test_remarks_belong_to_the_next_block_alone(tmp_path: Path) -> None:
    text = (
        "<!-- not run: needs a GPU -->\n```bash\na\n```\n```bash\nb\n```\n"
        "- c\n\n  <!-- run by: tests/x.py -->\n\n  ```bash\n  c\n  ```\n<!-- table: begin -->\n```bash\nd\n```\n"
    )
    found = {block.text.strip(): (block.not_run, block.run_by) for block in read(tmp_path, text)}
    assert found == {"a": ("needs a GPU", ""), "b": ("", ""), "c": ("", "tests/x.py"), "d": ("", "")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nmirage init\n```\n", "page.md, line 1: a block of ''; name its language"),
        ("```sh\nmirage init\n```\n", "page.md, line 1: a block of 'sh'; name its language"),
        ("```Bash\nmirage init\n```\n", "page.md, line 1: a block of 'Bash'"),
        ("```text\nso:\n  $ mirage init\n```\n", "page.md, line 1: a block of text holds a command"),
        ("```text\nmake demo\n```\n", "page.md, line 1: a block of text holds a command"),
        ("text\n\n    mirage init\n", "page.md, line 3: indented code"),
        ("\n<pre>\nmirage init\n</pre>\n", "page.md, line 2: code in HTML"),
        ("<!-- not run: -->\n```bash\na\n```\n", "page.md, line 1: .* is not understood"),
        ("<!-- not run -->\n```bash\na\n```\n", "page.md, line 1: .* is not understood"),
        ("<!--not run: a reason-->\n```bash\na\n```\n", "page.md, line 1: .* is not understood"),
        ("<!-- not run: a reason -->\nbetween\n```bash\na\n```\n", "page.md, line 2: a remark .* directly before"),
        ("<!-- not run: a reason -->\n<!-- b -->\n```bash\na\n```\n", "page.md, line 2: a remark .* directly before"),
        ("<!-- run by: tests/x.py -->\n", "page.md, at its end: a remark .* directly before"),
    ],
)
def test_what_could_hide_a_command_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BlockError, match=message):
        read(tmp_path, text)
