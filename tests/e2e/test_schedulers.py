"""Jobs of two nodes on loopback as Slurm and Kubernetes start them: stopped, lost, started again, complete."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import yaml

from tests import schedulers
from tests.e2e import jobs
from tests.faults.launch import Launch, send
from tests.faults.rows_messages import _free_port
from tests.faults.scene import Scene, scene
from tests.faults.stage import Reference, Stage, set_stage
from tropd_mcore.train.exits import EXPLAINED, LOST

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

MANIFEST = jobs.REPOSITORY / "examples" / "kubernetes" / "tropd.yaml"
LIMIT = "run.node_timeout_s=6"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    made = set_stage(tmp_path_factory.mktemp("schedulers"))
    made.reference()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def run(stage: Stage, request: pytest.FixtureRequest) -> Iterator[Scene]:
    with scene(stage, request.node.name) as made:
        yield made


def same_as_without_a_fault(run: Scene) -> bool:
    return run.stage.reference().differences(Reference.of(run.run_dir)) == []


class Slurm:
    """Starts the script as sbatch does, and again if it was requeued."""

    def __init__(self, run: Scene) -> None:
        self.run = run
        self.folder = run.folder / "slurm"
        self.bin = schedulers.install(self.folder / "bin")
        self.restarts = 0
        self.port = _free_port()

    def start(self, *overrides: str) -> Launch:
        extra = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.folder),
            "PYTHON": sys.executable,
            "MASTER_PORT": self.port,
            "SLURM_NNODES": "2",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "fake[0-1]",
        } | ({"SLURM_RESTART_COUNT": str(self.restarts)} if self.restarts else {})
        command = ["bash", "examples/tropd_pretrain.sbatch", str(self.run.config), f"run.dir={self.run.run_dir}"]
        return self.run.start([*command, LIMIT, *overrides], extra=extra)

    def tasks(self) -> list[psutil.Process]:
        """The launchers of the nodes."""
        return [psutil.Process(int(pid)) for pid in (self.folder / "tasks").read_text().split()]

    def requeued(self) -> bool:
        """Whether the job was requeued since the last start."""
        record = self.folder / "requeued"
        count = len(record.read_text().splitlines()) if record.exists() else 0
        self.restarts += count > self.restarts
        return count == self.restarts > 0


def test_a_slurm_job_that_is_stopped_before_its_limit_and_then_loses_a_node_is_requeued_until_it_is_complete(
    run: Scene,
) -> None:
    slurm = Slurm(run)
    launch = slurm.start()
    launch.halt("before score", rank=1)
    for task in slurm.tasks():  # --signal=TERM@600 reaches the tasks, not the script
        send(task, signal.SIGTERM)
    launch.go(1)
    assert launch.ended(60) and launch.process.poll() == LOST, launch.tail()
    assert "stopped by SIGTERM" in launch.text() and "error" not in launch.text()
    assert slurm.requeued() and slurm.restarts == 1

    launch = slurm.start()
    launch.halt("before checkpoint", rank=0)
    node = slurm.tasks()[1]
    for process in [node, *node.children(recursive=True)]:
        send(process, signal.SIGKILL)
    assert launch.ended(60) and launch.process.poll() in (LOST, 137), launch.tail()
    assert "no sign of life for 6 s from node 1 (" in launch.text() and "Traceback" not in launch.text()

    launch = slurm.start()
    assert launch.ended() and launch.process.poll() == 0, launch.tail()
    assert same_as_without_a_fault(run)


def test_a_slurm_job_with_an_error_that_needs_a_change_is_not_requeued(run: Scene) -> None:
    slurm = Slurm(run)
    launch = slurm.start("optimizer.lr=1e-5")
    assert launch.ended(60) and launch.process.poll() == EXPLAINED
    assert "optimizer.learning_rate" in launch.text() and not slurm.requeued()


class Pods:
    """Starts the command of the manifest with the environment of its pods."""

    def __init__(self, run: Scene) -> None:
        self.run = run
        objects = yaml.safe_load_all(MANIFEST.read_text())
        job = next(each for each in objects if each["kind"] == "Job")
        (self.container,) = job["spec"]["template"]["spec"]["containers"]
        self.port = _free_port()

    def start(self, index: int) -> Launch:
        """Pod `index`; the names of the cluster are replaced by loopback, and paths in /data by those of the run."""
        extra = {"PYTHON": sys.executable}
        for variable in self.container["env"]:
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                assert "job-completion-index" in source["fieldRef"]["fieldPath"]
                extra[variable["name"]] = str(index)
            elif "value" in variable:
                extra[variable["name"]] = variable["value"]
        extra |= {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, "HF_HOME": str(self.run.folder)}
        places = {"/data/config.yaml": str(self.run.config)}
        arguments = [places.get(word, word) for word in self.container["args"]]
        return self.run.start(
            [*self.container["command"], *arguments, f"run.dir={self.run.run_dir}", LIMIT], extra=extra
        )


def test_the_pods_of_the_manifest_train_and_a_pod_that_is_replaced_early_waits_for_the_end_of_the_old_job(
    run: Scene,
) -> None:
    pods = Pods(run)
    first, second = pods.start(0), pods.start(1)
    second.halt("before score", rank=1)
    second.look()
    for process in second.members():
        send(process, signal.SIGKILL)
    time.sleep(1)
    replaced = pods.start(1)  # before the first node has noticed anything
    assert first.ended(60) and first.process.poll() == LOST, first.tail()
    assert "no sign of life for 6 s from node 1 (" in first.text()
    again = pods.start(0)
    assert [each.ended() for each in (again, replaced)] == [True, True]
    assert [each.process.poll() for each in (again, replaced)] == [0, 0], replaced.tail()
    assert same_as_without_a_fault(run)


def test_a_pod_that_gets_a_signal_stops_the_job_on_every_node_with_the_code_that_starts_it_again(run: Scene) -> None:
    pods = Pods(run)
    nodes = [pods.start(0), pods.start(1)]
    nodes[0].halt("before score", rank=0)
    nodes[1].process.send_signal(signal.SIGTERM)
    nodes[1].wait(lambda: True, "the signal")
    time.sleep(3)
    nodes[0].go(0)
    assert [each.ended(60) for each in nodes] == [True, True]
    assert [each.process.poll() for each in nodes] == [LOST, LOST], nodes[0].tail()
    assert "stopped by SIGTERM" in nodes[0].text()
