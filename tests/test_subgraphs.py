from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from mprd.subgraphs import (
    SCHEMA,
    SubgraphBatch,
    arrow_schema,
    build_serially,
    build_subgraphs,
    drnl,
    from_arrow,
    grouped,
    overlap,
    pack,
    to_arrow,
    to_graph,
)

ORACLE = Path(__file__).parent / "oracle"
PADDING = -1


def table(*lists: list[int]) -> Tensor:
    width = max(map(len, lists), default=0)
    padded = [ids + [PADDING] * (width - len(ids)) for ids in lists]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(lists), width)


def random_lists(num_images: int, longest: int, seed: int, shortest: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    lists = []
    for i in range(num_images):
        others = [n for n in range(num_images) if n != i]
        lists.append(draw.permutation(others)[: draw.integers(shortest, longest + 1)].tolist())
    return lists


def all_pairs(num_images: int) -> Tensor:
    return torch.tensor([[i, j] for i in range(num_images) for j in range(num_images) if i != j])


def leaves(batch: SubgraphBatch, p: int) -> list[tuple[int, bool, bool, int]]:
    columns = zip(
        batch.nodes[p].tolist(), batch.in_i[p].tolist(), batch.in_j[p].tolist(), batch.labels[p].tolist(), strict=True
    )
    return [leaf for leaf in columns if leaf[0] != PADDING]


def slow_leaves(lists: list[list[int]], i: int, j: int) -> list[tuple[int, bool, bool, int]]:
    """Write Eq. 4 out with Python sets."""
    nodes = [n for n in lists[i] if n != j] + [n for n in lists[j] if n != i and n not in lists[i]]
    memberships = [(n, n in lists[i], n in lists[j]) for n in nodes]
    return [(n, in_i, in_j, 2 if in_i and in_j else 0) for n, in_i, in_j in memberships]


def test_a_small_pair_by_hand() -> None:
    # NN(0) = 1 2 3, NN(1) = 3 0 4: the link is direct, 3 is shared
    batch = build_subgraphs(torch.tensor([[0, 1]]), table([1, 2, 3], [3, 0, 4], [], [], []))
    assert batch.nodes.tolist() == [[-1, 2, 3, -1, -1, 4]]
    assert batch.in_i.tolist() == [[False, True, True, False, False, False]]
    assert batch.in_j.tolist() == [[False, False, True, False, False, True]]
    assert batch.labels.tolist() == [[0, 0, 2, 0, 0, 0]]
    assert batch.link.tolist() == [True]
    # 3 of 2, 3, 4
    torch.testing.assert_close(overlap(batch), torch.tensor([1 / 3]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(5))
def test_all_pairs_of_ragged_lists_agree_with_sets(seed: int, dtype: torch.dtype) -> None:
    lists = random_lists(12, 7, seed)
    pairs = all_pairs(12)
    batch = build_subgraphs(pairs, table(*lists).to(dtype))
    for p, (i, j) in enumerate(pairs.tolist()):
        assert leaves(batch, p) == slow_leaves(lists, i, j)
        assert bool(batch.link[p]) == (j in lists[i] or i in lists[j])
        around_i, around_j = set(lists[i]) - {j}, set(lists[j]) - {i}
        wanted = len(around_i & around_j) / max(1, len(around_i | around_j))
        assert float(overlap(batch)[p]) == pytest.approx(wanted, abs=1e-6)
    assert batch.nodes.dtype == torch.int64


def test_many_pairs_are_built_in_pieces_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, pairs = random_lists(9, 4, 0), all_pairs(9)
    whole = build_subgraphs(pairs, table(*lists))
    monkeypatch.setattr("mprd.subgraphs.CELLS_PER_CHUNK", 20)
    pieces = build_subgraphs(pairs, table(*lists))
    for name in ("pairs", "nodes", "in_i", "in_j", "link"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name))


def test_a_pair_without_shared_neighbors_has_no_label_two() -> None:
    batch = build_subgraphs(torch.tensor([[0, 1]]), table([2, 3], [4, 5], [], [], [], []))
    assert batch.labels.tolist() == [[0, 0, 0, 0]]
    assert batch.link.tolist() == [False]


def test_a_pair_that_has_only_each_other_has_no_leaves() -> None:
    batch = build_subgraphs(torch.tensor([[0, 1]]), table([1], [0]))
    assert leaves(batch, 0) == []
    assert batch.link.tolist() == [True]
    assert overlap(batch).tolist() == [0.0]
    graph = to_graph(batch, 0)
    assert graph.adjacency.tolist() == [[False, True], [True, False]]
    assert not to_graph(batch, 0, link="drop").adjacency.any()


def test_no_pairs_give_an_empty_batch() -> None:
    batch = build_subgraphs(torch.empty(0, 2, dtype=torch.int64), table([1], [0]))
    assert len(batch) == 0
    assert batch.nodes.shape == (0, 0)
    assert len(from_arrow(to_arrow(batch))) == 0
    assert len(pack(batch)[0]) == 0


def test_images_without_any_neighbor_still_make_a_pair() -> None:
    batch = build_subgraphs(torch.tensor([[0, 1]]), table([], []))
    assert batch.nodes.shape == (1, 0)
    assert to_graph(batch, 0).node_ids.tolist() == [0, 1]


def test_columns_that_these_pairs_do_not_use_are_left_out() -> None:
    lists = table([1], [0], [0, 1, 3, 4], [0], [0])
    assert build_subgraphs(torch.tensor([[0, 1]]), lists).nodes.shape == (1, 2)
    assert build_subgraphs(torch.tensor([[0, 1]] * 9), lists).nodes.shape == (9, 2)
    assert build_subgraphs(torch.tensor([[0, 2]]), lists).nodes.shape == (1, 8)


def test_an_unordered_pair_has_the_same_graph_from_both_sides() -> None:
    lists = random_lists(10, 5, 3)
    one, other = (build_subgraphs(torch.tensor([pair]), table(*lists)) for pair in ([2, 7], [7, 2]))
    assert {(n, b, a, x) for n, a, b, x in leaves(one, 0)} == set(leaves(other, 0))


def test_the_graph_written_out_has_edges_at_the_two_ends_alone() -> None:
    lists = random_lists(12, 7, 1, shortest=1)
    pairs = all_pairs(12)
    batch = build_subgraphs(pairs, table(*lists))
    for p, (i, j) in enumerate(pairs.tolist()):
        adjacency, node_ids = to_graph(batch, p)
        for a, x in enumerate(node_ids):
            for b, y in enumerate(node_ids):
                expected = (y in (i, j) and x in lists[y]) or (x in (i, j) and y in lists[x])
                assert bool(adjacency[a, b]) == expected


@pytest.mark.parametrize("link", ["keep", "drop"])
@pytest.mark.parametrize("seed", range(10))
def test_on_two_stars_the_general_labelling_knows_only_pair_shared_and_rest(seed: int, link: str) -> None:
    lists = random_lists(14, 8, seed)
    pairs = all_pairs(14)
    batch = build_subgraphs(pairs, table(*lists))
    for p in range(len(pairs)):
        expected = [1, 1] + [label for *_, label in leaves(batch, p)]
        assert drnl(to_graph(batch, p, link=link).adjacency).tolist() == expected


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
    assert drnl(adjacency).tolist() == [1, 1, 3, 3, 0]
    assert drnl(torch.from_numpy(adjacency)).tolist() == [1, 1, 3, 3, 0]
    assert drnl(adjacency[:2, :2]).tolist() == [1, 1]


def test_drnl_needs_a_square_matrix_with_a_pair() -> None:
    for wrong in (np.zeros((1, 1)), np.zeros((3, 2)), np.zeros(4)):
        with pytest.raises(ValueError, match="adjacency"):
            drnl(wrong)


def test_packing_closes_holes_and_sorts_by_size() -> None:
    lists, pairs = random_lists(12, 7, 4), all_pairs(12)
    batch = build_subgraphs(pairs, table(*lists))
    packed, num_leaves, order = pack(batch)
    assert num_leaves.tolist() == sorted(len(leaves(batch, p)) for p in range(len(batch)))
    assert packed.nodes.shape[1] == int(num_leaves[-1])
    for p, before in enumerate(order.tolist()):
        assert leaves(packed, p) == leaves(batch, before)
        assert packed.pairs[p].tolist() == pairs[before].tolist()
        assert packed.link[p] == batch.link[before]
        assert (packed.nodes[p, : num_leaves[p]] >= 0).all()


def test_arrow_keeps_every_pair_with_its_leaves() -> None:
    lists, pairs = random_lists(12, 7, 2), all_pairs(12)
    batch = build_subgraphs(pairs, table(*lists))
    for carried in (
        to_arrow(batch),
        pa.Table.from_batches([to_arrow(batch.rows(0, 50)), to_arrow(batch.rows(50, 999))]),
    ):
        again = from_arrow(carried)
        assert torch.equal(again.pairs, batch.pairs)
        assert torch.equal(again.link, batch.link)
        assert [leaves(again, p) for p in range(len(pairs))] == [leaves(batch, p) for p in range(len(pairs))]


def test_the_arrow_columns_by_hand() -> None:
    batch = build_subgraphs(torch.tensor([[0, 1], [2, 4]]), table([1, 2, 3], [3, 0, 4], [], [], []))
    record = to_arrow(batch, label=np.array([1, 0]), source=None)
    assert record.schema == arrow_schema()
    assert record.schema.names == list(SCHEMA)
    assert record.to_pylist() == [
        {"i": 0, "j": 1, "nodes": [2, 3, 4], "membership": [1, 3, 2], "link": True, "drnl": [0, 2, 0], "label": 1}
        | {"source": None},
        {"i": 2, "j": 4, "nodes": [], "membership": [], "link": False, "drnl": [], "label": 0, "source": None},
    ]


def test_a_pair_of_neighborhoods_of_eight_ships_in_about_a_hundred_bytes() -> None:
    lists = random_lists(40, 8, 0, shortest=8)
    batch = build_subgraphs(all_pairs(40), table(*lists))
    assert to_arrow(batch).nbytes / len(batch) < 130


def test_the_serial_builder_yields_batches_of_the_wanted_sizes_in_order() -> None:
    lists, pairs = table(*random_lists(6, 3, 0)), all_pairs(6)
    batches = list(build_serially(pairs, lists, [4, 0, 26]))
    assert [len(batch) for batch in batches] == [4, 0, 26]
    assert torch.equal(torch.cat([batch.pairs for batch in batches]), pairs)


def test_batches_that_are_built_together_are_those_built_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, pairs, sizes = table(*random_lists(7, 5, 1)), all_pairs(7), [3, 0, 9, 1, 20, 9]
    alone = [build_subgraphs(part, lists) for part in pairs.split(sizes)]
    for pairs_at_once in (1, 10, 4096):
        monkeypatch.setattr("mprd.subgraphs.PAIRS_AT_ONCE", pairs_at_once)
        for batch, expected in zip(build_serially(pairs, lists, sizes), alone, strict=True):
            assert torch.equal(batch.pairs, expected.pairs)
            assert torch.equal(batch.link, expected.link)
            assert [leaves(batch, p) for p in range(len(batch))] == [leaves(expected, p) for p in range(len(batch))]


def test_a_group_is_as_few_batches_as_hold_so_many_pairs() -> None:
    assert list(grouped([5, 0, 5, 5, 1], 6)) == [[5, 0, 5], [5, 1]]
    assert list(grouped([5, 5], 99)) == [[5, 5]]
    assert list(grouped([], 9)) == []


def test_pairs_and_lists_of_the_wrong_kind_are_refused() -> None:
    lists = table([1], [0])
    with pytest.raises(TypeError, match="pairs must be int64"):
        build_subgraphs(torch.tensor([[0.0, 1.0]]), lists)
    with pytest.raises(TypeError, match="pairs must be int64"):
        build_subgraphs(torch.tensor([0, 1]), lists)
    with pytest.raises(TypeError, match="neighbor_ids must be int"):
        build_subgraphs(torch.tensor([[0, 1]]), lists.float())


def test_the_module_is_imported_without_pyarrow() -> None:
    code = "import sys, mprd.subgraphs; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
