"""`mirage generate` and `mirage evaluate`: their options, and what they print.

torch and transformers take seconds to import, so they are imported after the checks that do not need them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track

from mirage_ds.config import Dtype, LatentEnd, TaskName
from mirage_ds.errors import name_full_disk
from mirage_ds.inference.questions import read_question, read_task
from mirage_ds.inference.rates import difference, success_rates, table
from mirage_ds.inference.results import Answer, Results
from mirage_ds.model_folder import check_model
from mirage_ds.paths import expanded

Latents = Literal["fed", "shuffled", "mean", "zeroed"]
"""What is fed at the latents; latents.py defines each."""

# Options of both commands.
ModelOption = Annotated[str, typer.Option("--model", help="A folder that `mirage export` wrote, or a hub id.")]
LatentSizeOption = Annotated[
    int | None,
    typer.Option("--latent-size", min=1, show_default="from the model folder", help="Latents per block."),
]
LatentEndOption = Annotated[
    LatentEnd,
    typer.Option(
        "--latent-end",
        help="When a block ends. fixed: after --latent-size latents. model: at <|latent_end|>, or after as many.",
    ),
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Limit of an answer, latents included.")
]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0: greedy decoding.")]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", help="With a temperature: draw from the likeliest tokens that have this probability."),
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", show_default="bf16 on a GPU, fp32 on the CPU", help="Dtype to compute in.")
]


@expanded("model")
def generate(
    model: ModelOption,
    prompt: Annotated[
        str, typer.Option(help="The question. <image> marks an image's place; without it, images come first.")
    ],
    image: Annotated[list[Path] | None, typer.Option(help="An image; repeat the option for more.")] = None,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: Annotated[
        Literal["fed", "zeroed"],
        typer.Option(
            help="What is fed at the latents: the model's own states, or zeros. The other replacements need the rows "
            "of a file: see `mirage evaluate`."
        ),
    ] = "fed",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: Annotated[int, typer.Option(help="With a temperature: seed of the draws.")] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers one question and prints the answer as it is decoded, with one mark per latent."""
    check_model(model, f"--model {model}")
    question = read_question(prompt, image or [])

    from mirage_ds.inference.latents import zeroed
    from mirage_ds.inference.terminal import answer

    options = Decoding(model, latent_size, latent_end, latents, max_new_tokens, temperature, top_p, seed, dtype)
    decoder, encoder = options.load()
    decoder.feed = zeroed if latents == "zeroed" else None
    if not answer(decoder, encoder, question):
        typer.echo(f"The answer was cut off after {max_new_tokens} tokens (--max-new-tokens).", err=True)


