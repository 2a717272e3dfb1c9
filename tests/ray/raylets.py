"""A Ray cluster of several nodes on this machine, each a raylet with an address and resources of its own.

A process, as Ray's start-up is no test's matter: it takes orders on stdin, answers each with a line of JSON, and ends
the nodes that it has started when stdin closes.

    node 127.0.0.2 2    start a node with 2 CPUs -> the process ids of its raylet
"""

from __future__ import annotations

import json
import sys
from typing import Any

from ray.cluster_utils import Cluster


def main() -> None:
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    print(json.dumps(cluster.address), flush=True)
    for line in sys.stdin:
        _, address, num_cpus = line.split()
        node = cluster.add_node(num_cpus=int(num_cpus), node_ip_address=address)
        print(json.dumps([info.process.pid for info in node.all_processes["raylet"]]), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
