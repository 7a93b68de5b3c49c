"""Runs `bulk --ray` on a cluster of two nodes, kills a node during the run, and compares the output byte by byte.

    python benchmarks/bulk_ray.py BUNDLE --json benchmarks/results/bulk-ray.json

The nodes are processes on this machine (`ray.cluster_utils.Cluster`), each with two CPUs, beside a head without CPUs.
Each of the two nodes runs one worker. When a quarter of the output is written, the node of one worker is killed; the
worker starts again on the other node. Expected: the output has the bytes of a run without Ray. Needs the extra `ray`.

Exit status 1 if one of the expectations is not met.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ray
from bulk_kills import digest, draw
from ray.cluster_utils import Cluster as LocalCluster
from reporting import bundle_path, parser_of, write_result

from blip2edge.bulk.options import BulkOptions
from blip2edge.bulk.pipeline import Output, run_bulk
from blip2edge.bulk.ray_backend import Cluster
from blip2edge.bulk.sources import PictureSource
from blip2edge.cli import run_script

ROOT = Path(__file__).parents[1]


def nodes_of_workers() -> set[str]:
    """Returns the ids of the nodes on which workers of bulk are running."""
    actors = ray._private.state.actors().values()  # the public function needs Ray's dashboard
    return {
        actor["Address"]["NodeID"] for actor in actors if actor["State"] == "ALIVE" and "Map" in actor["ActorClassName"]
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--chunk-size", type=int, default=50)
    parser.add_argument("--duplicates", type=float)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        draw(root / "pictures", arguments.pictures)
        options = BulkOptions(
            arguments.bundle, chunk_size=arguments.chunk_size, threads=1, duplicates=arguments.duplicates
        )
        here, there = root / "here", root / "there"
        source = PictureSource(str(root / "pictures"))
        alone = run_bulk(source, Output.named(here, "webdataset", False), options)
        head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 200 << 20}
        local = LocalCluster(initialize_head=True, head_node_args=head)
        nodes = [local.add_node(num_cpus=2, object_store_memory=200 << 20) for _ in range(2)]
        seen: dict[str, Any] = {}

        def kill() -> None:
            parts = -(-arguments.pictures // arguments.chunk_size)
            while len(list(root.glob("there.run/part-*.tar"))) < parts // 4:
                time.sleep(0.05)
            before = nodes_of_workers()
            lost = next(node for node in nodes if node.node_id in before)
            seen["parts_written_at_kill"] = len(list(root.glob("there.run/part-*.tar")))
            seen["nodes_of_workers_before"] = len(before)
            local.remove_node(lost, allow_graceful=False)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        cluster = Cluster(local.address, workers=2)
        counts = run_bulk(source, Output.named(there, "webdataset", False), options, cluster=cluster)
        thread.join()
        seen["nodes_alive_at_the_end"] = len(local.list_all_nodes()) - 1
        local.shutdown()
        equal = digest(here) == digest(there)
    held = equal and seen.get("nodes_of_workers_before") == 2 and counts["computed"] == arguments.pictures
    write_result(arguments.json, load=os.getloadavg(), held=held, equal_bytes=equal, alone=alone, ray=counts, kill=seen)
    print(f"{counts}, {seen}, {'held' if held else 'NOT HELD'}")
    return 0 if held else 1


if __name__ == "__main__":
    run_script(main)
