"""What an evaluation prints about the latents' health."""

from collections.abc import Sequence

from rich.table import Table

from mirage_ds.evaluation.latents.health import LatentHealth


def health_tables(health: LatentHealth) -> list[Table]:
    """A line per slot, and the warning below it; nothing if no answer made a state."""
    if not health.slots:
        return []
    columns: dict[str, Sequence[float | None]] = {
        "norm": health.norms,
        "row cosine": health.row_cosines,
        "next cosine": health.next_cosines,
        "effective rank": health.effective_ranks,
        "target cosine": health.target_cosines,
    }
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    title = f"latent health; {health.opened:.1%} of the answers open a block"
    drawn = Table(title=title, caption=health.warning())
    for name in ("slot", "rows", *columns):
        drawn.add_column(name, justify="right")
    for slot, count, *values in zip(health.slots, health.num_rows, *columns.values(), strict=True):
        drawn.add_row(slot, str(count), *("-" if value is None else f"{value:.3g}" for value in values))
    return [drawn]
