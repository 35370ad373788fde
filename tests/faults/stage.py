"""The inputs of the fault suite: tiny models, prompts, stored rollouts, and an undisturbed run.

This module plays no faults. Invariants: only sizes are small (about 300 tokens of vocabulary, 2 layers, short steps).
Gates, trust region, checkpoints and export are those of any run. Servers are started as a user starts one elsewhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.e2e.jobs import REPOSITORY, curve
from tests.faults.launch import LIMIT_S, Launch, TooLateError, check_code, job_environment, tropd

if TYPE_CHECKING:
    from tropd_mcore.types import Rollout

STEPS = 8
PROMPTS, SAMPLES, LONGEST = 4, 2, 11
SPARE_PROMPTS = 64
"""Prompts without stored rollouts."""
REAL_TOKENS = 280
"""Ids below have a text in the tiny tokenizer. Ids from 3 on are not special tokens."""
VOCABULARY = 307
END = 2
"""The end token."""


@dataclass
class Stage:
    """Folders of the suite, and the shared items that are made in them once."""

    root: Path
    once: threading.RLock = field(default_factory=threading.RLock)
    """Lock held while a shared item is made."""
    samples: dict[int, list[str]] | None = None
    """{step: sample ids} of an undisturbed run (`fleet.undisturbed`)."""
    _reference: Reference | None = None
    _servers: dict[str, Outside] = field(default_factory=dict)

    @property
    def replay_config(self) -> Path:
        """Two ranks that replay the stored rollouts, without a server."""
        return self.root / "replay.yaml"

    @property
    def live_config(self) -> Path:
        """Two ranks with their own rollout server."""
        return self.root / "live.yaml"

    def model(self, name: str) -> Path:
        """Folder of student or teacher."""
        return self.root / name

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def responses(self) -> Path:
        return self.root / "responses.jsonl"

    def place(self, name: str) -> Path:
        """A new folder for one fault or one chain."""
        folder = self.root / "played" / "".join(c if c.isalnum() or c in "-_" else "-" for c in name)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder

    def reference(self) -> Reference:
        """The undisturbed run of `replay_config`. It is made at the first call."""
        with self.once:
            if self._reference is None:
                folder = self.place("reference")
                launch = Launch(train(self.replay_config, f"run.dir={folder / 'run'}"), folder / "notes")
                try:
                    ended, code = launch.ended(), launch.process.poll()
                    if not ended or code != 0:
                        raise TooLateError(f"the run without a fault ended with {code}: {launch.text()[-3000:]}")
                finally:
                    launch.clear()
                self._reference = Reference.of(folder / "run")
            return self._reference

    def outside(self, name: str) -> Outside:
        """A server of `student` or `teacher` at a URL, started at the first call."""
        with self.once:
            if name not in self._servers:
                self._servers[name] = Outside(self.model(name), self.root / f"{name}-server.log")
            return self._servers[name]

    def close(self) -> None:
        """Stop the servers."""
        for server in self._servers.values():
            server.stop()
        self._servers.clear()


@dataclass(frozen=True)
class Reference:
    """The results that a run has to reproduce bit for bit."""

    metrics: list[dict[str, Any]]
    weights: dict[str, str]
    """SHA-256 of each weight file of the export."""

    @classmethod
    def of(cls, run_dir: Path) -> Reference:
        """The metrics of every step without times, and the exported weights."""
        return cls(curve(run_dir), digests(run_dir / "export"))

    def differences(self, other: Reference) -> list[str]:
        """The differences from `other`, in words."""
        found = step_problems(other.metrics, len(self.metrics))
        for mine, its in zip(self.metrics, other.metrics, strict=False):
            names = [name for name in mine if mine[name] != its.get(name)]
            if names:
                values = f"{its.get(names[0])}, without the fault {mine[names[0]]}"
                found.append(f"step {mine['step']}: {names[0]} is {values}")
                break
        if not self.weights or self.weights != other.weights:
            found.append("other exported weights than without the fault")
        return found


def step_problems(metrics: list[dict[str, Any]], steps: int) -> list[str]:
    """Steps whose line is missing or repeated."""
    got = [line["step"] for line in metrics]
    return [] if got == list(range(steps)) else [f"metrics have the steps {got}; expected 0 to {steps - 1}"]


def digests(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the weight files of a model folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


class Outside:
    """An SGLang server that no job owns, as on another machine: on loopback, without a key."""

    def __init__(self, model: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._model, self._port = model, port
        self.process = self._start()
        self._wait_ready()

    def _start(self) -> subprocess.Popen[bytes]:
        command = ["bash", "examples/teacher_server.sh", str(self._model), "--device", "cpu", "--dtype", "float32"]
        command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--sleep-on-idle"]
        command += ["--max-total-tokens", "4096"]
        notes = self.log.parent / "no-notes"
        with self.log.open("ab") as stream:
            return subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=job_environment(notes, {"PORT": str(self._port), "OMP_NUM_THREADS": "1"}),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def restart(self) -> None:
        """Start it again on its port, with the weights of its folder, and wait until it is ready."""
        self.stop()
        self.process = self._start()
        self._wait_ready()

    def _wait_ready(self) -> None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 2 * LIMIT_S
        while time.monotonic() < deadline:
            try:
                with direct.open(f"{self.url}/health", timeout=10):
                    return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        self.stop()
        raise TooLateError(f"the server is not up: {self.log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """Kill the group that was made for it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def train(config: Path, *overrides: str) -> list[str]:
    """The command that trains a configuration."""
    return tropd("train", config, *overrides)


