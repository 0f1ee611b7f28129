"""The weights and the memory of an evaluation in training: every rank has the whole model for a while."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.accelerator import get_accelerator

from mirage_ds.config import Config, EvaluationConfig
from mirage_ds.errors import MemoryFullError
from mirage_ds.evaluation.training.questions import Questions
from mirage_ds.model.backbone import Backbone
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.memory import estimate_memory
from mirage_ds.sizing.micro_batch import usable_bytes
from mirage_ds.sizing.model_sizes import model_sizes
from mirage_ds.training.dry_run import is_out_of_memory
from mirage_ds.training.start import Start
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.whole_model import whole_model

GIB = 2**30


@contextmanager
def decoding(module: torch.nn.Module, backbone: Backbone) -> Iterator[None]:
    """Every rank may decode with the backbone, whose modules are those of `module`; training does not notice."""
    device = backbone.device
    with whole_model(module), torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            backbone.hf.train()  # a decoder turns that off


@contextmanager
def name_full_memory(evaluation: EvaluationConfig) -> Iterator[None]:
    """Says what takes less memory.

    Raises:
        MemoryFullError: a device or the host had too little for what is computed inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["out of memory"])[0]
        raise MemoryFullError(
            f"the answers do not fit into memory (rank {distributed.rank()} on {socket.gethostname()}, "
            f"evaluation.batch_size={evaluation.batch_size}, evaluation.max_new_tokens={evaluation.max_new_tokens}, "
            f"evaluation.latents={evaluation.latents}): {reason:.160}; beside the training's memory there must be room "
            "for the whole model and the cache of a batch; set one of these lower, or evaluate exports"
        ) from error


def describe_evaluation(config: Config, start: Start, questions: Questions) -> str:
    """How much memory an evaluation takes by the planner's formulas, for the start of the log; all ranks call it."""
    row, ranks = workload(config).largest_of(config.rows_per_micro_batch), distributed.world_size()
    memory = estimate_memory(model_sizes(config.model), config, start.deepspeed_config, row, ranks)
    needed, limit = memory.resident + memory.evaluation, usable_bytes(start.device)
    every = f"Every {config.evaluation.interval} steps answers {len(questions.rows)} questions"
    arms = ", ".join(arm.name for arm in questions.arms)
    text = (
        f"{every} (task {questions.task.name}; latents {arms}), for which each rank gathers the whole model: about "
        f"{memory.evaluation / GIB:.2f} GiB with the cache of {config.evaluation.batch_size} answers"
    )
    if needed <= limit:
        return text
    return (
        f"{text}\nWARNING: with what stays on a rank that is {needed / GIB:.1f} GiB, of {limit / GIB:.1f} that may be "
        "used: evaluations may run out of memory; set evaluation.batch_size or evaluation.max_new_tokens lower, use "
        "more ranks, or unset evaluation.task and evaluate exports"
    )


def describe_rehearsal(num_questions: int, columns: int, device: torch.device) -> str:
    """One line for the log; on a GPU with the peak."""
    found = (
        "dry run: the longest questions of an evaluation fit, with answers up to evaluation.max_new_tokens (questions: "
        f"{num_questions}, columns: {columns})"
    )
    if device.type == "cpu":
        return found
    peak, total = get_accelerator().max_memory_allocated(), get_accelerator().total_memory(device.index)
    return f"{found}: peak {peak / GIB:.1f} of {total / GIB:.1f} GiB"
