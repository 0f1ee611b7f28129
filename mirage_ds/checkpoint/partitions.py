"""The weights in a ZeRO-3 checkpoint, read from every rank's files one parameter at a time; needs no process group.

zero_pp_rank_R_mp_rank_00_model_states.pt    names and shapes; the frozen parameters' partitions, in the model's dtype
*zero_pp_rank_R_mp_rank_00_optim_states.pt   float32 masters of the trained ones, concatenated, in several sub-groups

A partition has 1 / world_size of a parameter's elements; the last one is padded. DeepSpeed's own zero_to_fp32 holds
the frozen parameters of all ranks in memory at once, and unpickles arbitrary objects. Here torch.load reads only data
(weights_only), and of the tensors only where they are in the file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mirage_ds.errors import CheckpointError
from mirage_ds.model.lora import has_adapter
from mirage_ds.model.mirage import hf_name

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Consecutive elements in a file."""

    file: Path
    offset: int  # bytes from the start of the file
    numel: int

    def read(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Reads the first `numel` elements, [numel].

        Raises:
            CheckpointError: the file cannot be read, or is too short.
        """
        elements = torch.empty(numel, dtype=dtype)
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                size = file.readinto(elements.view(torch.uint8).numpy().data)
        except OSError as error:
            raise _damaged(self.file, str(error)) from error
        if size != elements.nbytes:
            raise _damaged(self.file, f"{size} of {elements.nbytes} bytes from byte {self.offset}")
        return elements


@dataclass(frozen=True)
class StoredParameter:
    """Where a parameter's elements are, rank by rank; the last piece may end with padding."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Reads the parameter, in `dtype` or as it is stored. Besides the result, only one rank's part is in memory.

        Raises:
            CheckpointError: a file cannot be read, or is too short.
        """
        rest = flat = torch.empty(self.shape.numel(), dtype=dtype or self.dtype)
        for piece in self.pieces:
            part, rest = rest[: piece.numel], rest[piece.numel :]
            part.copy_(piece.read(len(part), self.dtype))
        if len(rest):
            raise _damaged(self.pieces[-1].file, f"{len(rest)} of {len(flat)} elements are missing")
        return flat.view(self.shape)

    def read_part(self, begin: int, numel: int) -> torch.Tensor:
        """Reads elements [begin, begin + numel) of the flat parameter, [numel]; zeros beyond its end.

        Raises:
            CheckpointError: a file cannot be read, or is too short.
        """
        part = torch.zeros(numel, dtype=self.dtype)
        end, position = min(begin + numel, self.shape.numel()), 0
        for piece in self.pieces:
            first, last = max(begin, position), min(end, position + piece.numel)
            if first < last:
                skipped = piece.offset + (first - position) * self.dtype.itemsize
                part[first - begin : last - begin] = Piece(piece.file, skipped, last - first).read(
                    last - first, self.dtype
                )
            position += piece.numel
        return part


def stored_parameters(checkpoint: Path, world_size: int) -> dict[str, StoredParameter]:
    """Locates all parameters of a checkpoint, trained and frozen, by transformers' names. Reads no weights.

    Raises:
        CheckpointError: a rank's file is missing or damaged.
    """
    models = _model_files(checkpoint, world_size)
    contents = [_load_meta(file) for file in models]
    try:
        trained = {name: shape for group in contents[0]["param_shapes"] for name, shape in group.items()}
        frozen = contents[0]["frozen_param_shapes"] or {}
        fragments = [content["frozen_param_fragments"] for content in contents]
    except KeyError as error:
        raise _damaged(models[0], f"it has no {error}") from error
    stored = _of_all_ranks([_flat_groups(file) for file in _optimizer_files(checkpoint, world_size)], trained)
    for name, shape in frozen.items():
        tensors = [rank[name] for rank in fragments]
        pieces = tuple(_piece(file, tensor) for file, tensor in zip(models, tensors, strict=True))
        stored[name] = StoredParameter(shape, tensors[0].dtype, pieces)
    return {hf_name(name): parameter for name, parameter in stored.items()}


def stored_moments(checkpoint: Path, world_size: int) -> tuple[dict[str, dict[str, StoredParameter]], int]:
    """Locates AdamW's moments, {"exp_avg": {name: ...}, "exp_avg_sq": ...} by the module's own names; reads its step.

    Raises:
        CheckpointError: a rank's file is missing or damaged, or the run had made no step.
    """
    model = _model_files(checkpoint, world_size)[0]
    files = _optimizer_files(checkpoint, world_size)
    states = [_load_meta(file)["optimizer_state_dict"]["optimizer_state_dict"]["state"] for file in files]
    if not all(states):
        raise _damaged(files[0], "it has no optimizer state")
    trained = {name: shape for group in _load_meta(model)["param_shapes"] for name, shape in group.items()}
    moments = {
        key: _of_all_ranks(
            [
                (file, [_piece(file, groups[number][key]) for number in sorted(groups)])
                for file, groups in zip(files, states, strict=True)
            ],
            trained,
        )
        for key in MOMENTS
    }
    step = states[0][0]["step"]  # a tensor in torch's AdamW, a number in DeepSpeed's; the same in each sub-group
    if isinstance(step, torch.Tensor):
        step = _piece(files[0], step).read(1, step.dtype).item()
    return moments, int(step)


def check_fit(stored: Mapping[str, StoredParameter], model: torch.nn.Module, checkpoint: Path) -> None:
    """Refuses a transformers model whose parameters differ from those of a checkpoint; of one with an adapter, those
    that are trained.

    Raises:
        CheckpointError: the message names the parameters that only one of them has, or whose shapes differ.
    """
    found = {name: tuple(parameter.shape) for name, parameter in stored.items()}
    frozen = not has_adapter(model)
    expected = {  # a tied head once
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or frozen
    }
    if found != expected:
        other = ", ".join(sorted({name for name, _ in found.items() ^ expected.items()}))
        raise CheckpointError(
            f"the parameters of the checkpoint and the model differ ({checkpoint}): {other[:400]}; both must belong to "
            "one model; give the model that the run was started with (model.path in its config.yaml)"
        )


def _model_files(checkpoint: Path, world_size: int) -> list[Path]:
    return [_find(checkpoint, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt") for rank in range(world_size)]


def _optimizer_files(checkpoint: Path, world_size: int) -> list[Path]:
    return [_find(checkpoint, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(world_size)]


def _find(checkpoint: Path, pattern: str) -> Path:
    found = sorted(checkpoint.glob(pattern))
    if len(found) != 1:
        raise CheckpointError(
            f"{len(found)} files match {pattern} ({checkpoint}); a checkpoint has one per rank; copy the complete "
            "folder again, from all nodes, or use another checkpoint"
        )
    return found[0]


def _zero_stage(kind: type, name: str) -> ZeroStageEnum:
    """Replaces getattr, by which Python before 3.11.4 pickles a member of an enumeration."""
    return ZeroStageEnum[name]


def _load_meta(file: Path) -> dict[str, Any]:
    """A file of torch.save; its tensors have no data, only their offset in the file."""
    try:
        safe = torch.serialization.safe_globals([ZeroStageEnum, LossScaler, (_zero_stage, "builtins.getattr")])
        # A tensor with attributes is unpickled as its own class, Tensor, which a FakeTensor of torch 2.9 cannot become.
        keep = patch.object(FakeTensor, "as_subclass", lambda fake, kind: fake)
        with FakeTensorMode(), safe, keep:
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise _damaged(file, "it contains objects that DeepSpeed does not write") from error
    except (OSError, RuntimeError, EOFError) as error:
        raise _damaged(file, repr(error).split(".")[0]) from error
    return content


def _flat_groups(file: Path) -> tuple[Path, list[Piece]]:
    """A rank's float32 masters: its sub-groups, each one flat tensor."""
    try:
        return file, [_piece(file, tensor) for tensor in _load_meta(file)["optimizer_state_dict"]["fp32_flat_groups"]]
    except KeyError as error:
        raise _damaged(file, f"it has no {error}") from error


def _of_all_ranks(
    ranks: Sequence[tuple[Path, list[Piece]]], shapes: Mapping[str, torch.Size]
) -> dict[str, StoredParameter]:
    """Locates each parameter in every rank's file and sub-groups."""
    partitions = [_partition(file, groups, shapes, len(ranks)) for file, groups in ranks]
    return {
        name: StoredParameter(shape, torch.float32, tuple(piece for pieces in partitions for piece in pieces[name]))
        for name, shape in shapes.items()
    }


def _partition(
    file: Path, groups: list[Piece], shapes: Mapping[str, torch.Size], world_size: int
) -> dict[str, list[Piece]]:
    """A rank's partition of every trained parameter; they fill its sub-groups in order."""
    sizes = {name: math.ceil(shape.numel() / world_size) for name, shape in shapes.items()}
    stored, wanted = sum(group.numel for group in groups), sum(sizes.values())
    if stored != wanted:
        raise _damaged(file, f"{stored} elements instead of {wanted}")
    partitions: dict[str, list[Piece]] = {}
    for name, size in sizes.items():
        partitions[name] = []
        while size:
            group = groups[0]
            taken = min(size, group.numel)
            partitions[name].append(Piece(file, group.offset, taken))
            groups[0] = Piece(file, group.offset + taken * torch.float32.itemsize, group.numel - taken)
            if not groups[0].numel:
                del groups[0]
            size -= taken
    return partitions


def _piece(file: Path, tensor: torch.Tensor) -> Piece:
    # torch documents this attribute: "torch.load with FakeTensorMode" in its notes on serialization. With the device
    # meta instead, torch 2.9 does not set it.
    start = tensor.untyped_storage()._checkpoint_offset
    assert start is not None  # it came from torch.load
    return Piece(file, start + int(tensor.storage_offset()) * tensor.itemsize, tensor.numel())


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the file cannot be read ({file}): {what}; expected the file that the run wrote; copy it again, or use "
        "another checkpoint"
    )