def set_stage(root: Path) -> Stage:
    """Write all inputs. Raises RuntimeError if the commands would run code other than this tree's."""
    stage = Stage(root)
    check_code(root / "notes")
    if stage.live_config.exists():
        return stage
    from tests.tiny_models import write_tiny_model

    for seed, name in enumerate(("student", "teacher", "other")):
        write_tiny_model(stage.model(name), seed=seed, num_hidden_layers=2)
    _write_rollouts(stage)
    stage.replay_config.write_text(_replay_config(stage))
    stage.live_config.write_text(_live_config(stage))
    return stage


def _write_rollouts(stage: Stage) -> None:
    """Prompts, teacher responses, and the rollouts of all steps: uniform tokens with the student's log-probs."""
    import torch

    from tests.e2e.replayed import log_probs
    from tests.tiny_models import tiny_tokenizer
    from tropd_mcore.records.replay import save_rollouts

    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(3)
    prompts, responses = [], []
    (stage.root / "sampled" / "rollouts").mkdir(parents=True)
    for step in range(STEPS):
        rollouts: list[Rollout] = []
        for number in range(PROMPTS):
            name, text = f"s{step}p{number}", f"how many apples {step} {number}"
            ids = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
            for index in range(SAMPLES):
                rollout = _sample(f"{name}/{index}", name, ids, generator)
                logp = log_probs(stage.model("student"), rollout)
                chosen = logp.gather(1, torch.from_numpy(rollout.response_ids.astype(np.int64))[:, None])[:, 0]
                rollouts.append(dataclasses.replace(rollout, rollout_logp=chosen.numpy().astype(np.float32)))
            prompts.append({"id": name, "prompt": text, "answer": str(number)})
        save_rollouts(stage.root / "sampled" / "rollouts" / f"step_{step:06d}.npz", rollouts)
    for number in range(SPARE_PROMPTS):
        prompts.append({"id": f"spare{number}", "prompt": f"take {number} more", "answer": str(number)})
    for prompt in prompts:
        drawn = torch.randint(3, REAL_TOKENS, (LONGEST,), generator=generator)
        responses.append({"id": prompt["id"], "response_ids": drawn.tolist()})
    write_lines(stage.prompts, prompts)
    write_lines(stage.responses, responses)


def _sample(sample_id: str, prompt_id: str, prompt_ids: np.ndarray, generator: Any) -> Rollout:
    import torch

    from tropd_mcore.types import Rollout

    count = LONGEST - int(torch.randint(0, 5, (), generator=generator))
    return Rollout(
        sample_id=sample_id,
        prompt_id=prompt_id,
        prompt_ids=prompt_ids,
        prefix_ids=np.zeros(0, dtype=np.int32),
        response_ids=torch.randint(3, REAL_TOKENS, (count,), generator=generator).numpy().astype(np.int32),
        rollout_logp=np.zeros(count, dtype=np.float32),
        trust_u=torch.rand(count, generator=generator).numpy(),
        policy_version="stored",
        finish_reason="length",
        carries_prefix_loss=False,
        answer=None,
    )


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _replay_config(stage: Stage) -> str:
    return f"""\
run: {{dir: none, steps: {STEPS}, replay: {stage.root / "sampled"}, checkpoint_every: 2}}
{_common(stage)}
objective: {{kind: tropd, outlier: {{topk: 8}}, guidance: {{enabled: false}}}}
data: {{prompts: {stage.prompts}, max_prompt_tokens: 64}}
gates: {{sampler_logprob_mean: 0.01, sampler_logprob_p99: 0.02}} # the first weights made all of the rollouts
rollout: {{prompts_per_step: {PROMPTS}, samples_per_prompt: {SAMPLES}, max_new_tokens: {LONGEST}}}
"""


def _live_config(stage: Stage) -> str:
    return f"""\
run: {{dir: none, steps: 6, checkpoint_every: 2}}
{_common(stage)}
objective: {{kind: tropd, outlier: {{topk: 8}}, guidance: {{min_continuation: 2}}}}
data: {{prompts: {stage.prompts}, teacher_responses: {stage.responses}, max_prompt_tokens: 64}}
rollout:
  prompts_per_step: {PROMPTS}
  samples_per_prompt: {SAMPLES}
  max_new_tokens: {LONGEST}
  server: {{max_total_tokens: 4096}}
"""


def _common(stage: Stage) -> str:
    return f"""\
platform: {{kind: cpu}}
parallel: {{tensor: 2, data: 1}}
student: {{path: {stage.model("student")}, dtype: float32}}
teacher: {{kind: megatron, path: {stage.model("teacher")}, dtype: float32}}
loss: {{chunk_tokens: 13}}
batch: {{tokens_per_micro_batch: 160}}
optimizer: {{learning_rate: 1.0e-6}}
verifier: {{kind: exact_match}}
monitor: {{progress_every_s: 5}}"""


def python() -> str:
    """The interpreter of every command."""
    return sys.executable
