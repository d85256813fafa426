"""Every launcher file against Ray's own schema and set-up code; AWS as far as instances of moto's EC2."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render import LAPTOP_HEAD_ID, LAUNCHERS, render

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SECRET = re.compile(
    r"AKIA[A-Z0-9]{16}|(secret|password|token|access_key)\s*[:=]\s*['\"]?[A-Za-z0-9+/]{16,}", re.IGNORECASE
)


def settings() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / "settings.yaml").read_text())
    return content


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return content


def prepared(name: str) -> dict[str, Any]:
    """What `ray up` makes of a file before it asks the provider; checked by Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(load(name))
    validate_config(config)
    return config


def test_committed_files_are_the_rendered_ones() -> None:
    wrong = [name for name, text in render(settings()).items() if (CLUSTER / name).read_text() != text]
    assert not wrong, f"run `python -m cluster.render`: {wrong}"


def test_settings_that_are_missing_are_named() -> None:
    import jinja2

    mine = settings()
    del mine["aws"]["region"]
    with pytest.raises(jinja2.UndefinedError, match="region"):
        render(mine)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts(name: str) -> None:
    config = prepared(name)
    head = config["head_node_type"]
    if name != "onprem":  # there Ray detects the hosts' resources; the start line gives the head none
        assert config["available_node_types"][head]["resources"]["CPU"] == 0
        assert config["available_node_types"][head]["max_workers"] == 0
    workers = [kind for key, kind in config["available_node_types"].items() if key != head]
    assert sum(kind["max_workers"] for kind in workers) <= config["max_workers"] or name == "onprem"
    assert all(kind["min_workers"] == 0 for kind in workers)


