"""Decodes the questions of a JSONL file and scores the answers."""

from collections.abc import Iterator, Sequence

import torch

from mirage_ds.config import TaskName
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import Sample
from mirage_ds.inference.generate import Decoder
from mirage_ds.inference.questions import TASKS
from mirage_ds.inference.results import Answer


def evaluate(
    decoder: Decoder, encoder: Encoder, rows: Sequence[tuple[str, Sample]], task: TaskName, *, batch_size: int
) -> Iterator[Answer]:
    """Answers and scores rows, `batch_size` at a time, in their order.

    Args:
        rows: file:line and sample of each, from `read_task`.
    """
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = collate([encoder.prompt(sample) for _, sample in part], align_latents=True)
        for (where, sample), row in zip(part, decoder.generate(batch), strict=True):
            text = encoder.text_of(row.ids).strip()
            yield Answer(
                where=where,
                text=text,
                num_tokens=len(row.ids),
                num_latents=len(row.latents),
                num_replaced=row.num_replaced,
                complete=bool(decoder.is_end(torch.tensor(row.ids[-1]))),
                level=level_of(sample),
                scores=TASKS[task](sample, text),
                row=sample.extra,
            )


def level_of(sample: Sample) -> str:
    """The side of a row's map; the row's own `level` if it has no map."""
    map_desc = sample.extra.get("map_desc")
    return str(len(map_desc) if isinstance(map_desc, list) else sample.extra.get("level", "-"))
