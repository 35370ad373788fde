"""What several rollout servers cost and save: three against one on the same cores, and three of which one is slow.

    python -m benchmarks.fleet                          # about 25 minutes, on an idle machine
    python -m benchmarks.fleet --repeats 2 --name fleet_short

Real SGLang servers on this machine's CPU with a random Qwen3 model in float32, driven through the same policy server
as a job (publication, proof, sampling). The arrangements take turns:

- `one`: one server, with as many threads as there are cores;
- `three`: three servers of one thread each on the same cores;
- `two`: two of these three;
- `one slow`: the three, while the engine of one works 10 % of the time (suspended and resumed by its pid). The first
  step finds out, two steps go on without it, one tries it again, four go on without it. `mean` is that of these eight.

Throughput is that of new tokens over the time of the sampling. The step is publication, proof and sampling. Samples
must be the same ones in the same order in every arrangement.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from benchmarks.measure import markdown, table, write_result
from tests.glue.folder_policy import policy_on
from tests.glue.stubs import one_rank
from tests.slow_engine import engine_of, slowed
from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.monitor.clock import StepClock
from tropd_mcore.rollout.policy_server import PolicyServers
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.types import SampleRequest

SERVERS = 3
WORKS_S, RESTS_S = 0.05, 0.45
"""A slow engine works for the one time and rests for the other."""
FOUND, LEFT_OUT, TRIED, MEAN = (f"one slow: {what}" for what in ("found out", "left out", "tried again", "mean"))


@dataclass
class Row:
    """One arrangement. Lists have one entry per step."""

    name: str
    step_s: list[float] = field(default_factory=list)
    sampling_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


def requests_of(count: int, new_tokens: int, vocabulary: int) -> list[SampleRequest]:
    """Samples of uneven lengths, four to a prompt."""
    return [
        SampleRequest(
            sample_id=f"000000/p{index // 4}/{index % 4}",
            prompt_id=f"p{index // 4}",
            prompt_ids=np.arange(3 + index // 4, 19 + index // 4, dtype=np.int32) % vocabulary,
            prefix_ids=np.zeros(0, np.int32),
            max_new_tokens=new_tokens // 2 + new_tokens * (index * 7 % count) // (2 * count),
            carries_prefix_loss=False,
            answer=None,
        )
        for index in range(count)
    ]


@contextmanager
def servers_of(folder: Path, place: Path, threads: Sequence[int]) -> Iterator[list[SupervisedServer]]:
    """Start servers side by side; entry i of `threads` is the number of threads of server i."""
    with ExitStack() as cleanup:
        servers = []
        for number, each in enumerate(threads):
            spec = ServerSpec(
                key=f"rollout.servers.{number}",
                model_key="student.path",
                model_path=folder,
                config=ServerConfig(
                    dtype="float32", max_total_tokens=16384, threads=each, hang_timeout_s=300.0, max_concurrency=64
                ),
                device="cpu",
                run_dir=place / f"{len(threads)}-{number}",
                name=f"rollout-{number}",
            )
            server = SupervisedServer(spec)
            cleanup.callback(server.stop)
            server.start()
            servers.append(server)
        for server in servers:
            server.wait_ready()
        yield servers


class Bench:
    """Runs steps and keeps their times; every step must give the same samples."""

    def __init__(self, folder: Path, place: Path, asked: list[SampleRequest]) -> None:
        self.folder, self.place, self.asked = folder, place, asked
        self.rows: dict[str, Row] = {}

    def steps(self, servers: list[SupervisedServer], names: Sequence[str], slow: int | None = None) -> None:
        """One launch: a step that is not counted, then step i for row `names[i]`. With `slow`, this server is slow in
        all of these, and their mean has a row."""
        clock = StepClock()
        by_key = {server.spec.key: server for server in servers}
        reached = PolicyServers(by_key, by_key)
        with (
            one_rank() as layout,
            policy_on(layout, reached, self.folder, self.place, clock) as policy,
            ExitStack() as cleanup,
        ):
            counted: list[tuple[float, float, float]] = []
            for step, name in enumerate([None, *names]):
                if step == 1 and slow is not None:
                    process = servers[slow].process
                    assert process is not None
                    cleanup.enter_context(slowed(engine_of(process.pid), works_s=WORKS_S, rests_s=RESTS_S))
                clock.take()
                with clock.phase("rollout"):
                    rollouts = policy.sample(self.asked, step=step)
                times = clock.take()
                assert [each.sample_id for each in rollouts] == [each.sample_id for each in self.asked]
                if name is None:
                    continue
                tokens = sum(len(each.response_ids) for each in rollouts)
                whole = times["rollout"] + times.get("publish", 0.0) + times.get("server", 0.0)
                counted.append((whole, times["rollout"], tokens / times["rollout"]))
                self._add(name, *counted[-1])
            if slow is not None:
                self._add(MEAN, *(statistics.mean(values) for values in zip(*counted, strict=True)))

    def _add(self, name: str, step_s: float, sampling_s: float, tokens_per_s: float) -> None:
        row = self.rows.setdefault(name, Row(name))
        row.step_s.append(step_s)
        row.sampling_s.append(sampling_s)
        row.tokens_per_s.append(tokens_per_s)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.{digits}g} ({min(values):.{digits}g} to {max(values):.{digits}g})"


HEADER = ["servers", "tokens/s", "of one server", "step, s", "of the step of two"]


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's rows."""
    rate = {row.name: statistics.median(row.tokens_per_s) for row in rows}
    step = {row.name: statistics.median(row.step_s) for row in rows}
    return [
        [
            row.name,
            spread(row.tokens_per_s),
            f"{rate[row.name] / rate['one']:.2f}",
            spread(row.step_s),
            f"{step[row.name] / step['two']:.2f}",
        ]
        for row in rows
    ]


def page(rows: Sequence[Row]) -> list[str]:
    """The table of docs/performance.md."""
    return [markdown(HEADER, lines(rows))]


def main() -> None:
    """Run, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--name", default="fleet", help="name of the result file")
    options = parser.parse_args()
    cores = psutil.cpu_count() or 1
    with tempfile.TemporaryDirectory() as text, ExitStack() as stack:
        place = Path(text)
        folder = write_tiny_model(
            place / "model",
            hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64,
        )  # fmt: skip
        asked = requests_of(options.samples, options.new_tokens, 307)
        bench = Bench(folder, place, asked)
        one = stack.enter_context(servers_of(folder, place, [cores]))
        three = stack.enter_context(servers_of(folder, place, [1] * SERVERS))
        for repeat in range(options.repeats):
            bench.steps(one, ["one"])
            bench.steps(three, ["three"])
            bench.steps(three[:2], ["two"])
            bench.steps(three, [FOUND, *[LEFT_OUT] * 2, TRIED, *[LEFT_OUT] * 4], slow=2)
            print(f"round {repeat + 1} of {options.repeats}", flush=True)
    rows = list(bench.rows.values())
    print(table(HEADER, lines(rows)))
    command = f"python -m benchmarks.fleet --repeats {options.repeats}"
    write_result(options.name, rows, command=command)


if __name__ == "__main__":
    main()