def test_an_unknown_field_is_refused_by_the_schema() -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load("aws")
    config["available_node_types"]["cpu"]["spot"] = True
    with pytest.raises(jsonschema.ValidationError, match="spot"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", ["onprem", "aws", "gcp"])
def test_nodes_are_set_up_by_the_one_script_with_a_token(name: str) -> None:
    config = prepared(name)
    assert any("cluster/bootstrap.sh" in line for line in config["setup_commands"])
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert all((ROOT / local).exists() for local in mounts.values() if not local.startswith("~"))
    for kind in ("head", "worker"):
        starts = [line for line in config[f"{kind}_start_ray_commands"] if "ray start" in line]
        assert len(starts) == 1
        assert "cluster/env.sh; ray start" in starts[0]
    head = next(line for line in config["head_start_ray_commands"] if "ray start" in line)
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head  # reached through ssh (`ray dashboard`), never open to the network
    stops = [line for line in config["head_start_ray_commands"] if "ray stop" in line]
    assert bool(stops) == (name != "onprem")


def test_onprem_counts_its_hosts() -> None:
    config = prepared("onprem")
    (kind,) = config["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (2, 2)


@pytest.mark.parametrize("name", ["onprem", "laptop"])
def test_the_providers_own_bootstrap_takes_the_file_as_it_is(name: str) -> None:
    from ray.autoscaler._private.providers import _get_node_provider_cls

    config = prepared(name)
    made = _get_node_provider_cls(config["provider"]).bootstrap_config(copy.deepcopy(config))
    assert made["available_node_types"] == config["available_node_types"]
    assert made["provider"] == config["provider"]


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """moto's EC2 in the region of aws.yaml, with a home of our own for the ssh key that Ray makes."""
    import boto3
    from moto import mock_aws

    for key in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    region = settings()["aws"]["region"]
    with mock_aws():
        iam = boto3.client("iam", region_name=region)
        for profile in ("head_profile", "worker_profile"):
            iam.create_instance_profile(InstanceProfileName=settings()["aws"][profile])
        yield boto3.client("ec2", region_name=region)


def test_aws_bootstrap_and_one_instance_of_each_type(ec2: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = bootstrap_aws(prepared("aws"))
    types = config["available_node_types"]
    machines = {kind["node_config"]["InstanceType"] for kind in types.values()}
    facts = {
        item["InstanceType"]: item
        for item in ec2.describe_instance_types(InstanceTypes=sorted(machines))["InstanceTypes"]
    }
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in types.items():
        made = provider.create_node(copy.deepcopy(kind["node_config"]), {"ray-node-type": name}, 1)
        (instance,) = ec2.describe_instances(InstanceIds=list(made))["Reservations"][0]["Instances"]
        assert instance["InstanceType"] == kind["node_config"]["InstanceType"]
        assert (instance.get("InstanceLifecycle") == "spot") == name.endswith("-spot")
        profile = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert profile == ("reid-dist-head" if name == "head" else "reid-dist-worker")
        fact = facts[instance["InstanceType"]]
        gpus = sum(gpu["Count"] for gpu in fact.get("GpuInfo", {}).get("Gpus", []))
        assert kind["resources"].get("GPU", 0) == gpus
        if name != "head":
            assert kind["resources"]["CPU"] == fact["VCpuInfo"]["DefaultVCpus"]
    spot = {name for name in types if name.endswith("-spot")}
    assert {name + "-spot" for name in types if name.startswith("gpu") and name not in spot} == spot
    assert {types[name]["resources"]["GPU"] for name in spot} >= {1, 8}


def test_gcp_nodes() -> None:
    config = load("gcp")
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        assert node["serviceAccounts"][0]["email"] == settings()["gcp"]["service_account"]
        machine, gpus = node["machineType"], kind["resources"].get("GPU", 0)
        if name != "head":
            assert kind["resources"]["CPU"] == int(machine.rpartition("-")[2])
        assert (node.get("scheduling", {}).get("provisioningModel") == "SPOT") == name.endswith("-spot")
        if gpus:  # Compute Engine refuses to move machines with GPUs
            assert node["scheduling"]["onHostMaintenance"] == "TERMINATE"
    start = " ".join(config["head_start_ray_commands"])
    assert "AWS_ENDPOINT_URL=https://storage.googleapis.com" in start
    assert any("gcloud secrets versions access" in line and "umask 077" in line for line in config["setup_commands"])


def test_laptop_is_the_fake_provider_under_autoscaler_v2() -> None:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
    from ray.autoscaler._private.providers import _get_node_provider_cls

    provider = load("laptop")["provider"]
    assert provider["head_node_id"] == LAPTOP_HEAD_ID == FAKE_HEAD_NODE_ID
    assert issubclass(_get_node_provider_cls(provider), FakeMultiNodeProvider)


def test_nodes_of_a_laptop_share_no_folder_for_the_code_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a node that starts removes it under the workers of the others."""
    import ray._private.node
    from ray.autoscaler._private.providers import _get_node_provider_cls

    folders = []
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setattr(ray._private.node, "Node", lambda params, **kwargs: folders.append(params.runtime_env_dir_name))
    provider = load("laptop")["provider"]
    laptop = _get_node_provider_cls(provider)({**provider, "gcs_address": "127.0.0.1:1"}, "laptop")
    laptop.create_node_with_resources_and_labels({}, {"ray-user-node-type": "cpu"}, 3, {"CPU": 1}, {})
    assert len(set(folders)) == len(folders) == 3


def test_no_secret_stands_in_a_file_of_the_cluster_folder() -> None:
    texts = {path: path.read_text() for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert len(texts) > 15
    assert not [path.name for path, text in texts.items() if SECRET.search(text)]
    assert SECRET.search("password: hunter2hunter2hunter2")
    assert SECRET.search("key AKIAABCDEFGHIJKLMNOP")


def test_image_is_pinned_and_made_by_the_one_script() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    bases = [line for line in lines if line.startswith("FROM ")]
    assert len(bases) == 1
    assert re.fullmatch(r"FROM nvidia/cuda:13\.0\.\d+-devel-ubuntu24\.04@sha256:[0-9a-f]{64}", bases[0])
    assert any(line.startswith("RUN") and "cluster/bootstrap.sh --$KIND" in line for line in lines)
    copied = " ".join(line for line in lines if line.startswith("COPY")).split()
    for needed in re.findall(r"\$root/([\w./-]+)", (CLUSTER / "bootstrap.sh").read_text()):
        if not needed.startswith(("tests/", ".venv")) and "$" not in needed and (ROOT / needed).is_file():
            assert needed in copied, needed


def test_dashboard_and_alerts_name_metrics_that_ray_exports() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
    from ray.train.v2._internal.metrics.controller import ControllerMetrics
    from ray.train.v2._internal.metrics.worker import WorkerMetrics

    from reid_dist.training.launch import GAUGES

    known = {f"ray_{name}" for name in METRICS_GAUGES} | {f"ray_reid_training_{name}" for name in GAUGES}
    for source in (ControllerMetrics, WorkerMetrics):
        known |= {
            f"ray_{value}" for key, value in vars(source).items() if key.isupper() and str(value).startswith("train_")
        }
    panels = json.loads((CLUSTER / "monitoring/dashboard.json").read_text())["panels"]
    rules = yaml.safe_load((CLUSTER / "monitoring/rules.yaml").read_text())["groups"][0]["rules"]
    expressions = [panel["targets"][0]["expr"] for panel in panels] + [rule["expr"] for rule in rules]
    used = {name for text in expressions for name in re.findall(r"ray_[a-z_]+", re.sub(r"by \([^)]*\)", "", text))}
    assert len(used) >= 10
    assert used <= known
    place = yaml.safe_load((CLUSTER / "monitoring/prometheus.yaml").read_text())["scrape_configs"][0]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert place["file_sd_configs"][0]["files"][0].endswith(PROMETHEUS_SERVICE_DISCOVERY_FILE)


def test_package_of_a_submitted_job_is_small_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `ray job submit --working-dir .` would send, made by Ray's own code."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    target = tmp_path / "package.zip"
    create_package(str(ROOT), target, include_gitignore=True, excludes=[".git", ".venv", "venv", "__pycache__"])
    with zipfile.ZipFile(target) as archive:
        names = set(archive.namelist())
    assert target.stat().st_size < 15e6  # of which 9 MB are the small MLLM's weights
    tracked = subprocess.run(
        ["git", "ls-files", "jobs", "reid_dist", "tuning"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(tracked.stdout.split()) <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "tests/", "work/", "cluster/"))]
