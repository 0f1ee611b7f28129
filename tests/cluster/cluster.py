"""A real SLURM cluster on this machine: slurmctld, munged, and for each node a slurmd in its own namespaces.

A node is a network, mount, host name and process namespace; a bridge in the namespace of the control machine connects
the nodes, so that links can be cut and nodes powered off. The cluster cannot be reached from outside. All nodes share
the file system, except for the folder `local`: each has its own. Needs root, and Debian's slurm-wlm and munge.
"""

import ipaddress
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

NETWORK = ipaddress.ip_network("10.77.0.0/24")
CONTROL_IP = "10.77.0.254"
SLURMD_TIMEOUT_S, KILL_WAIT_S = 15, 20
FREEZER = Path("/sys/fs/cgroup/freezer")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip")

# cgroup, as on real clusters: signals reach the first process of a task, and processes that it leaves are killed.
# MessageTimeout, TCPTimeout: a lost node is detected after 19 to 26 s; with the defaults it may take 35 s.
# cred_expire: a requeued job may start one second after this time; the default is two minutes.
CONFIGURATION = """\
ClusterName={prefix}
SlurmctldHost={prefix}ctl({control_ip})
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SlurmdTimeout={slurmd_timeout_s}
KillWait={kill_wait_s}
MinJobAge=3600
MessageTimeout=6
TCPTimeout=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs=4 RealMemory=8000 State=UNKNOWN
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if it can."""
    if os.geteuid() != 0:
        return "a SLURM cluster in namespaces needs root"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge iproute2 util-linux"
    if not FREEZER.is_dir():
        return f"SLURM's process tracking needs the cgroup freezer, but {FREEZER} does not exist"
    return None


