"""Renders the launcher files: `python -m cluster.render [SETTINGS.yaml] [FOLDER]`.

Default: cluster/settings.yaml into cluster/. What repeats (mounts, set-up and start lines, pod templates) stands once, in
cluster/templates; a test compares the committed files with what this writes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import yaml

HERE = Path(__file__).resolve().parent
LAUNCHERS = ("laptop", "onprem", "aws", "gcp")
LAPTOP_HEAD_ID = "f" * 51 + "00000"  # the fake provider's own id of a head

# Grafana panels: title, Prometheus expression, unit.
PANELS = """
Training: loss | ray_reid_training_loss | short
Training: rows per second | ray_reid_training_rows_per_s | short
Training: step | ray_reid_training_step | short
Training: state of the controllers | sum by (ray_train_run_name, ray_train_controller_state) (ray_train_controller_state) | short
Training: seconds lost to starting workers | sum by (ray_train_run_name) (ray_train_worker_group_start_total_time_s) | s
Training: seconds blocked in reports | sum by (ray_train_worker_world_rank) (ray_train_report_total_blocked_time_s) | s
GPU use | avg by (ip, GpuIndex) (ray_node_gpus_utilization) | percent
GPU memory in use | sum by (ip) (ray_node_gram_used) | decmbytes
CPU use | avg by (ip) (ray_node_cpu_utilization) | percent
Memory in use | ray_node_mem_used / ray_node_mem_total | percentunit
Disk in use | ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free) | percentunit
Network in | ray_node_network_receive_speed | Bps
Nodes by type | sum by (node_type) (ray_cluster_active_nodes) | short
"""


def ray_version() -> str:
    """The pin of requirements.txt."""
    found = re.search(r"^ray\S*==(\S+)", (HERE.parent / "requirements.txt").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError("requirements.txt pins no ray")
    return found[1]


def render(settings: dict[str, Any]) -> dict[str, str]:
    """{file name below cluster/: content}. Raises jinja2.UndefinedError naming a setting that is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - YAML, not HTML
    )
    facts = {**settings, "ray_version": ray_version(), "laptop_head_id": LAPTOP_HEAD_ID}
    files = {f"{name}.yaml": environment.get_template(f"{name}.yaml.j2").render(facts) for name in LAUNCHERS}
    files["kuberay/raycluster.yaml"] = environment.get_template("raycluster.yaml.j2").render(facts)
    kuberay = settings["kuberay"]
    shapes = {"cpu": kuberay["cpu"], **{f"gpu-{shape['gpus']}": shape for shape in kuberay["gpu"]}}
    for verb, job in kuberay["jobs"].items():
        text = environment.get_template("rayjob.yaml.j2").render(facts, verb=verb, job=job, shape=shapes[job["group"]])
        files[f"kuberay/rayjob-{verb}.yaml"] = text
    files["monitoring/dashboard.json"] = dashboard()
    return {
        name: re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{2,}", "\n", text)).strip() + "\n" for name, text in files.items()
    }


def dashboard() -> str:
    """The Grafana dashboard of PANELS, two beside each other."""
    panels = [
        {
            "id": number + 1,
            "type": "timeseries",
            "title": title,
            "datasource": {"type": "prometheus", "uid": "prometheus"},
            "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
            "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
            "targets": [{"refId": "A", "expr": expression}],
        }
        for number, (title, expression, unit) in enumerate(line.split(" | ") for line in PANELS.split("\n") if line)
    ]
    content = {"uid": "reid-dist", "title": "reid-dist", "schemaVersion": 39, "refresh": "30s",
               "time": {"from": "now-3h", "to": "now"}, "panels": panels}  # fmt: skip
    return json.dumps(content, indent=1)


def main(argv: list[str]) -> None:
    """Write the files."""
    if any(word.startswith("-") for word in argv):
        raise SystemExit("usage: python -m cluster.render [SETTINGS.yaml [FOLDER]]")
    settings = yaml.safe_load(Path(argv[0] if argv else HERE / "settings.yaml").read_text())
    folder = Path(argv[1]) if len(argv) > 1 else HERE
    for name, text in render(settings).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        sys.stderr.write(f"{path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
