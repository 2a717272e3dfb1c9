from __future__ import annotations

from collections.abc import Iterator

import pytest
from e2e_runs import Workshop, make_workshop
from ray_nodes import RayNodes


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    nodes = RayNodes(tmp_path_factory.mktemp("ray") / "log")
    nodes.add("127.0.0.2")
    nodes.add("127.0.0.3")
    yield nodes
    nodes.close()


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return make_workshop(tmp_path_factory.mktemp("workshop"))
