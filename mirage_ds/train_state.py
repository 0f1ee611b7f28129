"""Where a run stands: what a checkpoint keeps besides the engine."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """Where a run stands: all that changes besides the engine."""

    step: int = 0  # optimizer steps done
    position: int = 0  # samples consumed, over all ranks and epochs
    ends_early: bool = False  # all ranks have agreed that this step is the last one for now
