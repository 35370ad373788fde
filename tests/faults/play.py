"""Play chosen faults, one chain after the other, on the requested number of workers.

This module does not define faults or judge them. Invariant: a fault that could not be played is a MISS and is never
left out.
"""

from __future__ import annotations

import re
import socket
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.launch import TooLateError
from tests.faults.scene import Scene, scene
from tests.faults.stage import Stage
from tests.faults.verdict import MISS, Fault, Seen, Verdict, judge

Say = Callable[[str], None]


@dataclass(frozen=True)
class Played:
    """A fault with its verdict."""

    fault: Fault
    verdict: Verdict
    seen: Seen

    def record(self, root: Path) -> dict[str, Any]:
        """As JSON, without paths of the machine."""
        return {
            "id": self.fault.id,
            "group": self.fault.group,
            "verdict": self.verdict.verdict,
            "reasons": [without_paths(text, root) for text in self.verdict.reasons],
            **self.verdict.counted,
            "exit_code": self.seen.code,
            "seconds": round(self.seen.seconds, 1),
            "longest_silence_s": round(self.seen.silence, 1),
            "line": without_paths(self.verdict.line, root)[:400],
        }


def play_all(stage: Stage, faults: list[Fault], *, jobs: int, say: Say) -> list[Played]:
    """Play the faults. Chains keep the order of their rows. One worker plays all that use the shared servers."""
    chains: dict[str, list[Fault]] = {}
    for fault in faults:
        chains.setdefault(fault.chain or fault.id, []).append(fault)
    lanes = [[item] for item in chains.items() if not item[1][0].shared]
    lanes.sort(key=lambda lane: -len(lane[0][1]))
    shared = [item for item in chains.items() if item[1][0].shared]

    def play_lane(lane: list[tuple[str, list[Fault]]]) -> list[Played]:
        return [played for name, chain in lane for played in play_chain(stage, name, chain, say)]

    with ThreadPoolExecutor(max_workers=jobs) as workers:
        by_id = {played.fault.id: played for lane in workers.map(play_lane, [shared, *lanes]) for played in lane}
    return [by_id[fault.id] for fault in faults]


def play_chain(stage: Stage, name: str, faults: list[Fault], say: Say) -> list[Played]:
    """Play the faults of one chain in one run, then check the run's result."""
    seen: dict[str, Seen] = {}
    with scene(stage, name) as made:
        made.shared["faults"] = len(faults)
        for fault in faults:
            begun = time.monotonic()
            seen[fault.id] = _play(fault, made)
            if not fault.chain:
                _add_shared_memory(seen[fault.id], made)
            verdict = judge(fault, seen[fault.id])
            say(f"{verdict.verdict:4} {fault.id} ({time.monotonic() - begun:.0f} s): {verdict.line[:120]}")
        if faults[0].chain:
            problems = _finish(made)
            for fault in faults:
                seen[fault.id].lost += problems
            say(f"{MISS if problems else 'ok':4} chain {name}: {problems or 'equal to the run without faults'}")
    return [Played(fault, judge(fault, seen[fault.id]), seen[fault.id]) for fault in faults]


def _play(fault: Fault, made: Scene) -> Seen:
    try:
        return fault.play(made)
    except Exception as error:
        short = str(error) if isinstance(error, TooLateError) else traceback.format_exc(limit=-3)
        last = made.last
        if last is not None:
            last.clear()
        return Seen(output=f"error: {short}", hung=True, lost=[f"could not be played: {short}"[:1500]])


def _add_shared_memory(seen: Seen, made: Scene) -> None:
    """A fault without a chain has no next launch, so an orderly end must leave nothing behind."""
    if seen.code in (0, 2, 130):
        seen.left_in_shm += made.left_in_shm()


def _finish(made: Scene) -> list[str]:
    try:
        return made.finish()
    except Exception as error:
        return [f"the run could not be finished: {error}"[:1500]]


def without_paths(text: str, root: Path) -> str:
    """`text` without paths of the machine: the suite's folder is $WORK, other absolute paths keep their last part."""
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "HOST", text.replace(str(root), "$WORK"))
    text = re.sub(r"\bpid \d+", "pid N", text)
    text = re.sub(r"(?<![\w$])/(?:root|home|tmp|work|usr|opt|var|srv|mnt)(?:/[\w.@+-]+)*/([\w.@+-]+)", r".../\1", text)
    return re.sub(r"\b(127\.0\.0\.1|localhost):\d+", r"\1:PORT", text)
