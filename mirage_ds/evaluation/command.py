"""`mirage evaluate`: its options, and what it prints.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from mirage_ds.errors import name_full_disk
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.arms import OWN, parse_arms
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.rates import difference, success_rates, table
from mirage_ds.evaluation.results import Results
from mirage_ds.evaluation.scoring import Task, load_task
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
from mirage_ds.model_folder import check_model
from mirage_ds.paths import expanded


@expanded("model")
def evaluate(
    model: ModelOption,
    task: Annotated[str, typer.Option(help="How answers are scored.")],
    data: Annotated[Path, typer.Option(help="JSONL rows with the questions and their images.")],
    output: Annotated[Path, typer.Option(help="New JSONL file, a line per answer; FILE.summary.json is written too.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 16,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: Annotated[
        str, typer.Option(help="What is fed at the latents: one or more of the names in the documentation.")
    ] = OWN,
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: Annotated[int, typer.Option(help="Seed of the draws with a temperature, and of the replacements.")] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers and scores the questions of a file, and prints the success rates."""
    check_model(model, f"--model {model}")
    results = Results(output)
    how, arms = load_task(task), parse_arms(latents)
    rows = read_questions_of(data, arms)

    from mirage_ds.evaluation.engine import Engine, Ranks
    from mirage_ds.evaluation.parts import Parts

    options = Decoding(model, latent_size, latent_end, max_new_tokens, temperature, top_p, seed, dtype)
    with name_full_disk(output.parent, "free some space, or name another --output, and start again"), results:
        decoder, encoder = options.load()
        settings = asdict(options) | {"latent_size": decoder.latent_size, "computed": decoder.backbone.describe()}
        settings = {"task": task, "data": str(data), "batch_size": batch_size, "arms": latents} | settings
        engine = Engine(decoder, encoder, rows, how, arms, batch_size=batch_size, seed=seed)
        parts = Parts(results.parts, 0, settings, decoder.backbone.embed_tokens.embedding_dim)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(task, total=len(rows) * len(arms))
            engine.run(parts, Ranks(), lambda number: progress.advance(bar, number))
        answers = engine.in_order(parts.answers())
        every = [answer for arm in answers.values() for answer in arm]
        results.finish(every, summarize(answers, how) | {"settings": settings})
        parts.close()
        parts.remove()
    report(answers, how)


def summarize(answers: dict[str, list[Answer]], task: Task) -> dict[str, Any]:
    """The numbers of the summary, by arm."""
    return {"arms": {name: _summary(arm, answers[OWN], task) for name, arm in answers.items()}}


def _summary(answers: Sequence[Answer], own: Sequence[Answer], task: Task) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "num_answers": len(answers),
        "num_cut_off": sum(not answer.complete for answer in answers),
        "num_latents": sum(answer.num_latents for answer in answers),
        "num_replaced": sum(answer.num_replaced for answer in answers),
    }
    if task.ways:
        summary |= {"rates": success_rates(answers), "minus_own": asdict(difference(answers, own))}
    return summary


def report(answers: dict[str, list[Answer]], task: Task) -> None:
    """Prints what came out."""
    for name, arm in answers.items():
        if task.ways:
            Console().print(table(success_rates(arm), f"{task.name}, {name}"))
            if name != OWN:
                typer.echo(f"{name} minus own ({task.ways[0]}): {difference(arm, answers[OWN])}")
        if cut_off := sum(not answer.complete for answer in arm):
            typer.echo(f"{name}: {cut_off} of {len(arm)} answers were cut off by --max-new-tokens")
