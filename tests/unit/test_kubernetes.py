"""The Kubernetes manifest: valid for the schemas of the API, and its parts name each other correctly.

It was never applied to a cluster. tests/e2e/test_schedulers.py runs its command with the environment of its pods.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tropd_mcore.train.exits import EXPLAINED, INTERRUPTED, LOST

MANIFEST = Path(__file__).parents[2] / "examples" / "kubernetes" / "tropd.yaml"
VERSIONS = ("1.33", kubernetes_validate.latest_version())
"""The oldest version for which the manifest is meant, and the newest one that is known."""


def parts() -> dict[str, dict[str, Any]]:
    """Kind -> object."""
    return {part["kind"]: part for part in yaml.safe_load_all(MANIFEST.read_text())}


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = parts()["Job"]["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    return dict(found)


def variables() -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container()["env"]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Service", "Job"])
def test_every_object_is_valid_for_its_schema(kind: str, version: str) -> None:
    kubernetes_validate.validate(parts()[kind], version, strict=True)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("Job", lambda spec: spec.update(completionsMode="Indexed")),
        ("Job", lambda spec: spec.update(completions="4")),
        ("Job", lambda spec: spec["template"]["spec"].update(containers={})),
        ("Service", lambda spec: spec["ports"][0].update(port="29500/tcp")),
    ],
)
def test_the_schemas_notice_a_wrong_key_or_value(kind: str, damage: Callable[[dict[str, Any]], None]) -> None:
    part = parts()[kind]
    damage(part["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(part, VERSIONS[-1], strict=True)


def test_the_nodes_find_each_other_through_the_service() -> None:
    service, job = parts()["Service"], parts()["Job"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert pod()["subdomain"] == service["metadata"]["name"]
    assert variables()["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    ports = {service["spec"]["ports"][0]["port"], container()["ports"][0]["containerPort"]}
    assert ports == {int(variables()["MASTER_PORT"])}


def test_every_pod_is_a_node_with_the_number_of_its_index() -> None:
    spec = parts()["Job"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables()["NNODES"])
    assert "job-completion-index" in variables()["NODE_RANK"]["fieldRef"]["fieldPath"]


def test_a_run_that_was_stopped_or_lost_a_node_starts_again_but_not_after_an_error_that_needs_a_change() -> None:
    spec = parts()["Job"]["spec"]
    arguments = container()["args"]
    assert arguments[arguments.index("--stopped-code") + 1] == str(LOST)
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert fail["action"] == "FailJob" and fail["onExitCodes"]["values"] == [EXPLAINED, INTERRUPTED]
    assert fail["onExitCodes"]["containerName"] == container()["name"]
    assert ignore["action"] == "Ignore" and ignore["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert pod()["restartPolicy"] == "Never", "podFailurePolicy needs it"
    assert spec["podReplacementPolicy"] == "Failed" and spec["backoffLimitPerIndex"] > 0 == spec["maxFailedIndexes"]
    assert pod()["terminationGracePeriodSeconds"] >= 600


def test_pods_have_gpus_shared_memory_the_shared_files_and_no_secret_in_the_text() -> None:
    resources = container()["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"]
    volumes = {each["name"]: each for each in pod()["volumes"]}
    mounts = {each["mountPath"]: volumes[each["name"]] for each in container()["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory" and mounts["/dev/shm"]["emptyDir"]["sizeLimit"]
    assert mounts["/data"]["persistentVolumeClaim"]["claimName"]
    secret = variables()["WANDB_API_KEY"]["secretKeyRef"]
    assert secret["name"] and secret["key"]
