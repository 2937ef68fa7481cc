"""The builder and the search on Ray give what one process gives, in the same order."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console
from torch import Tensor

from mprd.config.loading import build_config
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.gcn.network import PairGCN
from mprd.neighbors.exact import find_neighbors
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.subgraphs import SubgraphBatch, SubgraphBuilder, build_serially, build_subgraphs, from_arrow, to_arrow
from mprd.train.local import run_local

ray = pytest.importorskip("ray")
from mprd.parallel.ray_actors import RayBuilder, check_budget, find_in_shards, rebatch  # noqa: E402

NUM_CPUS = 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module", params=["serial", "ray"])
def build(request: pytest.FixtureRequest) -> SubgraphBuilder:
    if request.param == "serial":
        return build_serially
    request.getfixturevalue("cluster")
    return RayBuilder(2)


def ragged_table(num_images: int, longest: int, seed: int = 0) -> Tensor:
    draw = np.random.default_rng(seed)
    ids = np.full((num_images, longest), -1)
    for i in range(num_images):
        others = draw.permutation([n for n in range(num_images) if n != i])[: draw.integers(0, longest + 1)]
        ids[i, : len(others)] = others
    return torch.from_numpy(ids)


def random_pairs(num_pairs: int, num_images: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(num_images, (num_pairs,), generator=generator)
    step = torch.randint(1, num_images, (num_pairs,), generator=generator)
    return torch.stack([first, (first + step) % num_images], 1)


def graphs(batch: SubgraphBatch) -> list[tuple]:
    """Write each pair's graph out: the pair, the link, and the leaves in order with the stars they are in."""
    return [
        (pair, link, [leaf for leaf in zip(nodes, in_i, in_j, strict=True) if leaf[0] >= 0])
        for pair, link, nodes, in_i, in_j in zip(
            *(column.tolist() for column in (batch.pairs, batch.link, batch.nodes, batch.in_i, batch.in_j)), strict=True
        )
    ]


def slow_graph(lists: list[list[int]], i: int, j: int) -> tuple:
    """Write Eq. 4 out with Python lists."""
    nodes = [n for n in lists[i] if n != j] + [n for n in lists[j] if n != i and n not in lists[i]]
    return [i, j], j in lists[i] or i in lists[j], [(n, n in lists[i], n in lists[j]) for n in nodes]


def gpu_free_gcn() -> PairGCN:
    torch.manual_seed(0)
    return PairGCN(8, variant="paper", link="keep", hidden=8, conv_channels=2, mlp_hidden=8)


@pytest.mark.ray
def test_any_builder_yields_the_graphs_of_eq_4_in_order(build: SubgraphBuilder) -> None:
    table, pairs = ragged_table(40, 6), random_pairs(700, 40)
    sizes = [3, 0, 500, 1, 196]
    batches = list(build(pairs, table, sizes))
    assert [len(batch) for batch in batches] == sizes
    lists = [[n for n in row if n >= 0] for row in table.tolist()]
    found = [graph for batch in batches for graph in graphs(batch)]
    assert found == [slow_graph(lists, i, j) for i, j in pairs.tolist()]


@pytest.mark.ray
def test_any_builder_takes_no_pairs_and_refuses_the_wrong_kind(build: SubgraphBuilder) -> None:
    table = ragged_table(5, 3)
    none = torch.empty(0, 2, dtype=torch.int64)
    assert list(build(none, table, [])) == []
    assert [len(batch) for batch in build(none, table, [0, 0])] == [0, 0]
    with pytest.raises(TypeError, match="pairs must be int64"):
        list(build(torch.zeros(2, 2), table, [2]))


@pytest.mark.ray
def test_labels_and_sources_come_back_with_their_pairs(cluster: None) -> None:
    table, pairs = ragged_table(40, 6), random_pairs(900, 40)
    label, source = np.arange(900) % 2, np.arange(900) // 7 % 3
    sizes = [400, 500]
    streamed = list(RayBuilder(2).stream(pairs, table, sizes, label=label, source=source))
    for part, start in zip(streamed, (0, 400), strict=True):
        rows = slice(start, start + len(part))
        serial = to_arrow(build_subgraphs(pairs[rows], table), label=label[rows], source=source[rows])
        assert part.schema == serial.schema
        assert part.to_pylist() == serial.to_pylist()
    assert [len(part) for part in streamed] == sizes


@pytest.mark.ray
def test_the_gcn_judges_the_graphs_of_both_builders_alike_to_the_bit(cluster: None) -> None:
    table, pairs = ragged_table(40, 6), random_pairs(300, 40)
    gcn, memory = gpu_free_gcn(), torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    builders = (build_serially, RayBuilder(1))
    one, other = (torch.cat([gcn(memory, b) for b in build(pairs, table, [150, 150])]) for build in builders)
    assert torch.equal(one, other)


