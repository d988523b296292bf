"""Starts the ranks as an Indexed Job of Kubernetes, with one pod per machine, through kubectl.

A headless Service gives the pods names. They connect to the name of the first. A pod that is
evicted is replaced, and this does not count as a failure.

Sources: https://kubernetes.io/docs/concepts/workloads/controllers/job/ and
    https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication/
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from pydantic import JsonValue

from zeroflow import artifacts
from zeroflow.artifacts import JsonObject
from zeroflow.launchers.commands import run, seldom
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.hosts import PORT, Ended, Gang, Held, Launcher, asked_to_stop

log = logging.getLogger(__name__)

_GRACE_SECONDS = 120
"""Time for the ranks of a pod to save before it is deleted."""

_MOST_FAILURES = 20
"""Maximum number of failed pods. If only ranks fail, torchrun restarts them in the same pods."""

_EVICTED: JsonObject = {"type": "DisruptionTarget", "status": "True"}
"""Condition of an evicted or pre-empted pod."""


class Cluster(NamedTuple):
    """Settings of the pods."""

    namespace: str
    image: str
    """Container image with zeroflow."""

    volume_claim: str
    """Name of the PersistentVolumeClaim with the cache."""


def launcher(cluster: Cluster) -> Launcher:
    """Return a launcher that creates a Job."""
    return partial(_on_kubernetes, cluster=cluster)


@contextmanager
def _on_kubernetes(gang: Gang, ended: Ended, *, cluster: Cluster) -> Iterator[Held]:
    file = gang.folder.kubernetes
    artifacts.write_json(file, manifest(gang, cluster))
    # If an earlier command was killed, its Job still exists, and this leaves it unchanged
    run("kubectl", "apply", f"--filename={file}")
    log.info("created Job %s in namespace %s from %s", name_of(gang), cluster.namespace, file)

    def status() -> JsonObject | None:
        return _status(name_of(gang), cluster.namespace)

    try:
        # Pods that are waiting for a node have no ranks that could save
        with asked_to_stop(gang.folder, lambda: ended() or not (status() or {}).get("ready")):
            yield seldom(lambda: not is_over(status()))
    finally:
        run("kubectl", "delete", f"--filename={file}", "--ignore-not-found", "--wait=false")


def _status(name: str, namespace: str) -> JsonObject | None:
    """Return the status of a Job; None if it was deleted."""
    command = ("kubectl", "get", "job", name, f"--namespace={namespace}", "--output=json")
    try:
        said = run(*command, "--ignore-not-found")
    except TrainingFailed as error:
        log.warning("%s", error)  # the control plane may be restarting
        return {}
    status: JsonObject | None = json.loads(said).get("status", {}) if said else None
    return status


def is_over(status: JsonObject | None) -> bool:
    """Return True if a Job with `status` has completed, has failed, or was deleted."""
    if status is None:
        return True
    conditions: Any = status.get("conditions") or []
    kinds = {condition["type"] for condition in conditions if condition["status"] == "True"}
    return bool(kinds & {"Complete", "Failed"})


def name_of(gang: Gang) -> str:
    """Return the name of the Job. It is unique to the run and short enough for a host name."""
    name = gang.folder.name
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:30].strip("-")
    return f"zeroflow-{words}-{artifacts.fingerprint(name)[:6]}"


def manifest(gang: Gang, cluster: Cluster) -> JsonObject:
    """Return the manifest of the Service and the Job, for `kubectl apply`."""
    name = name_of(gang)
    labels: JsonObject = {"app.kubernetes.io/name": "zeroflow", "app.kubernetes.io/instance": name}
    place: JsonObject = {"name": name, "namespace": cluster.namespace, "labels": labels}
    service: JsonObject = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": place,
        "spec": {
            "clusterIP": "None",
            "selector": {"job-name": name},
            "publishNotReadyAddresses": True,  # the pods connect before they are ready
        },
    }
    job: JsonObject = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": place,
        "spec": {
            "completionMode": "Indexed",
            "completions": gang.nodes,
            "parallelism": gang.nodes,
            "backoffLimit": _MOST_FAILURES,
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [_EVICTED]}]},
            "template": {"metadata": {"labels": labels}, "spec": _pod(gang, cluster)},
        },
    }
    return {"apiVersion": "v1", "kind": "List", "items": [service, job]}


def _pod(gang: Gang, cluster: Cluster) -> JsonObject:
    name, cache = name_of(gang), str(gang.folder.cache.path.absolute())
    resources: JsonObject = (
        {"limits": {"nvidia.com/gpu": gang.ranks_of_each}} if gang.device == "cuda" else {}
    )
    command: list[JsonValue] = [*gang.command(f"{name}-0.{name}:{PORT}")]
    return {
        "restartPolicy": "Never",  # the Job replaces pods, because it detects evictions
        "subdomain": name,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [
            {
                "name": "ranks",
                "image": cluster.image,
                "command": command,
                "resources": resources,
                "volumeMounts": [
                    {"name": "cache", "mountPath": cache},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "cache", "persistentVolumeClaim": {"claimName": cluster.volume_claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},  # NCCL needs more than 64 MB
        ],
    }
