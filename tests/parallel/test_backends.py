from __future__ import annotations

import dataclasses
import logging
import sys

import pytest
import torch

from mprd.config.schema import Config, NeighborsConfig, SubgraphsConfig
from mprd.errors import UserError
from mprd.neighbors.exact import find_neighbors
from mprd.parallel import backends
from mprd.parallel.backends import AutoBuilder, choose_builder, choose_search, count_actors
from mprd.subgraphs import build_serially


def some_pairs(num_pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(50, (num_pairs, 1), generator=generator)
    return torch.cat([first, (first + 1) % 50], 1), torch.randint(50, (50, 4), generator=generator)


def test_serial_and_exact_are_the_plain_functions() -> None:
    assert choose_builder(SubgraphsConfig(executor="serial")) is build_serially
    assert choose_search(NeighborsConfig()) is find_neighbors


def test_auto_builds_few_pairs_here_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    pairs, table = some_pairs(100)
    builder = choose_builder(SubgraphsConfig())
    with caplog.at_level(logging.INFO, logger="mprd"):
        for _ in range(2):
            batches = list(builder(pairs, table, [60, 40]))
    assert [len(batch) for batch in batches] == [60, 40]
    assert torch.equal(torch.cat([batch.pairs for batch in batches]), pairs)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("subgraphs.executor = auto: serial (")
    assert "100 pairs" in lines[0]


def test_auto_takes_no_pairs() -> None:
    _, table = some_pairs(3)
    assert list(AutoBuilder(1)(torch.empty(0, 2, dtype=torch.int64), table, [])) == []


def test_auto_without_ray_builds_here_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "START_SECONDS", 0.0)
    monkeypatch.setattr(backends, "has_ray", lambda: False)
    with caplog.at_level(logging.INFO, logger="mprd"):
        assert AutoBuilder(1).choose(*some_pairs(100), [100]) is build_serially
    assert "Ray is not installed" in caplog.text


def test_what_needs_ray_says_so_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_ray", lambda: False)
    with pytest.raises(UserError, match=r"subgraphs\.executor=ray needs Ray"):
        choose_builder(SubgraphsConfig(executor="ray"))
    with pytest.raises(UserError, match=r"neighbors\.num_shards needs Ray"):
        choose_search(NeighborsConfig(num_shards=2))


def test_an_index_is_chosen_by_name() -> None:
    features = torch.nn.functional.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    table = choose_search(NeighborsConfig(search="hnsw"))(features, k=2, similarity=1.0, camids=None, metric="cosine")
    assert table.ids.tolist() == find_neighbors(features, k=2, similarity=1.0).ids.tolist()


def test_the_actors_that_a_run_needs_are_counted_before_it_starts(tiny_config: Config) -> None:
    assert count_actors(tiny_config) == 0
    subgraphs = SubgraphsConfig(executor="ray", num_actors=3)
    assert count_actors(tiny_config.model_copy(update={"subgraphs": subgraphs})) == 3


def test_the_loop_asks_the_builder_and_the_search_that_it_was_given(tiny_config: Config, tmp_path: object) -> None:
    from mprd.data.datasets import load_dataset
    from mprd.engine.trainer import Hooks, Trainer

    asked: list[str] = []

    def build(*args: object) -> object:
        asked.append("build")
        return build_serially(*args)  # type: ignore[arg-type]

    def search(*args: object, **options: object) -> object:
        asked.append("search")
        return find_neighbors(*args, **options)  # type: ignore[arg-type]

    dataset = load_dataset(tiny_config.data, cache_dir=tmp_path)  # type: ignore[arg-type]
    hooks = dataclasses.replace(Hooks(), build_subgraphs=build, search_all=search)  # type: ignore[arg-type]
    trainer = Trainer(tiny_config, dataset, device=torch.device("cpu"), hooks=hooks)
    trainer.fill_memory()
    trainer.train_gcn_epoch()
    assert asked == ["search", "build"]


def test_choosing_imports_neither_ray_nor_faiss() -> None:
    import subprocess

    code = (
        "import sys\nfrom mprd.parallel.backends import *\n"
        "from mprd.config.schema import *\nfrom mprd.config.loading import *\n"
        "choose_builder(SubgraphsConfig()), choose_search(NeighborsConfig())\n"
        "sys.exit(bool({'ray', 'faiss', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
