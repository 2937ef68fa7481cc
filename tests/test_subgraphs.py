from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.subgraphs import build_serially, build_subgraphs, drnl, grouped, pack, to_graph
from tests.graphs import PADDING, all_pairs, graphs, leaves, padded, random_lists, slow_graphs

ORACLE = Path(__file__).parent / "oracle"


def test_a_small_pair_by_hand() -> None:
    # NN(0) = 1 2 3, NN(1) = 3 0 4: the link is direct, 3 is shared
    batch = build_subgraphs(torch.tensor([[0, 1]]), padded([[1, 2, 3], [3, 0, 4], [], [], []]))
    assert batch.nodes.tolist() == [[-1, 2, 3, -1, -1, 4]]
    assert batch.in_i.tolist() == [[False, True, True, False, False, False]]
    assert batch.in_j.tolist() == [[False, False, True, False, False, True]]
    assert batch.labels.tolist() == [[0, 0, 2, 0, 0, 0]]
    assert batch.link.tolist() == [True]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(5))
def test_all_pairs_of_ragged_lists_agree_with_sets(seed: int, dtype: torch.dtype) -> None:
    lists, pairs = random_lists(12, 7, seed=seed), all_pairs(12)
    batch = build_subgraphs(pairs, padded(lists).to(dtype))
    assert graphs(batch) == slow_graphs(lists, pairs)
    assert batch.nodes.dtype == torch.int64


SPECIAL = {
    "no shared neighbors": ([[2, 3], [4, 5], [], [], [], []], [2, 3, 4, 5], False),
    "only each other": ([[1], [0]], [], True),
    "no neighbors at all": ([[], []], [], False),
}


@pytest.mark.parametrize(("lists", "nodes", "link"), SPECIAL.values(), ids=SPECIAL)
def test_pairs_without_shared_neighbors(lists: list[list[int]], nodes: list[int], link: bool) -> None:
    batch = build_subgraphs(torch.tensor([[0, 1]]), padded(lists))
    assert [node for node, *_ in leaves(batch, 0)] == nodes
    assert batch.link.tolist() == [link]
    assert not batch.labels.any()
    assert to_graph(batch, 0).node_ids.tolist() == [0, 1, *nodes]
    assert to_graph(batch, 0).adjacency[:2, :2].tolist() == [[False, link], [link, False]]


def test_no_pairs_give_an_empty_batch() -> None:
    batch = build_subgraphs(torch.empty(0, 2, dtype=torch.int64), padded([[1], [0]]))
    assert batch.nodes.shape == (0, 0)
    assert len(pack(batch)[0]) == len(batch) == 0


def test_columns_that_these_pairs_do_not_use_are_left_out_if_trimmed() -> None:
    lists = padded([[1], [0], [0, 1, 3, 4], [0], [0]])
    for pairs, width in (([[0, 1]], 2), ([[0, 1]] * 9, 2), ([[0, 2]], 8)):
        assert build_subgraphs(torch.tensor(pairs), lists).nodes.shape == (len(pairs), width)
    whole = build_subgraphs(torch.tensor([[0, 1]]), lists, is_trimmed=False)
    assert whole.nodes.shape == (1, 8)
    assert graphs(whole) == graphs(build_subgraphs(torch.tensor([[0, 1]]), lists))


@pytest.mark.parametrize("seed", range(4))
def test_a_written_out_graph_has_the_edges_of_eq_4_and_the_labels_of_drnl(seed: int) -> None:
    lists, pairs = random_lists(14, 8, seed=seed), all_pairs(14)
    batch = build_subgraphs(pairs, padded(lists))
    for p, (i, j) in enumerate(pairs.tolist()):
        adjacency, node_ids = to_graph(batch, p)
        for a, x in enumerate(node_ids):
            for b, y in enumerate(node_ids):
                is_edge = (y in (i, j) and x in lists[y]) or (x in (i, j) and y in lists[x])
                assert bool(adjacency[a, b]) == is_edge
        # on two stars the general labeling has 1 for the pair, 2 for shared leaves and 0 for the others
        assert drnl(adjacency).tolist() == [1, 1] + [label for *_, label in leaves(batch, p)]


def test_drnl_matches_the_published_code() -> None:
    cases = np.load(ORACLE / "extra_drnl.npz")
    num_cases = sum(name.startswith("A_") for name in cases.files)
    assert num_cases == 40
    for n in range(num_cases):
        labels = drnl(cases[f"A_{n}"])
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, cases[f"label_{n}"])


def test_drnl_of_a_path_between_the_ends_by_hand() -> None:
    # 0 - 2 - 3 - 1, and 4 apart: d_0(2) = 1, d_1(2) = 2, so 1 + 1 + 1 (1 + 1 - 1) = 3
    adjacency = np.zeros((5, 5))
    for a, b in ((0, 2), (2, 3), (3, 1)):
        adjacency[a, b] = adjacency[b, a] = 1
    assert drnl(adjacency).tolist() == drnl(torch.from_numpy(adjacency)).tolist() == [1, 1, 3, 3, 0]
    assert drnl(adjacency[:2, :2]).tolist() == [1, 1]
    for wrong in (np.zeros((1, 1)), np.zeros((3, 2)), np.zeros(4)):
        with pytest.raises(ValueError, match="adjacency"):
            drnl(wrong)


def test_packing_removes_absent_leaves_and_sorts_by_size() -> None:
    batch = build_subgraphs(all_pairs(12), padded(random_lists(12, 7, seed=4)))
    packed, num_leaves, order = pack(batch)
    expected = graphs(batch)
    assert num_leaves.tolist() == sorted(len(graph[-1]) for graph in expected)
    assert packed.nodes.shape[1] == int(num_leaves[-1])
    assert graphs(packed) == [expected[before] for before in order.tolist()]
    assert all((row[:count] != PADDING).all() for row, count in zip(packed.nodes, num_leaves, strict=True))


def test_batches_of_any_size_and_pieces_of_any_size_hold_the_same_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, pairs, sizes = random_lists(7, 5, seed=1), all_pairs(7), [3, 0, 9, 1, 20, 9]
    for pairs_at_once, cells in ((4096, 2**18), (10, 20), (1, 1)):
        monkeypatch.setattr("mprd.subgraphs.PAIRS_AT_ONCE", pairs_at_once)
        monkeypatch.setattr("mprd.subgraphs.CELLS_PER_CHUNK", cells)
        batches = list(build_serially(pairs, padded(lists), sizes))
        assert [len(batch) for batch in batches] == sizes
        assert [graph for batch in batches for graph in graphs(batch)] == slow_graphs(lists, pairs)


def test_a_group_is_as_few_batches_as_sum_to_the_number() -> None:
    assert list(grouped([5, 0, 5, 5, 1], 6)) == [[5, 0, 5], [5, 1]]
    assert list(grouped([5, 5], 99)) == [[5, 5]]
    assert list(grouped([], 9)) == []


def test_pairs_and_lists_of_the_wrong_kind_are_refused() -> None:
    lists = padded([[1], [0]])
    for wrong in (torch.tensor([[0.0, 1.0]]), torch.tensor([0, 1])):
        with pytest.raises(TypeError, match="pairs must be int64"):
            build_subgraphs(wrong, lists)
    with pytest.raises(TypeError, match="neighbor_ids must be int"):
        build_subgraphs(torch.tensor([[0, 1]]), lists.float())
