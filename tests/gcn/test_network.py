from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.gcn.network import PairGCN
from mprd.gcn.node_features import NUM_SCALARS, pair_scalars
from mprd.neighbors.reciprocal import SimilarityTable
from mprd.parallel.arrow import from_arrow, to_arrow
from mprd.subgraphs import build_subgraphs

PADDING = -1
VARIANTS = ["paper", "structure", "reciprocal"]
SETTINGS = list(product(VARIANTS, ["keep", "drop"]))


def table(lists: list[list[int]]) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([ids + [PADDING] * (width - len(ids)) for ids in lists])


def random_lists(num_images: int, longest: int, seed: int = 0, shortest: int = 1) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    lists = []
    for i in range(num_images):
        others = [n for n in range(num_images) if n != i]
        lists.append(draw.permutation(others)[: draw.integers(shortest, longest + 1)].tolist())
    return lists


def all_pairs(num_images: int) -> Tensor:
    return torch.tensor([[i, j] for i in range(num_images) for j in range(num_images) if i != j])


def unit_rows(num_images: int, num_features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    features = torch.randn(num_images, num_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.nn.functional.normalize(features, dim=1).to(dtype)


def make_gcn(num_features: int, dtype: torch.dtype = torch.float64, **settings) -> PairGCN:
    generator = torch.Generator().manual_seed(2)
    gcn = PairGCN(num_features, hidden=8, mlp_hidden=6, generator=generator, **settings)
    for layer in (gcn.conv, gcn.mlp_1, gcn.mlp_2):  # biases of 0 would leave empty windows on the kink of the ReLU
        torch.nn.init.uniform_(layer.bias, -0.3, 0.3, generator=generator)
    return gcn.to(dtype)


def draw_similarities(num_images: int) -> Tensor:
    """Draw a symmetric matrix in which half of the entries are 0 and an image's own is 1."""
    drawn = torch.rand(num_images, num_images, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    upper = (2 * drawn - 1).clamp(min=0).triu(1)
    return upper + upper.T + torch.eye(num_images)


def known(gcn: PairGCN, memory: Tensor) -> dict[str, SimilarityTable]:
    """Give the similarities to a variant that needs them."""
    if not gcn.needs_similarities:
        return {}
    matrix, num_images = draw_similarities(len(memory)), len(memory)
    keys = matrix.flatten().nonzero().squeeze(1)
    values = matrix.flatten()[keys]
    return {"similarities": SimilarityTable(keys, values, torch.arange(num_images), num_images)}


def grads(logits: Tensor, gcn: PairGCN, memory: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, len(logits), dtype=logits.dtype)
    return list(
        torch.autograd.grad(
            (weights * logits).sum() / 100, [*gcn.parameters(), memory], materialize_grads=True, retain_graph=True
        )
    )


def assert_paths_agree(gcn: PairGCN, memory: Tensor, pairs: Tensor, lists: list[list[int]], *, atol: float) -> None:
    raw = memory.clone().requires_grad_()
    memory = torch.nn.functional.normalize(raw, dim=1)  # which way a tie between |x_i|^2 and |x_j|^2 falls is left open
    subgraphs = build_subgraphs(pairs, table(lists))
    fast, reference = (path(memory, subgraphs, **known(gcn, memory)) for path in (gcn, gcn.forward_reference))
    torch.testing.assert_close(fast, reference, atol=atol, rtol=0)
    for a, b in zip(grads(fast, gcn, raw), grads(reference, gcn, raw), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def slow_logit(gcn: PairGCN, memory: np.ndarray, lists: list[list[int]], i: int, j: int) -> float:
    """Write Sec. 3.2 out for one pair: Eq. 4, labels, Eq. 5 twice, max, convolution, two layers."""
    theta = {name: value.detach().numpy() for name, value in gcn.named_parameters()}
    nodes = [i, j, *sorted((set(lists[i]) | set(lists[j])) - {i, j})]
    y = []
    for n in nodes:
        label = 1 if n in (i, j) else 2 if n in lists[i] and n in lists[j] else 0
        one_hot = [float(label == value) for value in (0, 1, 2)]
        if gcn.variant == "paper":
            y.append([math.sqrt(memory.shape[1]) * x for x in memory[n]] + one_hot)
        else:
            y.append([*one_hot, *sorted((float(memory[n] @ memory[i]), float(memory[n] @ memory[j])), reverse=True)])
        if gcn.variant == "reciprocal":
            near = draw_similarities(len(memory))[n]
            y[-1] += [4 * float(x) for x in sorted((near[i], near[j]), reverse=True)]
    layers = []
    for weights in (theta["theta_1"], theta["theta_2"]):
        rows = []
        for a in nodes:
            around = [a]
            for b in nodes:
                is_edge = (a in (i, j) and b in lists[a]) or (b in (i, j) and a in lists[b])
                is_link = {a, b} == {i, j}
                if a != b and is_edge and not (is_link and gcn.link == "drop"):
                    around.append(b)
            mean = sum(np.array(y[nodes.index(b)]) for b in around) / len(around)
            rows.append(np.maximum(mean @ weights, 0))
        y = rows
        layers.append(np.max(rows, axis=0))
    pooled = np.concatenate(layers)
    convolved = [
        max(0.0, float(bias + sum(kernel[0][s] * pooled[2 * t + s] for s in range(5))))
        for kernel, bias in zip(theta["conv.weight"], theta["conv.bias"], strict=True)
        for t in range((len(pooled) - 5) // 2 + 1)
    ]
    hidden = np.maximum(theta["mlp_1.weight"] @ convolved + theta["mlp_1.bias"], 0)
    return float(theta["mlp_2.weight"][0] @ hidden + theta["mlp_2.bias"][0])


@pytest.mark.parametrize(("variant", "link"), SETTINGS)
def test_logits_equal_a_loop_written_from_eq_5(variant: str, link: str) -> None:
    lists, memory = random_lists(9, 5), unit_rows(9, 7)
    gcn = make_gcn(7, variant=variant, link=link)
    pairs = all_pairs(9)
    logits = gcn(memory, build_subgraphs(pairs, table(lists)), **known(gcn, memory))
    expected = [slow_logit(gcn, memory.numpy(), lists, i, j) for i, j in pairs.tolist()]
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize(("variant", "link"), SETTINGS)
def test_graphs_with_holes_unsorted_as_on_an_accelerator_have_the_same_logits(variant: str, link: str) -> None:
    memory, gcn = unit_rows(12, 7), make_gcn(7, variant=variant, link=link, read_out="both")
    subgraphs = build_subgraphs(all_pairs(12), table(random_lists(12, 7, shortest=0)))
    looked_up = known(gcn, memory)
    inputs = gcn.look_up(memory, subgraphs, looked_up.get("similarities"))
    with_holes = gcn.judge(gcn.project(memory), subgraphs, inputs)
    torch.testing.assert_close(with_holes, gcn(memory, subgraphs, **looked_up), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("variant", "link"), SETTINGS)
@pytest.mark.parametrize(("longest", "shortest"), [(8, 8), (7, 1), (6, 0), (1, 1)])
def test_logits_and_gradients_equal_real_graphs(variant: str, link: str, longest: int, shortest: int) -> None:
    lists, pairs = random_lists(12, longest, shortest=shortest), all_pairs(12)
    assert_paths_agree(make_gcn(7, variant=variant, link=link), unit_rows(12, 7), pairs, lists, atol=1e-11)


@pytest.mark.parametrize(("variant", "link"), SETTINGS)
def test_single_precision_is_equal_to_1e_5(variant: str, link: str) -> None:
    lists, pairs = random_lists(30, 8, shortest=8), all_pairs(30)[::7]
    gcn = make_gcn(64, torch.float32, variant=variant, link=link)
    assert_paths_agree(gcn, unit_rows(30, 64, torch.float32), pairs, lists, atol=1e-5)


SPECIAL = {
    "no shared neighbors": [[2, 3], [4, 5], [0], [0], [0], [0]],
    "all neighbors shared": [[2, 3], [2, 3], [0], [0], [0], [0]],
    "linked from one side": [[1, 2], [3, 4], [0], [0], [0], [0]],
    "linked from the other side": [[2, 3], [0, 4], [0], [0], [0], [0]],
    "one list is empty without the other end": [[1], [2, 3], [0], [0], [0], [0]],
    "only each other": [[1], [0], [0], [0], [0], [0]],
    "no neighbors at all": [[], [], [0], [0], [0], [0]],
}


@pytest.mark.parametrize(("variant", "link"), SETTINGS)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_pairs_equal_real_graphs(name: str, variant: str, link: str) -> None:
    gcn = make_gcn(7, variant=variant, link=link)
    memory, pairs = unit_rows(6, 7), torch.tensor([[0, 1], [1, 0]])
    assert_paths_agree(gcn, memory, pairs, SPECIAL[name], atol=1e-11)
    logits = gcn(memory, build_subgraphs(pairs, table(SPECIAL[name])), **known(gcn, memory)).detach()
    assert math.isclose(float(logits[0]), slow_logit(gcn, memory.numpy(), SPECIAL[name], 0, 1), abs_tol=1e-12)


def test_a_perturbed_copy_behind_the_memory_is_an_image_like_any_other() -> None:
    # image 4 is a copy of image 0: it has neighbors, and stands in nobody's list
    lists = [[1, 2], [0, 3], [3, 0], [2, 1], [0, 1]]
    assert_paths_agree(make_gcn(7), unit_rows(5, 7), torch.tensor([[0, 4], [3, 4]]), lists, atol=1e-11)


@pytest.mark.parametrize(("variant", "link"), SETTINGS)
def test_gradcheck(variant: str, link: str) -> None:
    lists, pairs = random_lists(6, 3), all_pairs(6)[::4]
    gcn, memory = make_gcn(4, variant=variant, link=link), unit_rows(6, 4).requires_grad_()
    subgraphs = build_subgraphs(pairs, table(lists))
    names, values = zip(*gcn.named_parameters(), strict=True)

    def logits(memory: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(gcn, weights, (memory, subgraphs), known(gcn, memory))

    assert torch.autograd.gradcheck(logits, (memory, *values), atol=1e-6)


def test_a_variant_that_looks_similarities_up_says_so_where_there_are_none() -> None:
    with pytest.raises(ValueError, match=r"gcn\.variant: reciprocal looks similarities up, but got none"):
        make_gcn(7, variant="reciprocal")(unit_rows(5, 7), build_subgraphs(all_pairs(5), table(random_lists(5, 3))))


def test_keeping_or_dropping_the_link_changes_linked_pairs_alone() -> None:
    lists, pairs = random_lists(12, 5), all_pairs(12)
    subgraphs = build_subgraphs(pairs, table(lists))
    keep, drop = (make_gcn(7, link=link)(unit_rows(12, 7), subgraphs) for link in ("keep", "drop"))
    assert torch.equal(keep[~subgraphs.link], drop[~subgraphs.link])
    assert (keep[subgraphs.link] != drop[subgraphs.link]).float().mean() > 0.9


@pytest.mark.parametrize(("variant", "link"), SETTINGS)
def test_a_pair_has_the_same_logit_from_both_sides(variant: str, link: str) -> None:
    gcn, memory, lists, pairs = (
        make_gcn(7, variant=variant, link=link),
        unit_rows(10, 7),
        random_lists(10, 5),
        all_pairs(10),
    )
    one, other = (
        gcn(memory, build_subgraphs(some, table(lists)), **known(gcn, memory)) for some in (pairs, pairs.flip(1))
    )
    torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_leave_no_seam(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lists, pairs = random_lists(12, 7, shortest=0), all_pairs(12)
    gcn, memory, subgraphs = make_gcn(7, variant=variant), unit_rows(12, 7), build_subgraphs(pairs, table(lists))
    whole = gcn(memory, subgraphs, **known(gcn, memory))
    monkeypatch.setattr("mprd.gcn.node_features.CELLS_PER_CHUNK", {"cpu": 300})
    torch.testing.assert_close(gcn(memory, subgraphs, **known(gcn, memory)), whole, atol=1e-12, rtol=0)


def test_a_few_pairs_of_a_large_memory_equal_those_from_a_kept_projection() -> None:
    lists, pairs = random_lists(400, 4), torch.tensor([[3, 77], [399, 0], [5, 6]])
    for variant in VARIANTS:
        gcn, memory = make_gcn(7, variant=variant), unit_rows(400, 7)
        subgraphs = build_subgraphs(pairs, table(lists))
        kept = gcn(memory, subgraphs, projected=gcn.project(memory), **known(gcn, memory))
        torch.testing.assert_close(gcn(memory, subgraphs, **known(gcn, memory)), kept, atol=1e-12, rtol=0)
        assert_paths_agree(gcn, memory, pairs, lists, atol=1e-11)


def test_graphs_that_came_by_arrow_give_the_same_bits() -> None:
    subgraphs = build_subgraphs(all_pairs(12), table(random_lists(12, 7)))
    gcn, memory = make_gcn(7), unit_rows(12, 7)
    assert torch.equal(gcn(memory, subgraphs), gcn(memory, from_arrow(to_arrow(subgraphs))))


def jaccard(lists: list[list[int]], i: int, j: int) -> float:
    """Compare two lists, the pair itself left out."""
    one, other = set(lists[i]) - {i, j}, set(lists[j]) - {i, j}
    return len(one & other) / max(1, len(one | other))


@pytest.mark.parametrize("variant", VARIANTS)
def test_likelihoods_are_those_of_the_graphs_in_the_order_of_the_pairs(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists, pairs = random_lists(25, 16, shortest=1), all_pairs(25)
    gcn, memory = make_gcn(7, variant=variant), unit_rows(25, 7)
    expected = torch.tensor(
        [1 / (1 + math.exp(-slow_logit(gcn, memory.numpy(), lists, i, j))) for i, j in pairs[:90].tolist()]
    )
    for group in (2**15, 10):
        monkeypatch.setattr("mprd.gcn.network.PAIRS_PER_GROUP", group)
        likelihoods, overlaps = gcn.predict(memory, table(lists), pairs, **known(gcn, memory))
        assert overlaps.tolist() == [pytest.approx(jaccard(lists, i, j)) for i, j in pairs.tolist()]
        assert not likelihoods.requires_grad
        torch.testing.assert_close(likelihoods[:90].float(), expected, atol=1e-6, rtol=0)
        one_by_one = torch.cat(
            [gcn.predict(memory, table(lists), pair[None], **known(gcn, memory))[0] for pair in pairs[90:120]]
        )
        torch.testing.assert_close(likelihoods[90:120], one_by_one, atol=1e-12, rtol=0)


def test_no_pairs_give_no_logits() -> None:
    nothing = torch.empty(0, 2, dtype=torch.int64)
    gcn, memory, lists = make_gcn(7), unit_rows(5, 7), table(random_lists(5, 3))
    logits = gcn(memory, build_subgraphs(nothing, lists))
    assert logits.shape == (0,)
    assert all(not bool(grad.any()) for grad in grads(logits, gcn, memory.requires_grad_()))
    assert [part.shape for part in gcn.predict(memory.detach(), lists, nothing)] == [(0,), (0,)]


def test_one_pair_gives_one_logit() -> None:
    subgraphs = build_subgraphs(torch.tensor([[0, 1]]), table(random_lists(5, 3)))
    assert make_gcn(7)(unit_rows(5, 7), subgraphs).shape == (1,)


def slow_scalars(memory: np.ndarray, lists: list[list[int]], i: int, j: int) -> list[float]:
    around_i, around_j = set(lists[i]) - {j}, set(lists[j]) - {i}
    either = around_i | around_j
    smaller = larger = 0.0
    for n in either:
        cosines = [max(0.0, float(memory[n] @ memory[end])) for end in (i, j)]
        smaller, larger = smaller + min(cosines), larger + max(cosines)
    return [float(memory[i] @ memory[j]), len(around_i & around_j) / len(either), smaller / larger if larger else 0.0]


def test_scalars_of_a_pair_equal_a_loop() -> None:
    lists, pairs, memory = random_lists(12, 6, shortest=3), all_pairs(12), unit_rows(12, 7)
    found = pair_scalars(memory, build_subgraphs(pairs, table(lists)))
    wanted = [slow_scalars(memory.numpy(), lists, i, j) for i, j in pairs.tolist()]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_pair_without_neighbors_has_scalars() -> None:
    memory = unit_rows(3, 4)
    found = pair_scalars(memory, build_subgraphs(torch.tensor([[0, 1]]), table([[1], [0], [0]])))
    assert found[0].tolist() == [pytest.approx(float(memory[0] @ memory[1])), 0.0, 0.0]


@pytest.mark.parametrize("read_out", ["scalars", "both"])
def test_scalars_join_at_the_read_out_or_stand_for_the_graph(read_out: str) -> None:
    lists, pairs, memory = random_lists(12, 6), all_pairs(12), unit_rows(12, 7)
    gcn = make_gcn(7, read_out=read_out)
    subgraphs = build_subgraphs(pairs, table(lists))
    fast = gcn(memory, subgraphs)
    torch.testing.assert_close(fast, gcn.forward_reference(memory, subgraphs), atol=1e-11, rtol=0)
    torch.testing.assert_close(gcn.predict(memory, table(lists), pairs)[0], fast.sigmoid(), atol=1e-12, rtol=0)
    with torch.no_grad():
        if read_out == "both":
            gcn.mlp_1.weight[:, -NUM_SCALARS:] = 0
        else:
            gcn.theta_1.zero_()
    is_same = torch.allclose(gcn(memory, subgraphs), fast)
    # without its scalars the one changes, without a graph the other does not
    assert is_same == (read_out == "scalars")
    if read_out == "scalars":
        x = torch.tensor(slow_scalars(memory.numpy(), lists, *pairs[5].tolist()), dtype=torch.float64)
        by_hand = gcn.mlp_2.weight @ (gcn.mlp_1.weight @ x + gcn.mlp_1.bias).clamp(min=0) + gcn.mlp_2.bias
        torch.testing.assert_close(fast[5:6], by_hand, atol=1e-6, rtol=0)


def test_the_same_generator_draws_the_same_weights_and_a_state_dict_carries_them() -> None:
    one, same, other = (PairGCN(7, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.theta_1, other.theta_1)
    other.load_state_dict(one.state_dict())
    subgraphs = build_subgraphs(all_pairs(9), table(random_lists(9, 4)))
    memory = unit_rows(9, 7, torch.float32)
    assert torch.equal(one(memory, subgraphs), other(memory, subgraphs))


def test_weights_of_features_and_labels_start_at_a_scale_at_which_both_count() -> None:
    gcn = PairGCN(2048, generator=torch.Generator().manual_seed(0))
    feature, label, pair = gcn.theta_1.detach().split(gcn.columns)
    memory = unit_rows(50, 2048, torch.float32)
    assert 0.8 < (math.sqrt(2048) * memory @ feature).std() < 1.2
    assert 0.8 < label.std() < 1.2
    assert len(pair) == 0


def test_a_width_below_the_kernel_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"gcn\.hidden must be at least 3, but got 2"):
        PairGCN(7, hidden=2)
    assert make_gcn(7)(unit_rows(5, 7), build_subgraphs(torch.tensor([[0, 1]]), table(random_lists(5, 3)))).isfinite()
