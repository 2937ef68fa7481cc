from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch

from mprd.parallel.arrow import SCHEMA, from_arrow, rebatch, to_arrow
from mprd.subgraphs import build_subgraphs
from tests.graphs import all_pairs, graphs, padded, random_lists


def test_the_columns_by_hand() -> None:
    batch = build_subgraphs(torch.tensor([[0, 1], [2, 4]]), padded([[1, 2, 3], [3, 0, 4], [], [], []]))
    table = to_arrow(batch)
    assert table.schema == SCHEMA
    assert table.to_pylist() == [
        {"i": 0, "j": 1, "nodes": [2, 3, 4], "membership": [1, 3, 2], "link": True},
        {"i": 2, "j": 4, "nodes": [], "membership": [], "link": False},
    ]


def test_every_pair_comes_back_with_its_leaves() -> None:
    batch = build_subgraphs(all_pairs(12), padded(random_lists(12, 7)))
    whole, parts = to_arrow(batch), [to_arrow(batch.rows(0, 50)), to_arrow(batch.rows(50, 999))]
    for table in (whole, pa.concat_tables(parts)):
        assert graphs(from_arrow(table)) == graphs(batch)
    assert len(from_arrow(to_arrow(batch.rows(0, 0)))) == 0


@pytest.mark.parametrize("cuts", [[20], [1, 19], [7, 0, 6, 7]])
def test_tables_are_cut_anew_at_any_place(cuts: list[int]) -> None:
    batch = build_subgraphs(all_pairs(9)[:20], padded(random_lists(9, 3)))
    whole = to_arrow(batch)
    blocks = iter([whole.slice(a, b - a) for a, b in pairwise(np.cumsum([0, *cuts]))])
    parts = list(rebatch(blocks, [2, 0, 11, 7]))
    assert [len(from_arrow(part)) for part in parts] == [2, 0, 11, 7]
    assert pa.concat_tables(parts).to_pylist() == whole.to_pylist()
