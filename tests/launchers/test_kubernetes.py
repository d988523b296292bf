from pathlib import Path

import kubernetes_validate
import pytest

from zeroflow.device import DeviceKind
from zeroflow.launchers.kubernetes import Cluster, is_over, launcher, manifest, name_of
from zeroflow.training.failures import TrainingFailed
from zeroflow.training.hosts import Gang

CLUSTER = Cluster(namespace="ml", image="registry/zeroflow:1", volume_claim="cache")


def gang(run: str, cache: Path = Path("/shared/cache"), **changes) -> Gang:
    job = cache / "runs" / run / "job.json"
    return Gang("zeroflow.training", job, nodes=4, min_nodes=4, ranks=32, device="cuda")._replace(
        **changes
    )


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_manifest_is_valid_for_kubernetes(version: str, device: DeviceKind):
    service, job = manifest(gang("small_A.b", device=device), CLUSTER)["items"]
    for item in (service, job):
        kubernetes_validate.validate(item, version, strict=True)
    misspelt = {**job, "spec": {**job["spec"], "completion": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="completion"):
        kubernetes_validate.validate(misspelt, version, strict=True)


def test_pods_find_the_first_one_and_mount_the_cache_at_the_path_of_the_job():
    service, job = manifest(gang("run"), CLUSTER)["items"]
    spec = job["spec"]["template"]["spec"]
    [container] = spec["containers"]
    name = job["metadata"]["name"]
    assert spec["subdomain"] == service["metadata"]["name"] == name
    assert service["spec"]["selector"] == {"job-name": name}
    assert f"--rdzv-endpoint={name}-0.{name}:29400" in container["command"]
    assert container["command"][-1] == "/shared/cache/runs/run/job.json"
    assert {"name": "cache", "mountPath": "/shared/cache"} in container["volumeMounts"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}


def test_job_names_are_valid_host_names_and_differ_between_runs():
    names = [name_of(gang(run)) for run in ("a_b", "a.b", "A" * 100, "A" * 99)]
    assert len(set(names)) == 4
    assert all(len(name) + len("-1000") <= 63 for name in names)


@pytest.mark.parametrize(
    ("status", "over"),
    [
        (None, True),
        ({}, False),
        ({"active": 2, "ready": 1}, False),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, False),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, False),
        ({"conditions": [{"type": "Failed", "status": "True"}]}, True),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, True),
    ],
)
def test_job_is_over_when_it_has_completed_or_failed_or_was_deleted(status, over: bool):
    assert is_over(status) == over


def test_missing_kubectl_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    there = gang("run", tmp_path)
    there.folder.path.mkdir(parents=True)
    with (
        pytest.raises(TrainingFailed, match="kubectl was not found"),
        launcher(CLUSTER)(there, lambda: False),
    ):
        pass
