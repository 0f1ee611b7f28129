"""The code blocks of the documents, as a CommonMark parser finds them, with what is said about running each.

    <!-- not run: REASON -->            directly before a block: no test runs it, and why
    <!-- run by: tests/FILE.py -->      directly before a block: that file runs it, tests/docs/test_blocks.py does not

Blocks of bash and python without such a line are run as written. What could hide a command from the tests is an error:
a block that names no language or another one, commands in a block of text, indented code, HTML.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
LANGUAGES = ("bash", "python", "text", "json", "yaml")
RUNNABLE = ("bash", "python")
COMMAND = re.compile(
    r"\s*(\$ |(sudo |python3? |mirage|mirage-data|mirage-launch|make|pip|deepspeed|torchrun|pytest|srun|sbatch|scancel|"
    r"scontrol|squeue|sinfo|git|export|tensorboard|ruff|mypy)(\s|$))"
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `page` is relative to the project's root, `line` (from 1) is that of the fence."""

    page: str
    line: int
    language: str
    text: str
    heading: str
    """The headings above it, joined by " / "."""
    not_run: str = ""
    run_by: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"


class BlockError(Exception):
    """A block that the tests could miss."""


def documents() -> list[Path]:
    """README, CONTRIBUTING, CHANGELOG and all of docs/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, root: Path = ROOT) -> list[Block]:
    """All fenced blocks of a page, in their order.

    Raises:
        BlockError: see the top of this file; the message says where.
    """
    name = page.relative_to(root).as_posix()
    try:
        return list(_blocks(name, MarkdownIt("commonmark").parse(page.read_text())))
    except BlockError as error:
        raise BlockError(f"{name}, {error}") from None


def _blocks(page: str, tokens: list[Token]) -> Iterator[Block]:
    headings: list[tuple[int, str]] = []
    remark: dict[str, str] = {}
    for number, token in enumerate(tokens):
        line = token.map[0] + 1 if token.map else 0
        if remark and token.type != "fence":
            raise BlockError(f"line {line}: a remark on running must stand directly before a block")
        if token.type == "heading_open":
            level = int(token.tag[1:])
            headings = [entry for entry in headings if entry[0] < level] + [(level, tokens[number + 1].content)]
        elif token.type == "code_block":
            raise BlockError(f"line {line}: indented code; write a fence that names its language")
        elif token.type == "html_block":
            remark = _remark(token.content, line)
        elif token.type == "fence":
            _check(token, line)
            yield Block(page, line, token.info, token.content, " / ".join(text for _, text in headings), **remark)
            remark = {}
    if remark:
        raise BlockError("at its end: a remark on running must stand directly before a block")


def _remark(html: str, line: int) -> dict[str, str]:
    """What a comment says about the block below it; nothing if it is about something else."""
    if re.search(r"<(pre|code|script)\b", html, re.IGNORECASE):
        raise BlockError(f"line {line}: code in HTML; write a fence that names its language")
    if not re.match(r"\s*<!--\s*(not|run)\b", html, re.IGNORECASE):
        return {}
    match = re.fullmatch(r"<!-- (not run|run by): (\S.*) -->\s*", html)
    if not match:
        raise BlockError(
            f"line {line}: {html.strip()!r} is not understood; write <!-- not run: REASON --> or "
            "<!-- run by: tests/FILE.py -->"
        )
    return {match[1].replace(" ", "_"): match[2]}


def _check(fence: Token, line: int) -> None:
    if fence.info not in LANGUAGES:
        raise BlockError(f"line {line}: a block of {fence.info!r}; name its language, one of {', '.join(LANGUAGES)}")
    if fence.info not in RUNNABLE:
        for text in fence.content.splitlines():
            if COMMAND.match(text):
                raise BlockError(f"line {line}: a block of {fence.info} holds a command ({text.strip()}); write bash")