@expanded("model")
def evaluate(
    model: ModelOption,
    task: Annotated[TaskName, typer.Option(help="How answers are scored.")],
    data: Annotated[Path, typer.Option(help="JSONL rows with the questions and their images.")],
    output: Annotated[Path, typer.Option(help="New JSONL file, one line per row; FILE.summary.json is written too.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 16,
    latent_size: LatentSizeOption = None,
    latent_end: LatentEndOption = "fixed",
    latents: Annotated[
        Latents,
        typer.Option(
            help="What is fed at the latents. fed: the model's own states. shuffled: the states of another row of the "
            "file. mean: the mean state of all rows, slot by slot. zeroed: zeros. shuffled and mean decode the file "
            "twice."
        ),
    ] = "fed",
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 0.9,
    seed: Annotated[
        int, typer.Option(help="With a temperature: seed of the draws. With --latents shuffled: of the permutation.")
    ] = 0,
    dtype: DtypeOption = None,
) -> None:
    """Answers and scores the questions of a file, and prints the success rates by level."""
    check_model(model, f"--model {model}")
    results = Results(output)
    rows = read_task(data, task)

    from mirage_ds.inference.evaluate import evaluate as answer_rows
    from mirage_ds.inference.latents import MeanStates, OwnStates, ShuffledStates, next_rows, zeroed

    next_row = next_rows(rows, seed) if latents == "shuffled" else {}
    options = Decoding(model, latent_size, latent_end, latents, max_new_tokens, temperature, top_p, seed, dtype)
    decoder, encoder = options.load()

    def decode(name: str) -> Iterable[Answer]:
        answers = answer_rows(decoder, encoder, rows, task, batch_size=batch_size)
        return track(answers, description=f"{task}, {name}", total=len(rows), console=Console(stderr=True))

    with name_full_disk(output.parent, "free some space, or name another --output, and start again"), results:
        fed: list[Answer] = []
        if latents in ("shuffled", "mean"):
            decoder.feed = own = OwnStates()
            fed = list(decode("latents fed (pass 1 of 2)"))
            decoder.feed = MeanStates(own) if latents == "mean" else ShuffledStates(own, next_row)
        elif latents == "zeroed":
            decoder.feed = zeroed
        for answer in decode(f"latents {latents}" + (" (pass 2 of 2)" if fed else "")):
            results.add(answer)
        settings = asdict(options) | {"latent_size": decoder.latent_size, "computed": decoder.backbone.describe()}
        settings = {"task": task, "data": str(data), "batch_size": batch_size} | settings
        results.finish(summarize(results.answers, fed) | {"settings": settings})
    report(results.answers, fed, task, latents)


def summarize(answers: Sequence[Answer], fed: Sequence[Answer]) -> dict[str, Any]:
    """The numbers of the summary; `fed` are the same rows' answers with their own latents, if there was such a pass."""
    summary: dict[str, Any] = {"rates": success_rates(answers)}
    if fed:
        summary |= {"rates_fed": success_rates(fed), "fed_minus_replaced": asdict(difference(fed, answers))}
    num_latents, num_replaced = count_latents(answers)
    return summary | {"num_latents": num_latents, "num_replaced": num_replaced}


def report(answers: Sequence[Answer], fed: Sequence[Answer], task: TaskName, latents: Latents) -> None:
    """Prints the rates and their difference, and how many latents were replaced and answers cut off."""
    if fed:
        Console().print(table(success_rates(fed), f"{task}, latents fed"))
    Console().print(table(success_rates(answers), f"{task}, latents {latents}"))
    if fed:
        way = next(iter(answers[0].scores))
        typer.echo(f"fed minus {latents} ({way}): {difference(fed, answers)}, over the same {len(answers)} rows")
    if latents != "fed":
        num_latents, num_replaced = count_latents(answers)
        typer.echo(f"{num_replaced} of {num_latents} latents were replaced")
        if kept := num_latents - num_replaced:
            typer.echo(f"{kept} kept the row's own state, because no other row made a state at the same slot")
    if cut_off := sum(not answer.complete for answer in answers):
        were = "answer was" if cut_off == 1 else "answers were"
        typer.echo(f"{cut_off} {were} cut off by --max-new-tokens")


def count_latents(answers: Sequence[Answer]) -> tuple[int, int]:
    """Latents of all answers, and how many of them were replaced."""
    return sum(answer.num_latents for answer in answers), sum(answer.num_replaced for answer in answers)


@dataclass(frozen=True)
class Decoding:
    """The options that `generate` and `evaluate` share."""

    model: str
    latent_size: int | None
    latent_end: LatentEnd
    latents: Latents
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    dtype: Dtype | None

    def load(self) -> Any:
        """Decoder and encoder; prints how the model is computed to stderr."""
        from transformers.utils import logging

        from mirage_ds.inference.generate import load_decoder
        from mirage_ds.inference.sampling import Sampling
        from mirage_ds.model.backbone import DTYPES

        logging.disable_progress_bar()
        decoder, encoder = load_decoder(
            self.model,
            latent_size=self.latent_size,
            latent_end=self.latent_end,
            max_new_tokens=self.max_new_tokens,
            sampling=Sampling(self.temperature, self.top_p, self.seed),
            dtype=DTYPES[self.dtype] if self.dtype else None,
        )
        typer.echo(f"{self.model}: latent_size {decoder.latent_size}, {decoder.backbone.describe()}", err=True)
        return decoder, encoder
