"""Times latent_pool on a GPU against three other ways to pool in torch, and checks the results of the same run.

    python benchmarks/latent_pool.py

All compute inputs and targets from the same embeddings (latent_pool also computes the targets' inverse norms):

    loop        split / mean / cat, image by image, as the reference does
    vectorised  one gather, one index_add over segment ids that are already on the GPU
    compiled    torch.compile of `vectorised`

Times are of complete calls. Those of latent_pool include its checks on the host and the copy of its bounds to the GPU,
while the indices of the other ways are already on the GPU; with few images that host work is most of its time. No time
includes the computation of the segments.

Counted bytes: each pooled patch once, inputs and targets once, and nothing else, whatever a way really moves:
(patches * D + N * D) * itemsize + N * D * 4. The rate is compared with a copy on the same card, reads and writes
counted. Times are medians over runs with a cleared L2 cache (triton.testing.do_bench). Before it is timed, each way is
compared with the definition in float64, as it is timed and with new memory filled with NaN.

`--device cpu --small` only tests the script; its times mean nothing.
"""

import argparse
import platform
import random
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch

from mirage_ds.ops import latent_pool_definition as definition
from mirage_ds.ops.latent_pool import describe_path, latent_pool
from mirage_ds.ops.segments import Segments, batch_segments

Pool = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Inputs [N, D] and targets [N, D]."""

SIDES = (8, 36)  # merged patches along a side: 64 to 1296 in an image
LATENT_SIZES = (2, 16)
COPY_BYTES = 2**31


def draw_images(number: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Grids and K of images of mixed sizes, the same in every run."""
    draw = random.Random(number)
    sides = [(draw.randint(*SIDES), draw.randint(*SIDES)) for _ in range(number)]
    return sides, [draw.randint(*LATENT_SIZES) for _ in range(number)]


def loop(embeds: torch.Tensor, num_patches: list[int], latent_sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    images = zip(embeds.split(num_patches), latent_sizes, strict=True)
    pooled = [image[: len(image) // k * k].float().unflatten(0, (k, -1)).mean(dim=1) for image, k in images]
    targets = torch.cat(pooled)
    return targets.to(embeds.dtype), targets


def vectorised(
    embeds: torch.Tensor, rows: torch.Tensor, segments: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools `rows`, with the segment of each [pooled patches] and the lengths of the segments [N]."""
    sums = embeds.new_zeros((len(lengths), embeds.shape[1]), dtype=torch.float32)
    targets = sums.index_add(0, segments, embeds[rows].float()) / lengths[:, None]
    return targets.to(embeds.dtype), targets


def time_s(pool: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started_s = time.perf_counter()
        pool()
        return time.perf_counter() - started_s
    from triton.testing import do_bench

    milliseconds: float = do_bench(pool, return_mode="median")
    return milliseconds / 1000


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / time_s(lambda: target.copy_(source), device)


def check(name: str, pool: Pool, exact: torch.Tensor) -> None:
    """Compares with float64 targets [N, D], as it is timed and with new memory filled with NaN (deterministic mode)."""
    for poisoned in (False, True):
        torch.use_deterministic_algorithms(poisoned, warn_only=True)
        inputs, targets = pool()
        torch.use_deterministic_algorithms(False)
        close = partial(torch.testing.assert_close, atol=1e-5, msg=lambda why: f"{name}: {why}")
        close(targets.double(), exact, rtol=1e-5)
        close(inputs, exact.to(inputs.dtype), rtol=torch.finfo(inputs.dtype).eps)


def ways(embeds: torch.Tensor, segments: Segments, num_patches: list[int], latent_sizes: list[int]) -> dict[str, Pool]:
    bounds, device = segments.bounds, embeds.device
    lengths = bounds.diff(dim=1).flatten()
    rows = torch.cat([torch.arange(begin, end) for begin, end in bounds.tolist()]).to(device)
    ids = torch.arange(len(bounds)).repeat_interleave(lengths).to(device)
    lengths = lengths.to(device)
    torch.compiler.reset()  # otherwise earlier shapes use up the limit of graphs, and it stops compiling
    compiled = torch.compile(vectorised, dynamic=True, backend="eager" if device.type == "cpu" else "inductor")
    return {
        "latent_pool": lambda: latent_pool(embeds, bounds, None, len(bounds), embeds.dtype)[:2],
        "loop": lambda: loop(embeds, num_patches, latent_sizes),
        "vectorised": lambda: vectorised(embeds, rows, ids, lengths),
        "compiled": lambda: compiled(embeds, rows, ids, lengths),
    }


def run_case(
    grids: list[tuple[int, int]], latent_sizes: list[int], dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, dict[str, float]]:
    """The counted bytes, and the time of each way in seconds."""
    num_patches = [rows * columns for rows, columns in grids]
    segments = batch_segments(grids, latent_sizes, "average")
    assert segments is not None
    generator = torch.Generator(device).manual_seed(0)
    embeds = torch.randn(sum(num_patches), dim, generator=generator, device=device, dtype=dtype)
    exact = torch.cat(
        [
            definition.latent_pool(image.double(), *own, torch.float64)[1]
            for image, grid, size in zip(embeds.split(num_patches), grids, latent_sizes, strict=True)
            if (own := batch_segments([grid], [size], "average"))
        ]
    )
    times = {}
    for name, pool in ways(embeds, segments, num_patches, latent_sizes).items():
        check(name, pool, exact)
        times[name] = time_s(pool, device)
    pooled = int(segments.bounds.diff(dim=1).sum())
    return (pooled + len(exact)) * dim * dtype.itemsize + len(exact) * dim * 4, times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="two images of D 64 only")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU found; times are taken on a GPU; --device cpu --small only tests the script")
    numbers, dims, copy_bytes = ((1, 8, 64, 256), (2048, 3584, 5120, 8192), COPY_BYTES)
    if arguments.small:
        numbers, dims, copy_bytes = (2,), (64,), 2**20
    cases = [(f"{number} x mixed", *draw_images(number)) for number in numbers]
    if not arguments.small:
        cases.append(("64 x 324", [(18, 18)] * 64, [4] * 64))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    rate = copy_rate(device, copy_bytes)
    print(f"{card}; torch {version('torch')}; {describe_path(device)}; copy {rate / 1e9:.0f} GB/s")
    print("| images | D | dtype | MB | latent_pool us | GB/s | of copy | loop us | vectorised us | compiled us |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, grids, latent_sizes in cases:
        for dim in dims:
            for dtype in (torch.bfloat16, torch.float32):
                num_bytes, times = run_case(grids, latent_sizes, dim, dtype, device)
                own, *others = (f"{seconds * 1e6:.1f}" for seconds in times.values())
                reached = num_bytes / times["latent_pool"]
                print(
                    f"| {name} | {dim} | {str(dtype).removeprefix('torch.')} | {num_bytes / 1e6:.1f} | {own} | "
                    f"{reached / 1e9:.0f} | {reached / rate:.0%} | {' | '.join(others)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
