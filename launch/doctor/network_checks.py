"""What the ranks of `mirage-launch doctor` find together: the network between them, their clocks, what must be equal.

Every rank calls every function, in the same order; only rank 0's rows mean something.
"""

import os
import time

import torch
from deepspeed.accelerator import get_accelerator

from launch.doctor.findings import Report, Row
from mirage_ds.zero3 import distributed

TIMEOUT_S = 120  # for the slowest node's other checks, before it joins
REDUCED_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
ROUNDS = 5
SLOW_GB_PER_S = 1.25  # 10 Gbit/s: no fast network is in use between the GPUs
CLOCKS_APART_S = 1.0


def join() -> Row | None:
    """Joins the other ranks; a row if that fails."""
    try:
        distributed.init(TIMEOUT_S)
        distributed.barrier()
    except RuntimeError as error:  # torch's network errors are of this kind
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return Row(
            "network",
            f"rank {os.environ['RANK']} cannot join the others at {where}: {str(error).splitlines()[0]}",
            "fail",
            "name the network device in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; let the nodes' firewalls pass",
        )
    return None


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def measure_bandwidth() -> Row:
    """All-reduce of one large tensor, the fastest of ROUNDS.

    With n ranks in a ring each moves 2 (n - 1) / n of its bytes; that over the time is the bus bandwidth.
    """
    ranks = distributed.world_size()
    where = device()
    tensor = torch.zeros(REDUCED_BYTES[where.type] // 4, device=where)
    seconds = []
    for _ in range(ROUNDS):
        distributed.barrier()
        get_accelerator().synchronize()
        started_s = time.monotonic()
        distributed.sum_over_ranks(tensor)
        get_accelerator().synchronize()
        seconds.append(time.monotonic() - started_s)
    gb_per_s = tensor.nbytes / min(seconds) * 2 * (ranks - 1) / ranks / 1e9
    found = f"{gb_per_s:.3g} GB/s bus bandwidth ({ranks} ranks, {tensor.nbytes / 2**20:.0f} MiB on {where.type})"
    if where.type != "cpu" and gb_per_s < SLOW_GB_PER_S:
        remedy = "see with NCCL_DEBUG=INFO which network NCCL takes; name it in NCCL_SOCKET_IFNAME or NCCL_IB_HCA"
        return Row("all-reduce", found, "warn", remedy)
    return Row("all-reduce", found)


def compare_clocks() -> Row:
    """Each rank's clock against rank 0's, which asks and takes the answer for the time in the middle of its waiting.

    offset = answer - (asked + received) / 2 in the shortest of ROUNDS round trips; at most half of that is its error.
    """
    clock = torch.zeros(1, dtype=torch.float64, device=device())
    offsets = [(0.0, 0.0)]  # offset and half a round trip, in seconds, of each rank
    for other in range(1, distributed.world_size()):
        trips = []
        for _ in range(ROUNDS):
            if distributed.is_main():
                asked_s = time.time()
                torch.distributed.send(clock, other)
                torch.distributed.recv(clock, other)
                answer_s, received_s = clock.item(), time.time()
                trips.append((received_s - asked_s, answer_s - (asked_s + received_s) / 2))
            elif distributed.rank() == other:
                torch.distributed.recv(clock, 0)
                clock.fill_(time.time())
                torch.distributed.send(clock, 0)
        offsets += [(offset, trip / 2) for trip, offset in sorted(trips)[:1]]
    worst, error = max(offsets, key=lambda each: abs(each[0]))
    found = f"at most {abs(worst) * 1e3:.1f} ms from rank 0's (+- {error * 1e3:.1f} ms)"
    if abs(worst) > CLOCKS_APART_S:
        remedy = "start chronyd or ntpd on the nodes: heartbeats and logs name wrong times, and MUNGE refuses minutes"
        return Row("clocks", found, "warn", remedy)
    return Row("clocks", found)


def gather(report: Report) -> list[Report]:
    """Every rank's report, on every rank."""
    reports = [report] * distributed.world_size()
    torch.distributed.all_gather_object(reports, report)
    return reports


def check_same(reports: list[Report]) -> list[Row]:
    """What must not differ between the nodes, or their ranks compute different things."""
    rows = []
    for name in reports[0].same:
        if len({report.same[name] for report in reports}) > 1:
            each = ", ".join(dict.fromkeys(f"{report.host}: {report.same[name]:.40}" for report in reports))
            rows.append(Row(f"same {name}", f"differs: {each}", "fail", "give every node the same one"))
    return rows or [Row("the same", ", ".join(reports[0].same))]
