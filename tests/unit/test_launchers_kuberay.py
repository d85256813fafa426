"""KubeRay manifests against a hand-written list of the CRD's field names.

Written on 2026-11-20 from KubeRay's API reference (docs.ray.io, fields of v1.7.1; the tables of `RayCluster` and `RayJob`). Below
`template:` the fields are Kubernetes' own (v1 PodTemplateSpec), listed as far as they are of use here.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render import ray_version
from jobs._job import split_words
from jobs._words import split_options
from jobs.generate import GenerateOptions
from jobs.interact import InteractOptions
from reid_dist import methods
from reid_dist.config import apply_overrides
from reid_dist.data import layouts
from tuning.sweep import load_sweep, nested

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cluster/kuberay").glob("*.yaml"))

QUANTITIES: dict[str, Any] = {"*": str}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str}}}],
    "envFrom": [{"secretRef": {"name": str, "optional": bool}, "configMapRef": {"name": str, "optional": bool}}],
    "ports": [{"containerPort": int, "name": str}],
    "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
    "securityContext": {"*": object},
}
TEMPLATE = {
    "metadata": {"labels": {"*": str}, "annotations": {"*": str}},
    "spec": {
        "serviceAccountName": str,
        "terminationGracePeriodSeconds": int,
        "restartPolicy": str,
        "nodeSelector": {"*": str},
        "tolerations": [{"key": str, "operator": str, "effect": str, "value": str}],
        "containers": [CONTAINER],
        "initContainers": [CONTAINER],
        "volumes": [{"name": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
    },
}
HEAD_GROUP = {
    "enableIngress": bool,
    "headService": {"*": object},
    "labels": {"*": str},
    "rayStartParams": {"*": str},
    "resources": {"*": str},
    "serviceType": str,
    "template": TEMPLATE,
}
WORKER_GROUP = {
    "groupName": str,
    "idleTimeoutSeconds": int,
    "labels": {"*": str},
    "maxReplicas": int,
    "minReplicas": int,
    "numOfHosts": int,
    "rayStartParams": {"*": str},
    "replicas": int,
    "resources": {"*": str},
    "scaleStrategy": {"workersToDelete": [str]},
    "suspend": bool,
    "template": TEMPLATE,
}
RAY_CLUSTER_SPEC = {
    "authOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
    "autoscalerOptions": {
        "env": [{"name": str, "value": str}],
        "envFrom": [{"*": object}],
        "idleTimeoutSeconds": int,
        "image": str,
        "imagePullPolicy": str,
        "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
        "securityContext": {"*": object},
        "upscalingMode": str,
        "version": str,
        "volumeMounts": [{"name": str, "mountPath": str}],
    },
    "enableInTreeAutoscaling": bool,
    "gcsFaultToleranceOptions": {"*": object},
    "headGroupSpec": HEAD_GROUP,
    "headServiceAnnotations": {"*": str},
    "managedBy": str,
    "rayVersion": str,
    "suspend": bool,
    "upgradeStrategy": {"type": str},
    "workerGroupSpecs": [WORKER_GROUP],
}
RAY_JOB_SPEC = {
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "clusterSelector": {"*": str},
    "deletionStrategy": {"*": object},
    "entrypoint": str,
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "entrypointResources": str,
    "jobId": str,
    "managedBy": str,
    "metadata": {"*": str},
    "preRunningDeadlineSeconds": int,
    "rayClusterSpec": RAY_CLUSTER_SPEC,
    "runtimeEnvYAML": str,
    "shutdownAfterJobFinishes": bool,
    "submissionMode": str,
    "submitterConfig": {"backoffLimit": int},
    "submitterPodTemplate": TEMPLATE,
    "suspend": bool,
    "ttlSecondsAfterFinished": int,
}
KINDS = {"RayCluster": RAY_CLUSTER_SPEC, "RayJob": RAY_JOB_SPEC}
META = {"name": str, "namespace": str, "labels": {"*": str}, "annotations": {"*": str}}


def problems(value: Any, shape: Any, where: str = "spec") -> list[str]:
    """What in `value` the shape does not know: a field, or a value of another type."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{where}: {value!r} is no mapping"]
        unknown = [f"{where}.{key} is no field" for key in value if key not in shape and "*" not in shape]
        known = ((key, shape.get(key, shape.get("*"))) for key in value if key in shape or "*" in shape)
        return unknown + [found for key, inner in known for found in problems(value[key], inner, f"{where}.{key}")]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [found for i, item in enumerate(value) for found in problems(item, shape[0], f"{where}[{i}]")]
    if shape is int and isinstance(value, bool):
        return [f"{where}: {value!r} is not {shape.__name__}"]
    return [] if isinstance(value, shape) else [f"{where}: {value!r} is not {shape.__name__}"]


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else dict(spec["rayClusterSpec"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fields_are_the_crds(path: Path) -> None:
    manifest = load(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert problems(manifest["spec"], KINDS[manifest["kind"]]) == []
    assert problems(manifest["metadata"], META, "metadata") == []
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", manifest["metadata"]["name"])


def test_wrong_fields_are_found() -> None:
    spec = load(FILES[0])["spec"]
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0  # Kubernetes refuses a number here
    spec["workerGroupSpecs"][0]["template"]["spec"]["container"] = []
    spec["authOption"] = {}
    assert len(problems(spec, RAY_CLUSTER_SPEC)) == 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_token_queue_head_without_work_and_shared_memory(path: Path) -> None:
    manifest = load(path)
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    spec = cluster_spec(manifest)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray_version()
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert container["resources"]["requests"] == container["resources"]["limits"]  # nobody evicts a guaranteed pod
        assert all("value" not in entry or "SECRET" not in entry["name"] for entry in container["env"])
        if "groupName" in group:
            gpus = container["resources"]["limits"].get("nvidia.com/gpu")
            assert container["image"].endswith(":gpu" if gpus else ":cpu")
            assert pod["restartPolicy"] == "Never"
            assert ("nodeSelector" in pod) == group["groupName"].endswith("-spot")


def test_standing_cluster_scales_from_nothing() -> None:
    spec = load(ROOT / "cluster/kuberay/raycluster.yaml")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    sizes = {g["groupName"]: (g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in spec["workerGroupSpecs"]}
    assert {"cpu", "gpu-1", "gpu-1-spot", "gpu-8", "gpu-8-spot"} <= sizes.keys()
    assert all(now == least == 0 < most for now, least, most in sizes.values())


JOBS = {path.stem.removeprefix("rayjob-"): path for path in FILES if "rayjob" in path.stem}
OF_ONE_MACHINE = {"demo", "doctor", "postmortem", "runs"}  # jobs that need no cluster, or one that is there


def test_every_verb_that_computes_has_a_job() -> None:
    verbs = {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")}
    assert JOBS.keys() == verbs - OF_ONE_MACHINE


def words_of(verb: str) -> tuple[list[str], list[str]]:
    """(names, key=value words) of a job's entrypoint."""
    words, values, flags = split_words(shlex.split(load(JOBS[verb])["spec"]["entrypoint"])[3:], "")
    assert not flags
    return words, values


def test_lines_are_what_the_jobs_take() -> None:
    """Each entrypoint through the parser of its own job; the data behind the words is the user's."""
    words, values = words_of("train")
    recipe = methods.load_recipe(words[0], values)
    words, values = words_of("tune")
    sweep = load_sweep(words[0], [])
    assert apply_overrides(nested(sweep.set), values)["data"]["root"] == recipe.data.root
    for verb, options in (("interact", InteractOptions), ("generate", GenerateOptions)):
        _, values = words_of(verb)
        assert split_options(options, values, rest_allowed=False)[0].root == recipe.data.root
    run = f"{recipe.output}/{recipe.name}"
    assert [words_of(verb)[0][0] for verb in ("evaluate", "extract", "report", "interact", "finetune_vlm")] == [run] * 5
    assert words_of("pack")[0][0] in layouts.names()


@pytest.mark.parametrize("path", JOBS.values(), ids=lambda path: path.stem)
def test_job_is_a_verb_of_ours_and_ends_its_cluster(path: Path) -> None:
    spec = load(path)["spec"]
    verb = path.stem.removeprefix("rayjob-")
    assert spec["entrypoint"].startswith(f"python -m jobs.{verb} ")
    assert importlib.util.find_spec(f"jobs.{verb}") is not None
    assert "{" not in spec["entrypoint"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert not spec["rayClusterSpec"].get("enableInTreeAutoscaling")  # Kueue admits a job of fixed size whole
    wanted = re.search(r"training.num_workers=(\d+)", spec["entrypoint"])
    if wanted:
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert int(wanted[1]) <= group["replicas"] * int(gpus)
