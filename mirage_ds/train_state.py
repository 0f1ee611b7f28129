"""The progress of a run: what a checkpoint stores besides the engine."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """The progress of a run: all state that changes besides the engine."""

    step: int = 0  # optimizer steps done
    position: int = 0  # samples consumed, over all ranks and epochs
    ends_early: bool = False  # all ranks agreed to save and stop after this step
