"""`mirage-launch local`: the ranks of a run as processes of this machine, ended together, none left behind."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from mirage_ds.errors import ConfigError
from mirage_ds.recipe import load_config
from mirage_ds.versions import check_versions

GRACE_S = 30  # from SIGTERM to SIGKILL, for the other ranks when one has failed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What the ranks get for a signal to the launcher. At the first three the trainer saves and ends.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGINT: signal.SIGTERM,  # Ctrl-C
    signal.SIGQUIT: signal.SIGKILL,  # Ctrl-\, for whoever will not wait for the save
}


def local(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, for example one of launch/recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, values in YAML.")] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, show_default="one per GPU; 1 without a GPU", help="Processes.")
    ] = None,
) -> None:
    """Trains on this machine: starts the ranks, passes signals on to them, and leaves none behind."""
    check_versions()
    config = load_config(recipe, overrides)
    gpus = count_gpus()
    if ranks and gpus and ranks > gpus:
        raise ConfigError(
            f"there are not so many GPUs (--ranks {ranks}, on this machine): allowed are 1 to {gpus}, one for each; "
            "set another --ranks, or CUDA_VISIBLE_DEVICES, or DS_ACCELERATOR=cpu to train without GPUs"
        )
    ranks = ranks or max(1, gpus)
    config.train.accumulation_steps(ranks)
    command = [sys.executable, "-u", "-m", "mirage_ds.train", str(recipe), *(overrides or [])]
    sys.exit(Launch(command, ranks).wait())


def count_gpus() -> int:
    """GPUs that a rank would see. A process of its own asks: torch takes memory and threads, and here it stays out."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    question = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", question], stdout=subprocess.PIPE, check=True).stdout)


class Launch:
    """Ranks, each the leader of a process group that holds its DataLoader's workers too.

    A signal to the launcher and the end of a rank are bytes in a pipe, which `wait` reads one by one: none is missed,
    not even one that comes while the ranks are started.
    """

    def __init__(self, command: list[str], num_ranks: int, grace_s: int = GRACE_S) -> None:
        """
        Args:
            command: what each rank runs, with the variables that torch.distributed reads.
        """
        self.grace_s = grace_s
        self.code = 0  # the launcher's own exit code
        self.cause = ""  # what others say after it, for example of a lost connection, follows from it
        self.signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        for number in (signal.SIGCHLD, signal.SIGALRM, *FORWARDED):
            signal.signal(number, lambda *_: None)
        # Bound and never listening, it keeps the port free for rank 0, which listens there some seconds later.
        self.port = socket.socket()
        self.port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port.bind(("127.0.0.1", 0))
        self.ranks = {rank: self.start(command, rank, num_ranks) for rank in range(num_ranks)}

    def start(self, command: list[str], rank: int, num_ranks: int) -> subprocess.Popen[bytes]:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self.port.getsockname()[1],
        }
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_ranks))}  # unless a user says more
        return subprocess.Popen(
            command,
            env=threads | os.environ | {name: str(value) for name, value in place.items()},
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=die_with(os.getpid()),
        )

    def wait(self) -> int:
        """Until no rank is left. Returns the exit code of the first one that failed; 128 + n stands for signal n."""
        interrupted = False
        while self.ranks:
            number = signal.Signals(os.read(self.signals, 1)[0])
            if number == signal.SIGCHLD:
                self.reap()
            elif number == signal.SIGALRM:
                self.send(signal.SIGKILL)
            else:
                if number == signal.SIGINT:
                    interrupted = True
                    say("the run saves and ends; Ctrl-\\ ends it at once")
                self.send(FORWARDED[number])
        if self.cause:
            say(f"{self.cause}; its message above is the one to read")
        # Saved or not: in a shell, `stage 1 && stage 2` shall not go on with stage 2 after a Ctrl-C.
        return self.code or (128 + signal.SIGINT if interrupted else 0)

    def send(self, number: signal.Signals) -> None:
        for rank in self.ranks.values():
            os.kill(rank.pid, number)  # not yet waited for, so no other process can have this pid

    def reap(self) -> None:
        """Takes leave of the ranks that ended, and of what they left. When the first one fails, all shall end."""
        for rank, process in list(self.ranks.items()):
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            os.killpg(process.pid, signal.SIGKILL)  # workers of a rank that was killed; itself it is a zombie by now
            del self.ranks[rank]
            if process.wait() and not self.code:
                killer = -process.returncode
                self.code = 128 + killer if killer > 0 else process.returncode
                end = signal.Signals(killer).name if killer > 0 else f"exit code {self.code}"
                if self.ranks:
                    self.cause = f"rank {rank} was the first that failed, with {end}"
                say(f"rank {rank} ended with {end}" + (", the others are ended" if self.ranks else ""))
                self.send(signal.SIGTERM)
                signal.alarm(self.grace_s)


def say(text: str) -> None:
    with suppress(BrokenPipeError):  # in `... | tee log`, Ctrl-C ends tee first
        print(f"mirage-launch: {text}", file=sys.stderr, flush=True)


def die_with(parent: int) -> Callable[[], None]:
    """What a new process does first: it asks for SIGKILL at its parent's end, and looks whether that came before."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask
