"""Rows that are as ours already, in another container, or with their images elsewhere."""

from data_tools.importing.options import Options
from data_tools.importing.source_rows import SourceRow
from data_tools.importing.turns import Row


def mirage(row: SourceRow, _: Options) -> list[Row]:
    """All fields stay; images are copied."""
    if row.fields.get("conversations") is None:
        row.text("text_input"), row.text("text_output")
    images = {name: row.pictures(name) for name in ("image_input", "image_output") if row.get(name) is not None}
    return [row.kept(*row.fields) | images]
