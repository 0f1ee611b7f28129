"""What a run shows in TensorBoard: curves, its configuration, and answers to look at."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams, image, text

from mirage_ds import strict_json
from mirage_ds.housekeeping import housekeeping

# Curves that belong in one chart, for the tab "Custom scalars".
LAYOUT = {
    "evaluation": {name: ["Multiline", [f"evaluation/{name}.*"]] for name in ("success", "cut_off", "with_blocks")},
    "latents": {
        name: ["Multiline", [rf"latents/{name}_\d+"]]
        for name in ("norm", "row_cosine", "next_cosine", "target_cosine", "effective_rank")
    },
    "loss": {"text loss": ["Multiline", ["train/ce_loss", "validation/ce_loss"]]},
}
# What runs are compared by, in the tab "HParams".
COMPARED_SECTIONS = ("model", "data", "train")
COMPARED = ("train/ce_loss", "train/cosine", "validation/ce_loss", "evaluation/success")


class Look(NamedTuple):
    """An answer to look at."""

    text: str  # Markdown
    image: NDArray[np.uint8]  # [height, width, 3]


class Curves:
    """TensorBoard's files. If they cannot be written, there are no more curves in this start."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.folder, self.steps_done = folder, steps_done
        self.writer: SummaryWriter | None = None
        with self.housekeeping():
            self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def add(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve; `values` by tag."""
        # All points in one event: an event costs about as much as all of them.
        self.write([Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])], step)

    def add_looks(self, looks: list[Look], step: int) -> None:
        """Adds answers, each with its picture."""
        for number, look in enumerate(looks):
            self.write(
                [
                    text(f"evaluation/answer_{number}", look.text),
                    image(f"evaluation/answer_{number}", look.image, dataformats="HWC"),
                ],
                step,
            )

    def add_configuration(self, config: dict[str, Any]) -> None:
        """Adds the run's configuration, as text and as what runs are compared by, and which curves belong together."""
        lines = strict_json.dumps(config, indent=2).splitlines()
        settings = {
            f"{section}.{key}": value if isinstance(value, (bool, int, float)) else str(value)
            for section in COMPARED_SECTIONS
            for key, value in config[section].items()
        }
        # Markdown: lines with four spaces in front are shown as they are.
        described = text("configuration", "\n".join(f"    {line}" for line in lines))
        self.write([described, *hparams(settings, dict.fromkeys(COMPARED, 0))], self.steps_done)
        if self.writer:
            with self.housekeeping():
                self.writer.add_custom_scalars(LAYOUT)

    def write(self, summaries: list[Any], step: int) -> None:
        """Adds an event for each summary."""
        writer, self.writer = self.writer, None
        if writer:
            with self.housekeeping():
                for summary in summaries:
                    writer._get_file_writer().add_summary(summary, step)
                self.writer = writer

    def close(self) -> None:
        if self.writer:
            with self.housekeeping():
                self.writer.close()

    def housekeeping(self) -> AbstractContextManager[None]:
        return housekeeping(f"no more curves are written ({self.folder})", "metrics.jsonl has the same numbers")