@pytest.mark.ray
def test_a_stream_that_is_left_early_gives_its_cpus_back(cluster: None) -> None:
    stream = RayBuilder(2)(random_pairs(5000, 40), ragged_table(40, 6), [100] * 50)
    next(stream)
    stream.close()
    wait_for(lambda: ray.available_resources().get("CPU") == NUM_CPUS)


@pytest.mark.ray
def test_a_killed_actor_changes_nothing(cluster: None) -> None:
    table, pairs = ragged_table(40, 6), random_pairs(40_000, 40)
    stream = RayBuilder(1)(pairs, table, [10_000] * 4)
    batches = [next(stream)]
    victims = [a["pid"] for a in actors() if a["state"] == "ALIVE"]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    batches += list(stream)
    assert victims
    assert [graphs(b) for b in batches] == [graphs(b) for b in build_serially(pairs, table, [10_000] * 4)]


@pytest.mark.ray
def test_too_few_cpus_are_an_error_with_the_number_to_ask_for(cluster: None) -> None:
    with pytest.raises(UserError, match=r"subgraphs\.executor=ray: 1 x 4 .* need 4, but Ray has 3.*--num-cpus 4"):
        RayBuilder(4)
    with pytest.raises(UserError, match=r"2 x 2 actors .* --num-cpus 4"):
        check_budget(2, setting="subgraphs.executor=ray", num_workers=2)


@pytest.mark.ray
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("similarity", [-1.0, 0.4, 1.0])
def test_shards_on_actors_find_what_one_process_finds(cluster: None, num_shards: int, similarity: float) -> None:
    wait_for(lambda: ray.available_resources().get("CPU") == NUM_CPUS)
    features = torch.randn(53, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = torch.nn.functional.normalize(features, dim=1)
    rule = {"k": 3, "similarity": similarity, "k_max": 9}
    table = find_in_shards(features, num_shards=num_shards, block_rows=7, **rule)
    expected = find_neighbors(features, **rule)
    assert torch.equal(table.ids, expected.ids)
    assert torch.equal(table.counts, expected.counts)
    assert table.num_capped == expected.num_capped


@pytest.mark.ray
def test_a_run_with_actors_ends_as_one_without_to_the_bit(cluster: None, tiny_config: Config, tmp_path: Path) -> None:
    final = []
    for executor in ("serial", "ray"):
        wait_for(lambda: ray.available_resources().get("CPU") == NUM_CPUS)
        values = tiny_config.model_dump(mode="json")
        values["subgraphs"] = {"executor": executor, "num_actors": 1}
        values["pairs"]["refresh"] = "epoch"
        values["train"]["epochs"] = 2
        folder = RunFolder(tmp_path / executor)
        rows = run_local(build_config(values), folder, resume=False, console=Console(file=io.StringIO()))
        state = checkpoint.load(folder.last)
        losses = torch.tensor([[row["gcn_loss"], row["cnn_loss"]] for row in rows])
        final.append([losses, state["memory"], state["positives"], *state["gcn"].values()])
    assert all(torch.equal(one, other) for one, other in zip(*final, strict=True))


@pytest.mark.ray
def test_starting_ray_leaves_the_signals_to_the_run() -> None:
    code = (
        "import signal, torch\nold = signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "mine = signal.getsignal(signal.SIGTERM)\n"
        "from mprd.parallel.ray_actors import join_ray\njoin_ray(1)\nassert signal.getsignal(signal.SIGTERM) is mine\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tables_are_cut_anew_at_any_place() -> None:
    whole = pa.Table.from_batches([to_arrow(build_subgraphs(random_pairs(20, 9), ragged_table(9, 3)))])
    for cuts in ([20], [1, 19], [7, 0, 6, 7]):
        starts = np.cumsum([0, *cuts])
        blocks = iter([whole.slice(a, b - a) for a, b in itertools.pairwise(starts)])
        parts = list(rebatch(blocks, [2, 0, 11, 7]))
        assert [len(part) for part in parts] == [2, 0, 11, 7]
        assert pa.concat_tables(parts).to_pylist() == whole.to_pylist()
        assert [len(from_arrow(part)) for part in parts] == [2, 0, 11, 7]


def actors() -> list[dict]:
    """List the actors that this file's cluster runs."""
    found = ray._private.state.actors().values()
    return [{"pid": a["Pid"], "state": a["State"]} for a in found if "MapWorker" in a["ActorClassName"]]


def wait_for(is_true: object, seconds: float = 60) -> None:
    assert callable(is_true)
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "waited in vain"
        threading.Event().wait(0.2)
