"""Decodes the rows of a file with plain transformers: as a user who has an exported folder, torch and transformers.

    python tests/versions/plain_decode.py FOLDER ROWS RESULT [OPTIONS]

RESULT gets, as JSON, what each way of calling `generate` emitted for each row. OPTIONS: its arguments, as JSON.
It runs in environments that have neither mirage_ds nor what the tests need; where mirage_ds is installed, importing it
is an error.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText

sys.modules["mirage_ds"] = None  # type: ignore[assignment]
sys.path.insert(0, str(Path(__file__).parents[1]))

from plain_inputs import plain_inputs, read_rows  # noqa: E402


def emitted(answers: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return answers[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def main(folder: str, rows_path: str, result: str, options: str = "{}") -> None:
    rows = read_rows(Path(rows_path))
    inputs = plain_inputs(Path(folder), rows, Path(rows_path).parent)
    settings = {"max_new_tokens": 24} | json.loads(options)
    text = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    trusted = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    named = {"custom_generate": folder, "trust_remote_code": True}
    answers = {
        "loaded": trusted.generate(**inputs, **settings),
        "named": text.generate(**inputs, **settings, **named),
        "untrusted": text.generate(**inputs, max_new_tokens=24),
        "text": type(text).generate(text, **inputs, max_new_tokens=24),
    }
    alone = [plain_inputs(Path(folder), [row], Path(rows_path).parent) for row in rows]
    found = {way: emitted(each, inputs) for way, each in answers.items()}
    found["alone"] = [emitted(trusted.generate(**each, **settings), each)[0] for each in alone]
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    Path(result).write_text(json.dumps({"versions": versions} | found))


if __name__ == "__main__":
    main(*sys.argv[1:])
