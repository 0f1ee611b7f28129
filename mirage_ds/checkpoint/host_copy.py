"""A copy of states in host memory that this rank's writer process reads.

The bytes of the tensors' storages lie in a memory file; the rest of a state, some KiB, is a pickle in which each
storage is a `Place`. torch.save does the same to a file, so what the writer restores and saves is the same state.
"""

import io
import mmap
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator

ALIGNMENT = 64  # bytes; any element type may begin there


class Place(NamedTuple):
    """Where a storage lies in the memory file; tensors that share a storage have the same place."""

    number: int
    offset: int  # bytes
    size: int  # bytes


class HostCopy:
    """A memory file, taken once and used by every save. It needs no room in /dev/shm, which containers keep small.

    Made before the writer process is forked, which then reads it by the same descriptor.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("mirage_ds checkpoint")
        self.memory = torch.empty(0, dtype=torch.uint8)  # the memory file, in this process

    def reserve(self, size: int) -> None:
        """Takes the memory now, so that the first save does not wait for it; pinned, so that GPUs write at full rate.

        Raises:
            OSError, RuntimeError: the system or the GPU's driver refused.
        """
        self.release()
        os.ftruncate(self.descriptor, size)
        memory = torch.frombuffer(_mapped(self.descriptor, mmap.MAP_POPULATE), dtype=torch.uint8)
        if _on_cuda():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
        self.memory = memory

    def release(self) -> None:
        """Gives the memory back."""
        if _on_cuda() and len(self.memory):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr()))
        self.memory = torch.empty(0, dtype=torch.uint8)
        os.ftruncate(self.descriptor, 0)

    def take(self, states: Mapping[str, Any]) -> dict[str, bytes]:
        """Copies the states, each by its name; returns what `read` needs. They may change as soon as it returns."""
        places, pickles = _Places(), {}
        for name, state in states.items():
            pickled = io.BytesIO()
            _Pickler(pickled, places).dump(state)
            pickles[name] = pickled.getvalue()
        if places.end > len(self.memory):
            self.reserve(places.end)
        for storage, place in places.of_storage.values():
            source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self.memory[place.offset : place.offset + place.size].copy_(source, non_blocking=True)
        get_accelerator().synchronize()
        return pickles

    def read(self, pickles: Mapping[str, bytes]) -> Iterator[tuple[str, Any]]:
        """The states by name, one after the other; their tensors lie in the copy itself, on the CPU."""
        memory = _mapped(self.descriptor)
        for name, pickled in pickles.items():
            yield name, _Unpickler(io.BytesIO(pickled), memory).load()


def _on_cuda() -> bool:
    return bool(get_accelerator().device_name() == "cuda")


def _mapped(descriptor: int, flags: int = 0) -> mmap.mmap:
    """The memory file, which must not be empty, in this process."""
    return mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED | flags)


class _Places:
    """Gives each storage a place, one after the other."""

    def __init__(self) -> None:
        self.of_storage: dict[int, tuple[torch.UntypedStorage, Place]] = {}
        self.end = 0  # bytes

    def find(self, storage: torch.UntypedStorage) -> Place:
        if storage._cdata not in self.of_storage:
            place = Place(len(self.of_storage), self.end, storage.nbytes())
            self.of_storage[storage._cdata] = storage, place
            self.end += -(-place.size // ALIGNMENT) * ALIGNMENT
        return self.of_storage[storage._cdata][1]


class _Pickler(pickle.Pickler):
    """Pickles a state without its storages."""

    def __init__(self, output: io.BytesIO, places: _Places) -> None:
        super().__init__(output)
        self.places = places

    def persistent_id(self, value: Any) -> tuple[Place, torch.dtype] | None:
        """The place of a storage, which torch gives its tensor's dtype; None for everything else."""
        if isinstance(value, torch.storage.TypedStorage):
            return self.places.find(value._untyped_storage), value.dtype
        return None


class _Unpickler(pickle.Unpickler):
    """Restores a state over the memory file."""

    def __init__(self, pickled: io.BytesIO, memory: mmap.mmap) -> None:
        super().__init__(pickled)
        self.memory = memory
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, found: tuple[Place, torch.dtype]) -> torch.storage.TypedStorage:
        (number, offset, size), dtype = found
        if number not in self.storages:
            # A storage of its own, not a part of the whole memory: torch.save writes whole storages.
            one = (
                torch.frombuffer(self.memory, dtype=torch.uint8, offset=offset, count=size) if size else torch.empty(0)
            )
            self.storages[number] = one.untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=self.storages[number], dtype=dtype, _internal=True)
