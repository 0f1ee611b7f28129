"""docs/versions.md, from the results of the cells that matrix.py stored."""

import re
from typing import Any

LOSS_TOLERANCE = 1e-5  # relative; the losses of a cell against those of the first
INTRODUCTION = """\
# Versions

This page says which versions of Python, torch, DeepSpeed and transformers were run, and what failed. `make versions` \
writes it (`tests/versions/matrix.py`); do not edit it. The first row of the table is `constraints.txt`, the exact set \
that `make install` installs. The other rows change one of its versions, but for two: the oldest and the newest of all.

Each row was installed into an environment of its own, and run without a GPU ({machines}). A torch without \
`+cpu` in its version is a build for CUDA, and ran on the CPU, too. What was run:

- **Parity**: the model against the reference's numbers, both stages, with and without activation checkpointing \
(`tests/parity/test_model.py`), and transformers' own positions of image tokens against ours. The number of tests.
- **Decoding**: ids and latents against the reference's (`tests/parity/test_generate.py`). In rows with more than 7, \
an exported folder's own decoding against ours, too (`tests/unit/hf/test_self_decoding.py`). The number of tests.
- **Two ranks**: training of each stage for a few steps under ZeRO-3, from shards to a checkpoint from which stage 2 \
starts (`tests/versions/smoke.py`). The largest relative difference between its losses and those of the first row; at \
most {tolerance:.0e} passes.

`setup.cfg` requires versions of rows in which everything passed. `KNOWN_BAD` in `mirage_ds/versions.py` says which \
versions compute something wrong, and what; DeepSpeed before 0.19.8 does so only now and then \
([results](results.md#2026-11-26-deepspeed-before-0198-on-cpu-ranks)).

To run the matrix again, remove `.versions/`, where the results of the rows are stored; a row that has a result is not \
run again. The interpreters must be on the PATH.

<!-- not run: minutes for each row, and gigabytes of packages -->
```bash
make versions
```
"""
EXPORTED = """\
## An exported folder in plain transformers

Run by hand, not by `make versions`: environments with torch, transformers, Pillow and what they need, without \
mirage_ds, offline (x86_64, 2 CPU cores, Python 3.11, 2026-11-27, commit 6f06a0e). 32 prompts with no, one or two \
images in float32, by `tests/versions/plain_decode.py` in three settings: blocks of K states; blocks that the model \
ends, with images hidden; draws with a seed. The columns: answers whose ids are those of `mirage generate` in all \
settings, and answers of `type(model).generate`, as text, whose ids are those of transformers 5.23.0.

| transformers | torch | batched | one by one | as text |
| --- | --- | ---: | ---: | ---: |
| 5.24.0 | 2.13.0+cpu | 32 of 32 | 32 of 32 | 32 of 32 |
| 5.23.0 | 2.14.1+cu130 | 32 of 32 | 32 of 32 | 32 of 32 |
| 5.16.1 | 2.13.0+cpu | 32 of 32 | 32 of 32 | 32 of 32 |
| 5.5.4 | 2.13.0+cpu | 32 of 32 | 32 of 32 | 32 of 32 |
| 4.57.6 | 2.13.0+cpu | 32 of 32 | 32 of 32 | 32 of 32 |

With 5.23.0 there was torchvision 0.29.1, and AutoProcessor made the same prompts ([use](use.md#what-was-run)). 4.57.6 \
is no version that mirage_ds itself runs with.
"""
COLUMNS = ("Python", "torch", "DeepSpeed", "transformers", "tokenizers", "huggingface_hub")
CHECKS = ("parity", "decoding", "two ranks")


def page(results: list[dict[str, Any]], missing: list[dict[str, Any]]) -> str:
    """The page in Markdown. The first result is the one that the losses of the others are compared with.

    `missing` are the cells without a result.
    """
    machines = "; ".join(dict.fromkeys(result["machine"] for result in results))
    lines = [
        INTRODUCTION.format(machines=machines, tolerance=LOSS_TOLERANCE),
        EXPORTED,
        "## Results",
        "",
        "| " + " | ".join((*COLUMNS, *CHECKS, "date", "commit")) + " |",
        "| --- " * len(COLUMNS) + "| ---: " * len(CHECKS) + "| --- | --- |",
    ]
    failures = []
    for result in results:
        reasons = {check: failure(check, result, results[0]) for check in CHECKS}
        shown = ["**failed**" if reasons[check] else number(check, result, results[0]) for check in CHECKS]
        lines.append("| " + " | ".join([*versions(result), *shown, result["date"], result["commit"]]) + " |")
        for reason in dict.fromkeys(filter(None, reasons.values())):
            failed = " and ".join(check for check in CHECKS if reasons[check] == reason)
            failures.append(f"- {describe(result['cell'])}; {failed}: {code(reason)}")
    lines += ["", "## What failed", "", *(failures or ["Nothing."]), ""]
    if missing:
        lines += ["## What has not run yet", "", *(f"- {describe(cell)}" for cell in missing), ""]
    return "\n".join(lines)


def versions(result: dict[str, Any]) -> list[str]:
    """What was installed, in the order of COLUMNS; what was wanted, if it could not be."""
    found = result["cell"] | result["installed"]
    return [found.get(column.lower(), "") for column in COLUMNS]


def describe(cell: dict[str, str]) -> str:
    """The versions that the matrix varies, in words."""
    return ", ".join(f"{column} {version}" for column, version in zip(COLUMNS, cell.values(), strict=False))


def failure(check: str, result: dict[str, Any], first: dict[str, Any]) -> str:
    """Why a check failed; empty if it passed."""
    reason: str = result["checks"][check]["reason"]
    if reason or check != "two ranks":
        return reason
    if "losses" not in first["checks"][check]:
        return "the first row has no losses to compare with"
    deviation = worst_deviation(result, first)
    if deviation <= LOSS_TOLERANCE:
        return ""
    return f"a loss deviates by {deviation:.1e} of the first row's, and at most {LOSS_TOLERANCE:.0e} is allowed"


def number(check: str, result: dict[str, Any], first: dict[str, Any]) -> str:
    """What the table shows for a check that passed."""
    return f"{worst_deviation(result, first):.1e}" if check == "two ranks" else str(result["checks"][check]["passed"])


def worst_deviation(result: dict[str, Any], first: dict[str, Any]) -> float:
    """The largest relative deviation of a loss, over all stages and steps; infinite if there is a NaN."""
    ours, theirs = (entry["checks"]["two ranks"]["losses"] for entry in (result, first))
    pairs = [pair for stage in theirs for pair in zip(ours[stage], theirs[stage], strict=True)]
    deviations = [abs(loss - expected) / abs(expected) for loss, expected in pairs]
    return max(deviations) if all(deviation == deviation for deviation in deviations) else float("inf")


def code(reason: str) -> str:
    """An error as code; of a path, which would be the environment's, only the file's name."""
    return f"`{re.sub(r'(/[^/ ]+)+/(?=[^/ ])', '', reason)}`"
