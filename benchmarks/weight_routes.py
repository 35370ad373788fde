"""What an update of the weights costs on each route, beside a plain copy of the same bytes in memory.

    python -m benchmarks.weight_routes                                  # about an hour, on an idle machine
    python -m benchmarks.weight_routes --sizes 10 --repeats 3 --name weight_routes_short

Real SGLang servers on this machine's CPU with random Qwen3 folders in float32: one server of one rank for every route,
then two servers of two ranks for `broadcast` and `shared`. Routes take turns with the copy. CPU-seconds are those of
this process and of all server processes. The first update of a route, which joins groups and makes buffers, is not
counted, and neither are digests and checksums. Bytes on the loopback interface are those of the whole machine. A route
that takes longer than --limit-s for one update is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.measure import markdown, table, write_result
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.errors import ServerError
from tropd_mcore.rollout.fleet_publisher import FleetPublisher, Target
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.process import ServerProcess, ServerSpec
from tropd_mcore.serving.weight_routes import RouteName

MB = 10**6
COPY = "copy"
SHAPES = {10: (256, 3), 100: (512, 8), 1000: (1024, 20)}
"""Size in MB -> (hidden size, layers): a layer has 12 x hidden^2 float32 weights."""
COPIED_BYTES = 2000 * MB
"""Bytes of the copies that are timed together."""
MODELS = {"8B": 16.0, "70B": 140.0}
"""Model -> GB of its weights in bfloat16."""
FLEETS: tuple[tuple[int, int, tuple[RouteName, ...]], ...] = (
    (1, 1, ("shared", "broadcast", "value", "disk")),
    (2, 2, ("shared", "broadcast")),
)
"""(servers, ranks of each, routes)."""


@dataclass
class Row:
    """The updates of one route. Lists have one entry per update."""

    megabytes: float
    servers: int
    ranks: int
    route: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    loopback_bytes: list[int] = field(default_factory=list)
    stored_bytes: int = 0
    """Bytes that the route writes into /dev/shm or files per update."""
    failed: str = ""


def folder_of(place: Path, megabytes: int) -> Path:
    """Write a random Qwen3 folder of about that size."""
    hidden, layers = SHAPES[megabytes]
    return write_tiny_model(
        place / f"model-{megabytes}",
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64,
    )  # fmt: skip


@contextmanager
def fleet(folder: Path, place: Path, servers: int, ranks: int, limit_s: float) -> Iterator[list[ServerProcess]]:
    """Servers that start at the same time."""
    config = ServerConfig(
        dtype="float32", max_total_tokens=1024, tensor_parallel=ranks, request_timeout_s=limit_s, max_retries=0,
        start_timeout_s=1200.0, hang_timeout_s=min(300.0, limit_s),
    )  # fmt: skip
    with ExitStack() as stack:
        running = []
        for index in range(servers):
            logs = Path(tempfile.mkdtemp(dir=place))
            spec = ServerSpec(
                key=f"rollout.servers.{index}", model_key="student.path", model_path=folder, config=config,
                device="cpu", run_dir=logs, name="rollout",
            )  # fmt: skip
            running.append(stack.enter_context(ServerProcess(spec)))
        with ThreadPoolExecutor(servers) as pool:
            list(pool.map(lambda server: (server.start(), server.wait_ready()), running))
        yield running


def cpu_seconds(servers: Sequence[ServerProcess]) -> float:
    """CPU-seconds so far of this process and of all processes of the servers."""
    processes = [psutil.Process()]
    for server in servers:
        assert server.pid is not None
        main = psutil.Process(server.pid)
        processes += [main, *main.children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def measure(row: Row, servers: Sequence[ServerProcess], act: Callable[[], None], *, times: int = 1) -> None:
    """Run `act` so often and add the cost of one run to the row."""
    cpu, wall = cpu_seconds(servers), time.perf_counter()
    network = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    for _ in range(times):
        act()
    row.seconds.append((time.perf_counter() - wall) / times)
    row.cpu_seconds.append((cpu_seconds(servers) - cpu) / times)
    row.loopback_bytes.append(psutil.net_io_counters(pernic=True)["lo"].bytes_sent - network)


def measured(place: Path, megabytes: int, repeats: int, limit_s: float, routes: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of one size."""
    folder = folder_of(place, megabytes)
    tensors = load_file(folder / "model.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    buffers = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    for count, ranks, possible in FLEETS:
        names = [name for name in possible if name in routes]
        if not names:
            continue
        with fleet(folder, place, count, ranks, limit_s) as servers:
            clients = [server.client() for server in servers]
            rows = {name: Row(size / MB, count, ranks, name) for name in (COPY, *names)}
            for name in ("shared", "disk"):
                if name in rows:
                    rows[name].stored_bytes = size
            publishers = {name: FleetPublisher(plan, student_folder=folder) for name in names}
            acts: dict[str, Callable[[int], None]] = {
                name: partial(publish, publishers[name], name, clients, tensors, place) for name in names
            }
            copies = max(1, COPIED_BYTES // size)
            acts[COPY] = partial(copy, tensors, buffers)
            for turn in range(repeats + 1):
                for name, row in rows.items():
                    if row.failed or any(seconds > limit_s for seconds in row.seconds):
                        continue
                    try:
                        # the kernel counts CPU time in steps of 10 ms, which one copy may not reach
                        measure(row, servers, partial(acts[name], turn), times=copies if name == COPY else 1)
                    except ServerError as error:
                        row.failed = str(error)
                    if turn == 0:  # joins groups and makes buffers
                        row.seconds, row.cpu_seconds, row.loopback_bytes = [], [], []
            for publisher in publishers.values():
                publisher.close()
            yield from rows.values()


def publish(
    publisher: FleetPublisher,
    route: RouteName,
    clients: Sequence[SglangClient],
    tensors: dict[str, Tensor],
    place: Path,
    turn: int,
) -> None:
    """One update of all servers. Raises ServerError."""
    targets = [Target(client, None, route, place) for client in clients]
    for error in publisher.publish(targets, iter(tensors.items()), f"{route}/{turn}").values():
        raise error


def copy(tensors: dict[str, Tensor], buffers: dict[str, Tensor], turn: int) -> None:
    """The plain copy of the same bytes."""
    for name, tensor in tensors.items():
        buffers[name].copy_(tensor)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median, least and most."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}g} [{min(values):.{digits}g}, {max(values):.{digits}g}]"


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's rows: each route beside the copy of the same servers and size."""
    found = []
    for row in rows:
        base = next(
            other for other in rows
            if other.route == COPY and (other.megabytes, other.servers) == (row.megabytes, row.servers)
        )  # fmt: skip
        times = ["-", "-"]
        if row.seconds and base.seconds:
            times = [
                f"{statistics.median(getattr(row, name)) / max(statistics.median(getattr(base, name)), 1e-9):.3g}"
                for name in ("seconds", "cpu_seconds")
            ]
        sent = statistics.median(row.loopback_bytes) / (row.megabytes * MB) if row.loopback_bytes else float("nan")
        found.append(
            [
                f"{row.megabytes:.0f} MB, {row.servers} x tp {row.ranks}", row.route, spread(row.seconds),
                spread(row.cpu_seconds), *times, f"{sent:.2f}", f"{row.stored_bytes / (row.megabytes * MB):.0f}",
                row.failed[:60],
            ]
        )  # fmt: skip
    return found


def extrapolated(rows: Sequence[Row]) -> list[list[str]]:
    """Seconds for larger models, on the line through the two largest sizes measured. Not measured."""
    found = []
    by_route: dict[tuple[int, int, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.seconds:
            point = row.megabytes / 1000, statistics.median(row.seconds)
            by_route.setdefault((row.servers, row.ranks, row.route), []).append(point)
    for (servers, ranks, route), points in by_route.items():
        if len(points) > 1:
            (low, fewer), (high, more) = sorted(points)[-2:]
            slope = (more - fewer) / (high - low)
            seconds = [f"{more + slope * (gigabytes - high):.0f}" for gigabytes in MODELS.values()]
            found.append([f"{servers} x tp {ranks}", route, *seconds])
    return found


HEADER = ["weights", "route", "seconds", "CPU-seconds", "x copy", "x copy, CPU", "loopback", "stored", "failed"]


def page(rows: Sequence[Row]) -> list[str]:
    """The tables of docs/performance.md: what was measured, and what follows from it for larger models."""
    measured_rows = [line[:-1] for line in lines(rows)]
    larger = [f"{name}, s" for name in MODELS]
    return [markdown(HEADER[:-1], measured_rows), markdown(["servers", "route", *larger], extrapolated(rows))]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="MB")
    parser.add_argument("--repeats", type=int, default=5, help="updates of each route that count")
    parser.add_argument("--routes", nargs="+", default=["shared", "broadcast", "value", "disk"])
    parser.add_argument("--limit-s", type=float, default=300.0, help="longest update; 1 GB by value takes minutes")
    parser.add_argument("--name", default="weight_routes", help="name of the result file")
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tropd-bench-") as place:
        for megabytes in given.sizes:
            rows += measured(Path(place), megabytes, given.repeats, given.limit_s, given.routes)
    print(table(HEADER, lines(rows)))
    if larger := extrapolated(rows):
        print("\nExtrapolated from the two largest sizes, not measured: seconds for one update of a model in bfloat16")
        print(table(["servers", "route", *MODELS], larger))
    command = f"python -m benchmarks.weight_routes --sizes {' '.join(map(str, given.sizes))} --repeats {given.repeats}"
    notes = "loopback and stored: bytes per update, divided by the bytes of the weights"
    print(write_result(given.name, rows, command=command, notes=notes))


if __name__ == "__main__":
    main()
