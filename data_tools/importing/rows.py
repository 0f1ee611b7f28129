"""Imports a published data set: rows.jsonl and images of ours, with a report, in a new folder.

containers.py reads rows, formats.py has a function for each format that makes rows of ours of them (their images not
opened yet), and output.py writes what `mirage-data build` or `mirage evaluate` take. Rows are streamed.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_tools.building.progress import Report as Progress
from data_tools.importing.containers import RawRow, files_of, read_rows
from data_tools.importing.formats import AUTO, FORMATS, Format, recognise
from data_tools.importing.options import DEFAULT_MARGIN, Options
from data_tools.importing.output import Output, make_ready
from data_tools.importing.report import Report
from data_tools.importing.source_rows import SourceRow
from mirage_ds.data.rows import parse_row
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.output_folder import check_output, new_folder

_LOOKED_AT = 20  # rows, to recognise a format
_PROGRESS_ROWS = 100
_ROOT = "if the paths of images begin at another folder than their file of rows, give it as --images FOLDER; "


@dataclass(frozen=True)
class Imported:
    """What an import has written."""

    format: Format
    report: Report
    output: Output


def import_rows(
    format_name: str,
    sources: Sequence[str],
    output: Path,
    *,
    images: Path | None = None,
    options: Options,
    progress: Progress = lambda rows, fraction: None,
) -> Imported:
    """Writes `output`.

    Args:
        format_name: one of FORMATS, or AUTO.
        sources: files and folders.
        images: where paths of images begin; None: at the folder of their file of rows.
        progress: see `data_tools.building.progress.Report`.

    Raises:
        DataError: a source cannot be read, has another format, or no row can be imported; or the output exists.
        OwnerError: another program writes this output.
    """
    check_output(output)
    files = files_of(sources)
    chosen = _format_of(format_name, files)
    _check_options(options, chosen)
    with new_folder(output) as folder:
        report = Report(chosen.name, sources, folder)
        written = Output(folder)
        around = [path for source in sources if (path := Path(source)).is_dir()]
        with closing(report), closing(written):
            for raw in read_rows(files):
                _import_row(
                    raw, SourceRow(raw.where, images or raw.file.parent, {}, around), chosen, options, report, written
                )
                if report.num_read % _PROGRESS_ROWS == 0:
                    progress(report.num_read, raw.fraction)
        if not written.num_rows:
            listed = "".join(f"\n  - {each}" for each in report.first.values())
            root = "" if images or not any("cannot be read" in each for each in report.first) else _ROOT
            raise DataError(
                f"no row could be imported as {chosen.name} ({', '.join(sources)}): rows: {report.num_read}, "
                f"{report.reasons()}; one of each:{listed}\n"
                f"nothing was written; {root}see docs/importing.md for the format"
            )
        report.write(folder, written)
    return Imported(chosen, report, written)


def _check_options(options: Options, chosen: Format) -> None:
    """
    Raises:
        ConfigError: an option that this format has no use for.
    """
    for given, usable, name in (
        (options.margin != DEFAULT_MARGIN, "boxes", "--margin"),
        (options.all_turns, "turns", "--all-turns"),
    ):
        if given and not getattr(chosen, usable):
            names = ", ".join(format.name for format in FORMATS.values() if getattr(format, usable))
            raise ConfigError(
                f"{name} with the format {chosen.name}, which has no {usable}; allowed with {names}; leave it out"
            )


def _import_row(raw: RawRow, row: SourceRow, chosen: Format, options: Options, report: Report, output: Output) -> None:
    try:
        row.fields = parse_row(raw.content, raw.where) if isinstance(raw.content, bytes) else raw.content
        # All rows of it, or none: with --all-turns there may be several.
        ready = [make_ready(made, row, choice_row=chosen.choice) for made in chosen.rows(row, options)]
    except DataError as error:
        report.leave_out(
            raw.where, str(raw.file), next((row.fields[name] for name in _IDS if name in row.fields), None), error
        )
    else:
        for each in ready:
            output.write(each)
        report.take(row, str(raw.file))


_IDS = ("id", "pid", "idx", "index", "Index", "question_id")


def _format_of(name: str, files: Sequence[Path]) -> Format:
    """The format of this name, if the first rows look like it; or the one that they look like.

    Raises:
        ConfigError: there is no such format.
        DataError: they look like another one, or none.
    """
    if name not in (*FORMATS, AUTO):
        raise ConfigError(
            f"unknown format {name!r:.80}; expected one of {', '.join((*FORMATS, AUTO))}; correct the name"
        )
    rows = []
    for raw in islice(read_rows(files), _LOOKED_AT):
        try:
            rows.append(parse_row(raw.content, raw.where) if isinstance(raw.content, bytes) else raw.content)
        except DataError:
            continue  # it will be listed with those that are left out
    if name != AUTO and any(FORMATS[name].looks(row) for row in rows):
        return FORMATS[name]
    found = next(filter(None, map(recognise, rows)), None)
    if name == AUTO and found is not None:
        return found
    fields = ", ".join(map(repr, rows[0])) if rows else "none"
    if found is not None:
        looks, todo = f"the rows look like {found.name}, not {name}", f"import them as {found.name}"
    else:
        looks, todo = "the rows are of no format that is known", "write the rows as ours, mirage"
        if len(rows[0] if rows else ()) == 1 and isinstance(next(iter(rows[0].values())), list):
            todo = f"write the list in {fields} as the file, without the object around it"
    raise DataError(
        f"{looks} ({files[0] if files else ''}), fields: {fields:.300}; expected one of {', '.join(FORMATS)} "
        f"(docs/importing.md); {todo}"
    )
