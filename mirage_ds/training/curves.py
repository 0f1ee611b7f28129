"""A run's curves in TensorBoard."""

from contextlib import AbstractContextManager
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from mirage_ds.housekeeping import housekeeping


class Curves:
    """TensorBoard's files. If they cannot be written, there are no more curves in this start."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None
        with self.housekeeping():
            self.writer = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def add(self, values: dict[str, float], step: int) -> None:
        """Adds a point to each curve; `values` by tag."""
        writer, self.writer = self.writer, None
        if writer:
            with self.housekeeping():
                # All points in one event: an event costs about as much as all of them.
                points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
                writer._get_file_writer().add_summary(Summary(value=points), step)
                self.writer = writer

    def close(self) -> None:
        if self.writer:
            with self.housekeeping():
                self.writer.close()

    def housekeeping(self) -> AbstractContextManager[None]:
        return housekeeping(f"no more curves are written ({self.folder})", "metrics.jsonl has the same numbers")
