from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from mprd.config.schema import Config, SubgraphsConfig
from mprd.errors import UserError
from mprd.parallel import backends
from mprd.parallel.backends import AutoBuilder, choose_builder
from mprd.subgraphs import build_serially
from tests.graphs import all_pairs, graphs, padded, random_lists

PAIRS, LISTS = all_pairs(11)[:100], padded(random_lists(11, 4))


def test_serial_is_the_plain_function() -> None:
    assert choose_builder(SubgraphsConfig(executor="serial")) is build_serially


def test_auto_builds_few_pairs_serially_and_logs_the_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    builder = choose_builder(SubgraphsConfig())
    with caplog.at_level(logging.INFO, logger="mprd"):
        for _ in range(2):
            batches = list(builder(PAIRS, LISTS, [60, 40]))
    assert [len(batch) for batch in batches] == [60, 40]
    assert torch.equal(torch.cat([batch.pairs for batch in batches]), PAIRS)
    assert len(caplog.records) == 1
    assert list(AutoBuilder(1)(PAIRS[:0], LISTS, [])) == []


@pytest.mark.ray
def test_auto_builds_on_ray_where_that_is_predicted_to_be_faster(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "START_SECONDS", -1e9)
    builder = AutoBuilder(2)
    found = [graph for batch in builder(PAIRS, LISTS, [60, 40]) for graph in graphs(batch)]
    assert builder.choice == "ray"
    assert found == [graph for batch in build_serially(PAIRS, LISTS, [60, 40]) for graph in graphs(batch)]
    assert AutoBuilder(0).choose(PAIRS, LISTS, [100]) is build_serially


def test_without_ray_auto_builds_serially_and_the_other_setting_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "START_SECONDS", 0.0)
    monkeypatch.setattr(backends, "has_ray", lambda: False)
    assert AutoBuilder(1).choose(PAIRS, LISTS, [100]) is build_serially
    with pytest.raises(UserError, match=r"subgraphs\.executor=ray needs Ray"):
        choose_builder(SubgraphsConfig(executor="ray"))


def test_the_actors_of_a_run_are_counted_before_it_starts(tiny_config: Config) -> None:
    assert tiny_config.num_actors == 0
    subgraphs = SubgraphsConfig(executor="ray", num_actors=3)
    assert tiny_config.model_copy(update={"subgraphs": subgraphs}).num_actors == 3


def test_choosing_imports_neither_ray_nor_faiss() -> None:
    code = (
        "import sys\nfrom mprd.parallel.backends import *\nfrom mprd.config.schema import *\n"
        "import mprd.neighbors.lists\nchoose_builder(SubgraphsConfig())\n"
        "sys.exit(bool({'ray', 'faiss', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
