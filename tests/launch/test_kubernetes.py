"""Manifests against the schemas of Kubernetes, JobSet and Kubeflow Trainer, unknown keys included."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from scale_digrap.launch.render import render
from scale_digrap.launch.spec import LaunchConfig, load_spec
from scale_digrap.launch.workload import Workload
from tests.launch import golden_files
from tests.launch.test_golden import pod_script

VERSION = "1.32"
MANIFESTS = [path for path in golden_files.rendered() if path.suffix == ".yaml"]
STAND_IN = """\
#!/bin/bash
# Stands in for torchrun and the preflight; scale_digrap.launch.node is itself.
case "$*" in
  *launch.node*) exec {python} "$@" ;;
  *launch.preflight*) exit 0 ;;
esac
trap "sleep 0.2; echo '{{}}' >{run}/STOPPED; exit 1" TERM  # as torchrun does
echo >{run}/up
case {mode} in
  done) echo '{{}}' >{run}/DONE; exit 1 ;;
  fail) exit 3 ;;
  wait) while :; do sleep 0.1; done ;;
esac
"""
OWN_MODELS = {"JobSet": "JobsetV1alpha2JobSet", "TrainJob": "TrainerV1alpha1TrainJob"}


def problems(document: dict[str, Any]) -> list[str]:
    """What the API server would refuse, and what it would drop without a word."""
    if document["kind"] in OWN_MODELS:
        models = pytest.importorskip("kubeflow_trainer_api.models")
        model = getattr(models, OWN_MODELS[document["kind"]])
        found = list(unknown(document, model, ""))
        try:
            model.from_dict(document)
        except ValueError as error:
            found.append(str(error))
        return found
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def unknown(value: Any, annotation: Any, path: str) -> Iterator[str]:
    """Keys that a pydantic model does not have: pydantic itself ignores them."""
    parts = (annotation, *typing.get_args(annotation))
    mapping = next((part for part in parts if typing.get_origin(part) is dict), None)
    model = next((part for part in flattened(annotation) if hasattr(part, "model_fields")), None)
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown(item, annotation, f"{path}[{number}]")
    elif isinstance(value, dict) and mapping is not None:  # labels, limits: the keys are free
        for key, item in value.items():
            yield from unknown(item, typing.get_args(mapping)[1], f"{path}.{key}")
    elif isinstance(value, dict) and model is not None:
        fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
        if set(fields) != {"actual_instance"}:  # a union, such as a quantity
            for key, item in value.items():
                if key in fields:
                    yield from unknown(item, fields[key], f"{path}.{key}")
                else:
                    yield f"{path}.{key}: unknown field"


def flattened(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in typing.get_args(annotation):
        yield from flattened(part)


def documents() -> list[dict[str, Any]]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


def test_every_manifest_is_valid():
    kinds = [document["kind"] for document in documents()]
    assert sorted(set(kinds)) == ["Job", "JobSet", "Service", "TrainJob"]
    for document in documents():
        assert problems(document) == [], document["kind"]


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every key of a document whose name is given by a schema."""
    free = ("limits", "nodeSelector", "selector", "labels", "metadata", "status")
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            if key not in free:
                yield from paths(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from paths(item, (*path, number))


def test_a_typo_in_any_key_is_caught():
    tried = 0
    for document in documents()[:4]:
        for path in paths(document):
            if path[-1] in ("apiVersion", "kind") and len(path) == 1:
                continue
            damaged = copy.deepcopy(document)
            parent: Any = damaged
            for step in path[:-1]:
                parent = parent[step]
            parent[f"{path[-1]}x"] = parent.pop(path[-1])
            assert problems(damaged), (document["kind"], path)
            tried += 1
    assert tried > 150


def test_names_fit_together():
    service, job, jobset, trainjob = documents()[:4]
    pod = job["spec"]["template"]["spec"]
    name = job["metadata"]["name"]
    assert service["metadata"]["name"] == pod["subdomain"] == name
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert f'--rdzv-endpoint="{name}-0.{name}:29400"' in pod["containers"][0]["command"][2]
    script = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
    assert f'--rdzv-endpoint="{name}-node-0-0.{name}:29400"' in script
    assert '--rdzv-endpoint="$PET_MASTER_ADDR:$PET_MASTER_PORT"' in trainjob["spec"]["trainer"]["command"][2]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "Ignore"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[:2]} == {pod["containers"][0]["name"]}
    for manifest in (job, documents()[5]):
        grace = manifest["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        env = {
            entry["name"]: entry.get("value") for entry in manifest["spec"]["template"]["spec"]["containers"][0]["env"]
        }
        assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace


def test_variables_come_from_a_secret_as_they_are():
    everything = documents()[5]
    env = {entry["name"]: entry for entry in everything["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert env["GREETING"]["valueFrom"] == {"secretKeyRef": {"name": "all-of-it-environment", "key": "GREETING"}}
    spec = load_spec(golden_files.GOLDEN / "everything.yaml")
    secret = yaml.safe_load(render("kubernetes/secret.yaml", spec, golden_files.example()))
    assert problems(secret) == []
    assert (secret["metadata"]["name"], secret["metadata"]["namespace"]) == ("all-of-it-environment", "1234")
    assert secret["stringData"]["GREETING"] == 'it\'s $5, "100 %" # no comment'


@pytest.mark.parametrize(
    ("mode", "overrides", "status"),
    [("done", (), 0), ("nothing", (), 1), ("fail", (), 3), ("wait", (), 75), ("done", ("optimizer.lrr=1",), 2)],
)
def test_a_pod_ends_with_the_status_that_its_failure_policy_expects(tmp_path, mode, overrides, status):
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable, run=tmp_path / "run", mode=mode))
    python.chmod(0o755)
    spec = LaunchConfig(name="pods", workdir=str(tmp_path), python=str(python), preflight=True)
    config = str(golden_files.ROOT / "configs" / "quickstart.yaml")
    workload = Workload("train", config, (f"run_dir={tmp_path / 'run'}", *overrides), tmp_path / "run", "")
    manifest = tmp_path / "job.yaml"
    manifest.write_text(render("kubernetes/job.yaml", spec, workload))
    env = os.environ | {"HOSTNAME": "pods-0", "JOB_COMPLETION_INDEX": "0", "SETTLE": "0"}
    pod = subprocess.Popen(["bash", "-c", pod_script(manifest)], env=env, stderr=subprocess.PIPE, text=True)
    if mode == "wait":
        while not (tmp_path / "run" / "up").exists():
            assert pod.poll() is None
            time.sleep(0.05)
        pod.send_signal(signal.SIGTERM)
    _, error = pod.communicate(timeout=60)
    assert pod.returncode == status, error
    assert not overrides or "did you mean 'optimizer.lr'" in error
