"""`mirage-launch evaluate` on a cluster: two nodes, requeued in the middle, and the bytes of one process."""

import json
import re
import subprocess
from pathlib import Path

import launching
import pytest
from cluster import wait_until
from runs import START_S, Ground, Run, mirage_launch
from talkative import write_questions, write_talkative

NUM_ROWS, BATCH_SIZE = 60, 2


def num_batches(output: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in Path(f"{output}.parts").glob("rank_*.jsonl"))


@pytest.mark.slow
def test_requeued_and_continued(ground: Ground) -> None:
    folder = ground.folder / "evaluation"
    model = write_talkative(folder / "talkative", {"<|latent_start|>": 3.0, "<|im_end|>": 0.1})
    rows = write_questions(folder / "rows", NUM_ROWS)
    files = ("--model", model, "--data", rows, "--task", "none", "--latents", "shuffled")
    sizes = ("--latent-size", 3, "--max-new-tokens", 60, "--batch-size", BATCH_SIZE)
    options = [str(each) for each in (*files, *sizes)]
    whole, output = folder / "whole", folder / "results"
    mirage = [str(launching.BIN / "mirage"), "evaluate", *options, "--output", str(whole)]
    subprocess.run(mirage, env=launching.environment(), check=True, capture_output=True, timeout=START_S)

    arguments = ("evaluate", "--nodes", "2", "--ranks-per-node", "1", *options, "--output", str(output))
    text = mirage_launch(ground.cluster, folder, *arguments).stdout
    number = re.search(r"^submitted +job (\d+)", text, re.MULTILINE)
    assert number, text
    run, log = Run(ground.cluster, folder, number[1]), Path(f"{output}.jobs") / "1" / "log"

    def details() -> str:
        return f"{run.job}\n{log.read_text()[-4000:] if log.exists() else 'no log'}"

    wait_until(lambda: num_batches(output) >= 4 or run.over, "4 batches", START_S, details)
    again = mirage_launch(ground.cluster, folder, *arguments, code=2).stderr
    assert f"{number[1]} is RUNNING" in " ".join(again.split()), details()
    ground.cluster.run("scancel", "--batch", "--signal=USR1", number[1])  # as before the time limit
    run.wait_for_restart(0)
    wait_until(lambda: run.over, "the end", START_S, details)
    assert run.job["JobState"] == "COMPLETED", details()
    kept = re.search(r"continues: (\d+) of 120 answers are there", log.read_text())
    assert kept, details()
    assert 8 <= int(kept[1]) < 120
    assert output.read_bytes() == whole.read_bytes()
    assert json.loads(Path(f"{output}.summary.json").read_text())["arms"]["shuffled"]["num_answers"] == NUM_ROWS
