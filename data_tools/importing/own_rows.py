"""Rows that are as ours already, in another container, or with their images elsewhere."""

from data_tools.importing.options import Options
from data_tools.importing.source_rows import SourceRow
from data_tools.importing.turns import Row


def mirage(row: SourceRow, _: Options) -> list[Row]:
    """All fields stay; images are copied. A row that has neither answer nor helper image is one for evaluation."""
    if row.fields.get("conversations") is None:
        row.text("text_input")
        if row.fields.get("image_output") is not None or row.fields.get("text_output") is not None:
            row.text("text_output")
    images = {name: row.pictures(name) for name in ("image_input", "image_output") if row.get(name) is not None}
    return [row.kept(*row.fields) | images]
