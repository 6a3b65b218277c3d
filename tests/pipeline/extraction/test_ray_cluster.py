"""An extraction on a Ray cluster of two nodes, one of which is killed in the middle."""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.extraction import ray_engine
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.ray_engine import EncodeWorker, WorkerConfig
from tests.pipeline.backbones.tiny import picture, prepare

pytestmark = [pytest.mark.heavy, pytest.mark.slow, pytest.mark.timeout(400)]

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
N = 64
WAIT = 200  # seconds until the worker of the second node must have begun its second shard
FAST_DETECTION = {
    "health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A cluster on this machine whose first node has one core, with this process connected."""
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nodes = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "_system_config": FAST_DETECTION,
            },
        )
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
        yield nodes
        ray.shutdown()
        nodes.shutdown()  # type: ignore[no-untyped-call]


class NodeKiller(EncodeWorker):
    """A worker that kills the second node at its second shard if it is on this node.

    On the first node it waits for that moment, so that the second node gets shards.
    """

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        assert isinstance(config.raw, Path)
        self._marks = config.raw.parent
        node = ray.get_runtime_context().get_node_id()
        self._is_on_second = node == (self._marks / "second").read_text()
        self._shards = 0

    def __call__(self, shard: pa.Table) -> pa.Table:
        self._shards += 1
        mark = self._marks / "killed"
        if self._shards == 2 and self._is_on_second:
            mark.touch()
            os.kill(os.getppid(), signal.SIGKILL)  # the raylet, of which all workers are children
            time.sleep(WAIT)
        end = time.monotonic() + WAIT
        while self._shards == 2 and not mark.exists() and time.monotonic() < end:
            time.sleep(0.05)
        return super().__call__(shard)


def rows(warehouse: Warehouse) -> pa.Table:
    table = FeatureStore(warehouse).table("tiny", "hashed", "image")
    parts = pa.concat_tables([pq.read_table(part) for part in table.parts()])
    return parts.sort_by("item").replace_schema_metadata(None)


@pytest.mark.filterwarnings("ignore")
def test_a_killed_node_loses_no_item_and_repeats_none(
    cluster: Any, warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(tmp_path / "raw" / f"{n}.png", n).name for n in range(N)]
    prepare(warehouse, tmp_path / "raw", ids=[f"i{n}" for n in range(N)], image=images)
    options = ExtractOptions(image="hashed", batch_size=1)
    extract_features(warehouse, "tiny", options)
    of_one_process = rows(warehouse)
    FeatureStore(warehouse).table("tiny", "hashed", "image").clear()

    node = cluster.add_node(num_cpus=1)
    (tmp_path / "second").write_text(node.node_id)
    monkeypatch.setattr(ray_engine, "EncodeWorker", NodeKiller)
    # One of two workers is on each node, because a node has one core.
    distributed = ExtractOptions(image="hashed", batch_size=1, engine="ray", workers=2)
    report = extract_features(warehouse, "tiny", distributed).tables[0]

    assert (tmp_path / "killed").exists()
    assert [node["Alive"] for node in ray.nodes()].count(True) == 1
    assert (report.encoded, report.failed) == (N, {})
    assert rows(warehouse).equals(of_one_process)
    assert extract_features(warehouse, "tiny", options).tables[0].reused == N
