"""The node provider of cluster/laptop.yaml: more raylets of this machine, each with a folder of its own for the code of jobs.

Ray's provider gives all of them one folder, and a node that is handed a job's working directory first removes what stands
there: under workers of the nodes that came before it, whose imports then fail.
"""

from __future__ import annotations

from typing import Any

from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LaptopProvider(FakeMultiNodeProvider):  # type: ignore[misc]
    """As Ray's; node n keeps its runtime environments in SESSION/runtime_resources_n."""

    started = 0

    def _create_node_with_resources_and_labels(self, *args: Any) -> None:
        with self.lock:
            self.started += 1
            shared = (
                ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME
            )  # read by the node's parameters; no argument leads there
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"{shared}_{self.started}"
            try:
                super()._create_node_with_resources_and_labels(*args)
            finally:
                ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = shared
