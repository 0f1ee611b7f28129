"""Does tasks in processes; results come in the order of the tasks, and few of them are in memory at a time.

Each worker has one task at a time, over a pipe of its own: when this process ends, however it does, the pipes close and
the workers end. Signals for the whole group of processes are this process's to answer.
"""

import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from mirage_ds.errors import MemoryFullError

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 3  # tasks for each worker that may wait for an earlier one


def all_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[tuple[Task, Result]]:
    """Yields (task, its result) in the order of the tasks.

    Args:
        work: a function of a module, with tasks and results that can be pickled.
        num_workers: 1: this process does the work.

    Raises:
        MemoryFullError: a worker was killed.
    """
    if num_workers == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    context = get_context("forkserver")  # this process has threads, which a fork does not have
    context.set_forkserver_preload([work.__module__])
    with ExitStack() as until_the_end:
        idle: list[Connection] = []
        for _ in range(num_workers):
            own, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs), daemon=True)
            process.start()
            theirs.close()
            until_the_end.callback(process.join)
            until_the_end.callback(process.kill)
            idle.append(own)
        yield from _deal(iter(tasks), idle)


def _deal(tasks: Iterator[Any], idle: list[Connection]) -> Iterator[tuple[Any, Any]]:
    most = len(idle) * (1 + _AHEAD)
    waiting: deque[int] = deque()  # numbers of the tasks whose result was not yielded
    done: dict[int, tuple[Any, Any]] = {}
    busy: dict[Connection, tuple[int, Any]] = {}
    number = 0
    while True:
        while idle and len(waiting) < most and (task := next(tasks, None)) is not None:
            worker = idle.pop()
            _send(worker, task)
            busy[worker] = (number, task)
            waiting.append(number)
            number += 1
        if not waiting:
            return
        if is_next := waiting[0] in done:
            yield done.pop(waiting.popleft())
        ready: list[Any] = wait(list(busy), timeout=0 if is_next else None)
        for connection in ready:
            its_number, task = busy.pop(connection)
            done[its_number] = (task, _receive(connection))
            idle.append(connection)


def _send(worker: Connection, task: Any) -> None:
    try:
        worker.send(task)
    except OSError as error:
        raise _killed() from error


def _receive(worker: Connection) -> Any:
    try:
        is_result, answer = worker.recv()
    except (EOFError, OSError) as error:
        raise _killed() from error
    if not is_result:
        raise RuntimeError(f"in a worker:\n{answer}")
    return answer


def _killed() -> MemoryFullError:
    return MemoryFullError(
        "a worker was killed (of this build); most often there was too little memory for so many; allowed: 1 worker or "
        "more; use fewer --workers"
    )


def _serve(work: Callable[[Any], Any], tasks: Connection) -> None:
    """A worker: until there are no more tasks, or whoever gives them has ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        while True:
            task = tasks.recv()
            try:
                answer = (True, work(task))
            except Exception:  # noqa: BLE001  # of any kind; it is raised again where the tasks are
                answer = (False, traceback.format_exc())
            tasks.send(answer)
    except (EOFError, OSError):
        return
