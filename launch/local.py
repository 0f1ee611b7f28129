"""`mirage-launch local`: starts the ranks of a run on this machine, and ends them together; no process is left."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from packaging.version import Version

from mirage_ds.early_checks import check_inputs
from mirage_ds.errors import ConfigError
from mirage_ds.owner import refuse_living
from mirage_ds.paths import expanded
from mirage_ds.programs import without_current_folder
from mirage_ds.recipe import load_config
from mirage_ds.training.folder_checks import check_folder_is_free, check_folders_are_writable
from mirage_ds.versions import check_versions

GRACE_S = 30  # from SIGTERM to SIGKILL, for the other ranks when one has failed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What the ranks get for a signal to the launcher. After SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 the trainer saves
# and ends.
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGHUP,  # the terminal was closed, or the connection to it lost
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
    signal.SIGINT: signal.SIGTERM,  # Ctrl-C
    signal.SIGQUIT: signal.SIGKILL,  # Ctrl-\: at once, without a checkpoint
}


@expanded()
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
    check_inputs(config)
    check_folder_is_free(config.run)
    check_folders_are_writable(config)
    refuse_living(config.run.dir)
    ranks = number_of_ranks(ranks)
    config.train.samples_per_rank(ranks)
    command = [sys.executable, "-u", "-m", "mirage_ds.train", str(recipe), *(overrides or [])]
    sys.exit(Launch(command, ranks).wait())


def number_of_ranks(wanted: int | None) -> int:
    """How many ranks to start on this machine.

    Args:
        wanted: None: one per GPU, or 1 without a GPU.

    Raises:
        ConfigError: more are wanted than there are GPUs.
    """
    gpus = count_gpus()
    if wanted and gpus and wanted > gpus:
        raise ConfigError(
            f"more ranks than GPUs (--ranks {wanted}, on this machine): allowed are 1 to {gpus}, one for each GPU; set "
            "another --ranks, or CUDA_VISIBLE_DEVICES, or DS_ACCELERATOR=cpu to use no GPU"
        )
    return wanted or max(1, gpus)


def count_gpus() -> int:
    """GPUs that a rank would see. Another process asks torch, whose memory and threads the launcher does not need."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or Version(version("torch")).local == "cpu":
        return 0
    question = "import torch; print(torch.cuda.device_count())"
    environment = without_current_folder(os.environ)
    done = subprocess.run([sys.executable, "-c", question], stdout=subprocess.PIPE, check=True, env=environment)
    return int(done.stdout)


class Launch:
    """The ranks; each leads a process group that has its DataLoader's workers too.

    A signal to the launcher and the end of a rank are bytes in a pipe, which `wait` reads one by one: none is missed,
    not even one that comes while the ranks are being started.
    """

    def __init__(
        self,
        command: list[str],
        num_ranks: int,
        grace_s: int = GRACE_S,
        on_interrupt: str = "saving and ending; Ctrl-\\ ends the run at once, unsaved",
    ) -> None:
        """
        Args:
            command: what each rank runs, with the variables that torch.distributed reads.
            grace_s: seconds from SIGTERM to SIGKILL for the other ranks after one has failed.
            on_interrupt: what is said after a Ctrl-C.
        """
        self.grace_s, self.on_interrupt = grace_s, on_interrupt
        self.code = 0  # the launcher's own exit code
        self.cause = ""  # which rank failed first: what the others print after it follows from that
        self.signals, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        for number in (signal.SIGCHLD, signal.SIGALRM, *FORWARDED):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, lambda *_: None)
        # Bound but never listening, it reserves the port for rank 0, which listens there some seconds later.
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
            env=threads | without_current_folder(os.environ) | {name: str(value) for name, value in place.items()},
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=die_with(os.getpid()),
        )

    def wait(self) -> int:
        """Waits until no rank is left. Returns the exit code of the first that failed; 128 + n means signal n."""
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
                    say(self.on_interrupt)
                self.send(FORWARDED[number])
        if self.cause:
            say(f"{self.cause}; read its message above")
        # Saved or not: in a shell, `stage 1 && stage 2` must not continue with stage 2 after a Ctrl-C.
        return self.code or (128 + signal.SIGINT if interrupted else 0)

    def send(self, number: signal.Signals) -> None:
        for rank in self.ranks.values():
            os.kill(rank.pid, number)  # not yet waited for, so no other process can have this pid

    def reap(self) -> None:
        """Cleans up after the ranks that have ended. After the first failure it ends the others."""
        for rank, process in list(self.ranks.items()):
            if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            os.killpg(process.pid, signal.SIGKILL)  # workers of a rank that was killed; the rank itself is a zombie
            del self.ranks[rank]
            if process.wait() and not self.code:
                killer = -process.returncode
                self.code = 128 + killer if killer > 0 else process.returncode
                end = signal.Signals(killer).name if killer > 0 else f"exit code {self.code}"
                if self.ranks:
                    self.cause = f"rank {rank} failed first, with {end}"
                say(f"rank {rank} ended with {end}" + ("; ending the other ranks" if self.ranks else ""))
                self.send(signal.SIGTERM)
                signal.alarm(self.grace_s)


def say(text: str) -> None:
    with suppress(OSError):  # in `... | tee log`, Ctrl-C ends tee first; a terminal may be closed
        print(f"mirage-launch: {text}", file=sys.stderr, flush=True)


def die_with(parent: int) -> Callable[[], None]:
    """What a new process does first: asks for SIGKILL when its parent ends, and checks that it has not ended yet."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask
