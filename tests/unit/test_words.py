"""Messages, comments, names and documents use the words of the field: resume and not go on, fix and not mend."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("mirage_ds", "launch", "data_tools", "ds_configs", "benchmarks", "docs", "tests")
ENDINGS = (".py", ".sh", ".yaml", ".md", ".cfg", ".toml", "Makefile")
FILES = sorted(path for path in ROOT.iterdir() if path.is_file() and path.name.endswith(ENDINGS))
FILES += sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.name.endswith(ENDINGS))
FILES.remove(Path(__file__))

# What to write instead -> what is not written. A blank also stands for the end of a line, within a comment or a text.
WORDS = {
    "fix, correct": r"mend(s|ed|ing)?",
    "continue, resume, restart": r"(go|goes|going|went|gone) on",
    "again, from scratch": r"anew",
    "silently": r"without a word|in silence",
    "must, should, will": r"shall",
    "complete, intact": r"(is|are|was|were|be|been|written|copied|read|kept|left|stays?) whole"
    r"|whole (checkpoints?|ones?|or not)",
    "account": r"who pays",
}
GAP = r"""(?:[\s#"]|\bf")+"""


def found_in(text: str) -> list[str]:
    """Each banned word with its line and what to write instead."""
    found = []
    for better, words in WORDS.items():
        for match in re.finditer(rf"\b({words.replace(' ', GAP)})\b", text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"line {line}: {re.sub(GAP, ' ', match[0])}; write {better}")
    return found


def test_the_words_of_the_field() -> None:
    found = [f"{path.relative_to(ROOT)}, {problem}" for path in FILES for problem in found_in(path.read_text())]
    assert not found, "\n".join(found)


def test_words_are_found_across_lines() -> None:
    text = 'x = ("a run that goes "\n  f"on")\n# without a\n# word\nMended; a whole\n  checkpoint. Whole, amend, on'
    assert [problem.partition(";")[0] for problem in found_in(text)] == [
        "line 5: Mended",
        "line 1: goes on",
        "line 3: without a word",
        "line 5: whole checkpoint",
    ]
