"""Checks between the ranks of `mirage-launch doctor`: network, clocks, and what must be equal on all nodes.

Every rank calls every function in the same order; only the rows of rank 0 are used.
"""

import os
import time

import torch
from deepspeed.accelerator import get_accelerator

from launch.doctor.findings import Report, Row
from mirage_ds.zero3 import distributed

TIMEOUT_S = 120  # the slowest node must finish its own checks within this time
REDUCED_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
ROUNDS = 5
SLOW_GB_PER_S = 1.25  # 10 Gbit/s; a fast network between GPUs gives more
MAX_CLOCK_OFFSET_S = 1.0


def join() -> Row | None:
    """Joins the other ranks; returns a row only if that fails."""
    try:
        distributed.init(TIMEOUT_S)
        distributed.barrier()
    except RuntimeError as error:  # the type of torch's network errors
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return Row(
            "network",
            f"rank {os.environ['RANK']} cannot join the others at {where}: {str(error).splitlines()[0]}",
            "fail",
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface; open the nodes' firewalls",
        )
    return None


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def measure_bandwidth() -> Row:
    """The bus bandwidth of an all-reduce of one large tensor, the fastest of ROUNDS.

    In a ring of n ranks, each rank moves 2 (n - 1) / n of the tensor's bytes; bus bandwidth = these bytes / time.
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
        remedy = "check with NCCL_DEBUG=INFO which network NCCL uses; choose with NCCL_SOCKET_IFNAME or NCCL_IB_HCA"
        return Row("all-reduce", found, "warn", remedy)
    return Row("all-reduce", found)


def compare_clocks() -> Row:
    """The clock offset of each rank from rank 0, which assumes that the answer was sent midway through the round trip.

    offset = answer - (sent + received) / 2 of the shortest of ROUNDS round trips; its error is at most half of that
    round trip.
    """
    clock = torch.zeros(1, dtype=torch.float64, device=device())
    offsets = [(0.0, 0.0)]  # offset and half a round trip, in seconds, of each rank
    for other in range(1, distributed.world_size()):
        trips = []
        for _ in range(ROUNDS):
            if distributed.is_main():
                sent_s = time.time()
                torch.distributed.send(clock, other)
                torch.distributed.recv(clock, other)
                answer_s, received_s = clock.item(), time.time()
                trips.append((received_s - sent_s, answer_s - (sent_s + received_s) / 2))
            elif distributed.rank() == other:
                torch.distributed.recv(clock, 0)
                clock.fill_(time.time())
                torch.distributed.send(clock, 0)
        offsets += [(offset, trip / 2) for trip, offset in sorted(trips)[:1]]
    worst, error = max(offsets, key=lambda each: abs(each[0]))
    found = f"largest offset from rank 0: {abs(worst) * 1e3:.1f} ms (+- {error * 1e3:.1f} ms)"
    if abs(worst) > MAX_CLOCK_OFFSET_S:
        remedy = "start chronyd or ntpd on the nodes: log times are wrong, and MUNGE rejects offsets of minutes"
        return Row("clocks", found, "warn", remedy)
    return Row("clocks", found)


def gather(report: Report) -> list[Report]:
    """Every rank's report, on every rank."""
    reports = [report] * distributed.world_size()
    torch.distributed.all_gather_object(reports, report)
    return reports


def check_same(reports: list[Report]) -> list[Row]:
    """What must be equal on all nodes, so that all ranks compute the same run."""
    rows = []
    for name in reports[0].same:
        if len({report.same[name] for report in reports}) > 1:
            each = ", ".join(dict.fromkeys(f"{report.host}: {report.same[name]:.40}" for report in reports))
            rows.append(Row(f"same {name}", f"differs: {each}", "fail", "install or copy the same one on every node"))
    return rows or [Row("same on all nodes", ", ".join(reports[0].same))]
