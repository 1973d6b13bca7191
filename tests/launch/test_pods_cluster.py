"""The Indexed Job's own command, environment and names, in fake hosts that are called as its pods would be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scale_digrap.launch.render import render
from scale_digrap.launch.spec import LaunchConfig, validate_spec
from scale_digrap.launch.workload import load_workload
from tests.launch.workload import CONFIG, ROOT, TRAIN_S, outputs

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1500)]


def pods(manifest: str) -> tuple[list[str], str, list[str], dict[str, str]]:
    """Names, subdomain, command and environment of a job's pods, as Kubernetes reads them.

    Raises:
        AssertionError: the service that gives the pods their names is not one that does.
    """
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(manifest))
    (job,) = [entry for entry in documents if entry["kind"] == "Job"]
    (service,) = [entry for entry in documents if entry["kind"] == "Service"]
    spec = job["spec"]["template"]["spec"]
    assert service["metadata"]["name"] == spec["subdomain"]
    assert service["spec"]["clusterIP"] == "None"
    (container,) = spec["containers"]
    environment = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}

    def expand(text: str) -> str:
        return re.sub(r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]), text)

    names = [f"{job['metadata']['name']}-{index}" for index in range(job["spec"]["completions"])]
    command = [expand(word) for word in [*container["command"], *container.get("args", [])]]
    return names, spec["subdomain"], command, environment


def test_the_pods_of_an_indexed_job_train_together(make_cluster, workload, run_dir: Path):
    spec = LaunchConfig(name="tiny", nodes="2", processes_per_node="1", workdir=str(ROOT))
    spec.kubernetes.image, spec.kubernetes.gpus = "none", 0
    validate_spec(spec)
    manifest = render("kubernetes/job.yaml", spec, load_workload("train", CONFIG, workload.overrides(run_dir)))
    names, domain, command, environment = pods(manifest)
    assert names == ["tiny-0", "tiny-1"]
    cluster = make_cluster(names, domain=domain)
    runs = [
        host.popen(command, environment | {"HOSTNAME": host.name, "JOB_COMPLETION_INDEX": str(host.index)})
        for host in cluster.hosts
    ]
    assert [run.wait(TRAIN_S) for run in runs] == [0, 0], outputs(runs)
    workload.check(run_dir)
