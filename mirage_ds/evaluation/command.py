"""`mirage evaluate`: its options, and what it prints.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from mirage_ds.errors import ConfigError, name_full_disk
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.asked import Asked, Request, check_options
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.evaluation.ranks import Ranks, join
from mirage_ds.evaluation.scoring import Share, score_share, scored
from mirage_ds.evaluation.settings import digest_of_helpers, digest_of_rows, model_files, packages
from mirage_ds.evaluation.tables import summary_of, tables_of, warnings_of
from mirage_ds.inference.options import (
    Decoding,
    DtypeOption,
    LatentEndOption,
    LatentSizeOption,
    MaxNewTokensOption,
    ModelOption,
    TemperatureOption,
    TopPOption,
)
from mirage_ds.output_folder import signals_as_errors
from mirage_ds.paths import expanded
from mirage_ds.wide_console import wide_console

Answers = dict[str, list[Answer]]
"""Of each arm, by row, then by sample."""

if TYPE_CHECKING:
    from mirage_ds.evaluation.engine import Engine
    from mirage_ds.evaluation.latents.states import States
    from mirage_ds.evaluation.parts import Parts

    Finish = Callable[[Engine, Answers, States, dict[str, Any]], None]

LatentsOption = Annotated[
    str, typer.Option(help="What is fed at the latents: some of the names in docs/evaluation.md.")
]
ImageOption = Annotated[str, typer.Option(help="What is seen instead of the input images: one or more names.")]


@expanded("model")
def evaluate(
    model: ModelOption,
    task: Annotated[str, typer.Option(help="How answers are scored.")],
    data: Annotated[Path, typer.Option(help="JSONL rows with the questions and their images.")],
    output: Annotated[Path, typer.Option(help="New JSONL file, a line per answer; FILE.summary.json is written too.")],
    limit: Annotated[int | None, typer.Option(min=1, show_default="all", help="Rows to ask, from the first.")] = None,
    by: Annotated[
        str | None, typer.Option(show_default="the level", help="Field of the rows by which rates are grouped.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 16,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: LatentsOption = OWN,
    image: ImageOption = OWN,
    max_new_tokens: MaxNewTokensOption = 1024,
    samples: Annotated[int, typer.Option(min=1, help="With a temperature: answers to each row.")] = 1,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the draws with a temperature, and of the replacements.")] = 0,
    dtype: DtypeOption = None,
    check: Annotated[bool, typer.Option("--check", help="Check options and rows; load and write nothing.")] = False,
) -> None:
    """Answers and scores the questions of a file, and prints the success rates. The same command continues it."""
    request = Request(task, data, output, latents, image, by, limit, samples, batch_size)
    options = Decoding(model, latent_size, latent_end, max_new_tokens, temperature, top_p, seed, dtype)
    ranks = join()
    with ranks.together():
        asked = check_options(request, options, check_images=ranks.is_first)
    if check:
        if ranks.is_first:
            typer.echo(f"checked {asked.in_words()}")
        return
    if ranks.is_first:
        for row, reason in asked.unscored:
            typer.echo(f"not scored: {row.where}: {reason}", err=True)

    def finish(engine: "Engine", answers: Answers, states: "States", settings: dict[str, Any]) -> None:
        from mirage_ds.evaluation.latents.health_tables import health_tables

        every = [answer for arm in answers.values() for answer in arm]
        names = [arm.name for arm in asked.arms]
        health = engine.health(states, answers[OWN])
        summary = summary_of(answers, asked.task, by) | {"health": health.as_dict()}
        asked.results.finish(every, summary | {"settings": settings | {"arms": names}})
        for table in [*tables_of(answers, asked.task, by), *health_tables(health)]:
            wide_console().print(table)
        for warning in warnings_of(answers):
            typer.echo(warning, err=True)

    answer_all(asked, options, ranks, finish)


def answer_all(asked: Asked, options: Decoding, ranks: Ranks, finish: "Finish") -> None:
    """Answers what is not answered yet.

    Args:
        finish: writes and prints what came out; called on the first rank, with the scored answers, the states of their
            latents and all settings.
    """
    from mirage_ds.evaluation.engine import Engine
    from mirage_ds.evaluation.latents.replacements import check_targets
    from mirage_ds.evaluation.parts import Parts, check_left_out, check_settings

    request, results, task = asked.request, asked.results, asked.task
    settings, names = request.settings() | asdict(options), [arm.name for arm in asked.arms]
    with ExitStack() as until_the_end:
        until_the_end.enter_context(name_full_disk(results.output.parent, "free some space; a new start continues"))
        until_the_end.enter_context(signals_as_errors())
        with ranks.together():  # before the model is loaded
            if ranks.is_first:
                check_left_out(results.parts, names)
        with ranks.together():
            decoder, encoder = options.load(announce=ranks.is_first)
            no_targets = check_targets(encoder, asked.rows, asked.arms)
        if ranks.is_first and no_targets:
            typer.echo(no_targets, err=True)
        with ranks.together():  # one checks before the others write
            if ranks.is_first:
                until_the_end.enter_context(results)
                check_left_out(results.parts, names)  # again: another evaluation may have added one since
                computed = {"latent_size": decoder.latent_size, "computed": decoder.backbone.describe()}
                settings = settings | computed | digest_of_rows(asked.rows)
                check_settings(results.parts, settings | packages() | model_files(options.model))
                if any(arm.latents == "oracle" for arm in asked.arms):
                    check_settings(results.parts, digest_of_helpers(asked.rows), "oracle.json")
        with ranks.together():
            parts = Parts(results.parts, ranks.rank, decoder.backbone.embed_tokens.embedding_dim)
        engine = Engine(decoder, encoder, asked.rows, asked.arms, request.batch_size, request.samples, options.seed)
        if ranks.is_first and (kept := sum(map(len, engine.in_order(parts.answers()).values()))):
            typer.echo(f"continues: {kept} of {asked.num_answers} answers are there", err=True)
        decodes = ranks.is_first and kept < asked.num_answers  # else the bar would stay empty
        with Progress(console=Console(stderr=True), disable=not decodes) as progress:
            bar = progress.add_task(task.name, total=None)
            engine.run(parts, ranks, lambda done, total: progress.update(bar, completed=done, total=total))
        answers = engine.in_order(parts.answers())
        with ranks.together():
            share = _score_share(answers, parts, asked, ranks)
        parts.close()
        shares = ranks.gather(share)  # from now on nobody has a file open in the folder, which is deleted
        with ranks.together():  # a job whose ranks end long before the first one may be killed
            if ranks.is_first:
                settings |= {"task": task.name, "task_file": task.file_digest}
                finish(engine, scored(answers, shares), parts.states(), settings)


def _score_share(answers: Answers, parts: "Parts", asked: Asked, ranks: Ranks) -> Share:
    """The scores of this rank's share of all answers."""
    try:
        return score_share(answers, asked.rows, asked.task, ranks)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; then start again: all answers are kept ({parts.folder}), and none is decoded again"
        ) from error