def is_alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float, details: Callable[[], str] = str) -> None:
    """Polls until the condition holds; `details` is added to the error message."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() < start_s + deadline_s, f"not in {deadline_s} s: {what}\n{details()}"
        time.sleep(0.05)


class Cluster:
    """Runs as long as its `with` block."""

    def __init__(self, num_nodes: int) -> None:
        # munged requires that all users may enter the folders above its socket, unlike pytest's folders
        self.folder = Path(tempfile.mkdtemp(prefix="mirage-cluster-"))
        self.folder.chmod(0o755)
        self.prefix = f"c{os.getpid()}"  # cgroups are named after nodes: two clusters at once need different names
        self.ips = {f"{self.prefix}n{number}": str(NETWORK[number]) for number in range(1, num_nodes + 1)}
        self.nodes = list(self.ips)
        self.local = self.folder / "local"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.inits: dict[str, int] = {}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "log", "local"):
            (self.folder / name).mkdir()
        self._write_configuration()
        try:
            self._start_munge()
            self._start_control()
            for node in self.nodes:
                self.power_on(node)
            wait_until(self._all_idle, "all nodes idle", 60, self._logs)
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._down()

    def _write_configuration(self) -> None:
        lines = [f"NodeName={node} NodeAddr={ip}" for node, ip in self.ips.items()]
        text = CONFIGURATION.format(
            prefix=self.prefix,
            control_ip=CONTROL_IP,
            folder=self.folder,
            slurmd_timeout_s=SLURMD_TIMEOUT_S,
            kill_wait_s=KILL_WAIT_S,
            nodes="\n".join(lines),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        hosts = {"localhost": "127.0.0.1", f"{self.prefix}ctl": CONTROL_IP} | self.ips
        (self.folder / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in hosts.items()))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("wb") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _start_munge(self) -> None:
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        options = [f"--{option}={self.folder / file}" for option, file in files.items()]
        self._start("munged", "munged", "--foreground", f"--log-file={self.folder / 'log' / 'munged'}", *options)
        wait_until((self.folder / "munge.sock").exists, "munged's socket", 30, self._logs)

    def _start_control(self) -> None:
        script = f"""
            set -e
            hostname {self.prefix}ctl
            mount --bind {self.folder}/hosts /etc/hosts
            ip link set lo up
            ip link add br0 type bridge
            ip address add {CONTROL_IP}/24 dev br0
            ip link set br0 up
            touch {self.folder}/ready.ctl
            exec slurmctld -D -f {self.folder}/slurm.conf
        """
        namespaces = ("--net", "--mount", "--uts", "--propagation=private")
        self._start("ctl", "unshare", *namespaces, "bash", "-c", script)
        self._wait_ready("ctl")

    def _wait_ready(self, name: str) -> None:
        mark = self.folder / f"ready.{name}"
        wait_until(lambda: mark.exists() or not is_alive(self.daemons[name]), f"{name} ready", 30, self._logs)
        assert mark.exists(), self._logs()
        mark.unlink()

    def power_on(self, node: str) -> None:
        """Starts a node, for the first time or after `power_off`."""
        # The first process of the node outlives slurmd, and reaps orphaned processes.
        script = f"""
            set -e
            hostname {node}
            mount --bind {self.folder}/hosts /etc/hosts
            mount -t tmpfs tmpfs /dev/shm
            mount -t tmpfs -o size=256m tmpfs {self.local}
            ip link set lo up
            touch {self.folder}/ready.{node}
            until ip -brief address show eth0 2>/dev/null | grep -q {self.ips[node]}; do sleep 0.02; done
            slurmd -D -f {self.folder}/slurm.conf &
            while :; do wait -n || sleep 0.2; done
        """
        namespaces = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._start(node, "unshare", *namespaces, "--propagation=private", "bash", "-c", script)
        self._wait_ready(node)
        (init,) = Path(f"/proc/{self.daemons[node].pid}/task/{self.daemons[node].pid}/children").read_text().split()
        self.inits[node] = int(init)
        port = self._port(node)
        subprocess.run([*self._in_control(), "ip", "link", "delete", port], capture_output=True, check=False)
        # the same address after each start, like a network card: the other nodes cache it
        address = f"02:00:00:00:00:{self.nodes.index(node) + 1:02x}"
        self._control(
            "ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "address", address, "netns", init
        )
        self._control("ip", "link", "set", port, "master", "br0", "up")
        inside = ("nsenter", "--target", init, "--net", "ip")
        subprocess.run([*inside, "link", "set", "eth0", "up"], check=True)
        subprocess.run([*inside, "address", "add", f"{self.ips[node]}/24", "dev", "eth0"], check=True)

    def _port(self, node: str) -> str:
        return f"port{self.nodes.index(node)}"

    def _in_control(self) -> tuple[str, ...]:
        return ("nsenter", "--target", str(self.daemons["ctl"].pid), "--net", "--mount", "--uts")

    def _control(self, *command: str) -> None:
        subprocess.run([*self._in_control(), *command], check=True)

    def cut(self, node: str) -> None:
        """Cuts the node's link."""
        self._control("ip", "link", "set", self._port(node), "down")

    def reconnect(self, node: str) -> None:
        self._control("ip", "link", "set", self._port(node), "up")

    def power_off(self, node: str) -> None:
        """Cuts the link first, so that no daemon is notified."""
        self.cut(node)
        self.daemons[node].kill()
        self.daemons[node].wait()

    def is_on(self, node: str) -> bool:
        return is_alive(self.daemons[node])

    def run(
        self, *command: str, environment: dict[str, str] | None = None, cwd: Path | None = None, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the control machine, where users log in; its exit code must be `code`."""
        done = subprocess.run(
            [*self._in_control(), f"--wd={cwd or self.folder}", *command],
            env=(environment or dict(os.environ)) | {"SLURM_CONF": str(self.folder / "slurm.conf")},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == code, f"{' '.join(command)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def processes(self, node: str) -> dict[int, str]:
        """Command lines of the processes on a node, by this machine's process ids."""
        namespace = os.readlink(f"/proc/{self.inits[node]}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                if os.readlink(folder / "ns" / "pid") == namespace:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return found

    def job(self, number: str) -> dict[str, str]:
        """SLURM's record of a job: JobState, Restarts, NodeList, ExcNodeList and more."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(field.partition("=")[::2] for field in shown.split())

    def expand(self, nodes: str) -> list[str]:
        return self.run("scontrol", "show", "hostnames", nodes).stdout.split()

    def _all_idle(self) -> bool:
        shown = self.run("sinfo", "--noheader", "--partition=batch", "--format=%T:%D").stdout.strip()
        return shown == f"idle:{len(self.nodes)}"

    def _logs(self) -> str:
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def _down(self) -> None:
        for name, process in self.daemons.items():
            # a node's processes, and slurmctld, end with the first process; on SIGTERM munged removes its socket
            process.send_signal(signal.SIGTERM if name == "munged" else signal.SIGKILL)
            process.wait()
        for node in self.nodes:
            for folder in sorted(FREEZER.glob(f"slurm_{node}/**/"), reverse=True):  # children before their parents
                _remove_cgroup(folder)
        shutil.rmtree(self.folder)


def _remove_cgroup(folder: Path) -> None:
    """Retries until the killed processes of the group are gone."""

    def removed() -> bool:
        try:
            folder.rmdir()
        except OSError:
            return not folder.exists()
        return True

    wait_until(removed, f"{folder} removed", 30)
