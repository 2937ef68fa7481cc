"""The fast path equals a slow loop written from the paper, and the reference path on PyG."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mprd.gcn import PairGCN
from mprd.gcn.reference import reference_logits
from mprd.subgraphs import build_subgraphs
from tests.graphs import all_pairs, padded, random_lists, unit_rows

Lists = list[list[int]]


def make_gcn(num_features: int = 7, dtype: torch.dtype = torch.float64, **settings: Any) -> PairGCN:
    draw = torch.Generator().manual_seed(2)
    gcn = PairGCN(num_features, **{"hidden": 8, "mlp_hidden": 6, "generator": draw, **settings})
    for layer in (gcn.conv, gcn.mlp_1, gcn.mlp_2):  # with biases of 0, empty windows would be at the kink of the ReLU
        torch.nn.init.uniform_(layer.bias, -0.3, 0.3, generator=draw)
    return gcn.to(dtype)


def logits_of(gcn: PairGCN, memory: Tensor, pairs: Tensor, lists: Lists) -> Tensor:
    return gcn(memory, build_subgraphs(pairs, padded(lists)))


def assert_paths_agree(gcn: PairGCN, memory: Tensor, pairs: Tensor, lists: Lists, *, atol: float = 1e-11) -> None:
    """Compare logits and gradients of the fast path and of the reference path."""
    raw = memory.clone().requires_grad_()
    memory = normalize(raw, dim=1)  # the gradient of a maximum of |x_i|^2 and |x_j|^2 is open for unit rows alone
    subgraphs = build_subgraphs(pairs, padded(lists))
    outcomes = []
    for path in (gcn, partial(reference_logits, gcn)):
        logits = path(memory, subgraphs)
        loss = (torch.linspace(-1, 1, len(logits), dtype=logits.dtype) * logits).sum() / 100
        inputs = [*gcn.parameters(), raw]
        outcomes.append([logits, *torch.autograd.grad(loss, inputs, materialize_grads=True, retain_graph=True)])
    for fast, reference in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, reference, atol=atol, rtol=0)


def slow_logit(gcn: PairGCN, memory: np.ndarray, lists: list[list[int]], i: int, j: int) -> float:
    """Write Sec. 3.2 out for one pair: Eq. 4, labels, Eq. 5 twice, max, convolution, two layers."""
    theta = {name: value.detach().numpy() for name, value in gcn.named_parameters()}
    nodes = [i, j, *sorted((set(lists[i]) | set(lists[j])) - {i, j})]
    y = []
    for n in nodes:
        label = 1 if n in (i, j) else 2 if n in lists[i] and n in lists[j] else 0
        one_hot = [float(label == value) for value in (0, 1, 2)]
        y.append([math.sqrt(memory.shape[1]) * x for x in memory[n]] + one_hot)
    layers = []
    for weights in (theta["theta_1"], theta["theta_2"]):
        rows = []
        for a in nodes:
            around = [a]
            for b in nodes:
                is_edge = (a in (i, j) and b in lists[a]) or (b in (i, j) and a in lists[b])
                if a != b and is_edge:
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


def test_logits_equal_a_loop_written_from_eq_5() -> None:
    lists, memory, pairs = random_lists(9, 5, shortest=1), unit_rows(9, 7), all_pairs(9)
    gcn = make_gcn()
    expected = [slow_logit(gcn, memory.numpy(), lists, i, j) for i, j in pairs.tolist()]
    logits = logits_of(gcn, memory, pairs, lists)
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-12)
    torch.testing.assert_close(logits_of(gcn, memory, pairs.flip(1), lists), logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("longest", "shortest"), [(8, 8), (7, 1), (6, 0), (1, 1)])
def test_logits_and_gradients_equal_those_of_the_reference(longest: int, shortest: int) -> None:
    lists = random_lists(12, longest, shortest=shortest)
    assert_paths_agree(make_gcn(), unit_rows(12, 7), all_pairs(12), lists)


def test_single_precision_is_equal_to_1e_5() -> None:
    gcn = make_gcn(64, torch.float32)
    memory = unit_rows(30, 64, dtype=torch.float32)
    assert_paths_agree(gcn, memory, all_pairs(30)[::7], random_lists(30, 8, shortest=8), atol=1e-5)


SPECIAL = {
    "no shared neighbors": [[2, 3], [4, 5], [0], [0], [0], [0]],
    "all neighbors shared": [[2, 3], [2, 3], [0], [0], [0], [0]],
    "linked from one side": [[1, 2], [3, 4], [0], [0], [0], [0]],
    "linked from the other side": [[2, 3], [0, 4], [0], [0], [0], [0]],
    "one list is empty without the other end": [[1], [2, 3], [0], [0], [0], [0]],
    "only each other": [[1], [0], [0], [0], [0], [0]],
    "no neighbors at all": [[], [], [0], [0], [0], [0]],
    # image 4 is a copy of image 0: it has neighbors, and is in no list
    "a perturbed copy": [[1, 2], [0, 3], [3, 0], [2, 1], [0, 1]],
}


@pytest.mark.parametrize("lists", SPECIAL.values(), ids=SPECIAL)
def test_special_pairs_equal_the_reference_and_the_loop(lists: Lists) -> None:
    gcn, memory = make_gcn(), unit_rows(len(lists), 7)
    pairs = torch.tensor([[0, 1], [0, 4]])
    assert_paths_agree(gcn, memory, pairs, lists)
    expected = [slow_logit(gcn, memory.numpy(), lists, i, j) for i, j in pairs.tolist()]
    np.testing.assert_allclose(logits_of(gcn, memory, pairs, lists).detach().numpy(), expected, atol=1e-12)


def test_gradcheck() -> None:
    gcn, memory = make_gcn(3, hidden=4, mlp_hidden=3), unit_rows(6, 3).requires_grad_()
    subgraphs = build_subgraphs(all_pairs(6)[::6], padded(random_lists(6, 3, shortest=1)))
    names, values = zip(*gcn.named_parameters(), strict=True)

    def logits(memory: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        return torch.func.functional_call(gcn, weights, (memory, subgraphs))

    assert torch.autograd.gradcheck(logits, (memory, *values), atol=1e-6)


def test_chunks_of_any_size_have_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    gcn = make_gcn()
    memory, lists, pairs = unit_rows(12, 7), random_lists(12, 7), all_pairs(12)
    whole = logits_of(gcn, memory, pairs, lists)
    likelihoods = gcn.predict(memory, padded(lists), pairs)
    monkeypatch.setattr("mprd.gcn.network.CELLS_PER_CHUNK", {"cpu": 300})
    torch.testing.assert_close(logits_of(gcn, memory, pairs, lists), whole, atol=1e-12, rtol=0)
    # as on an accelerator: absent leaves stay in the middle of rows, and pairs in their order
    monkeypatch.setattr(PairGCN, "fits_at_once", lambda *_, **__: True)
    torch.testing.assert_close(logits_of(gcn, memory, pairs, lists), whole, atol=1e-12, rtol=0)
    found = gcn.predict(memory, padded(lists), pairs)
    torch.testing.assert_close(found, likelihoods, atol=1e-12, rtol=0)


def test_a_few_pairs_of_a_large_memory() -> None:
    lists, pairs, memory = (
        random_lists(400, 4, shortest=1),
        torch.tensor([[3, 77], [399, 0], [5, 6]]),
        unit_rows(400, 7),
    )
    gcn = make_gcn()
    subgraphs = build_subgraphs(pairs, padded(lists))
    kept = gcn(memory, subgraphs, projected=gcn.project(memory))
    torch.testing.assert_close(logits_of(gcn, memory, pairs, lists), kept, atol=1e-12, rtol=0)
    assert_paths_agree(gcn, memory, pairs, lists)


def test_predict_returns_likelihoods_in_the_order_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, pairs, memory = random_lists(25, 16, shortest=1), all_pairs(25), unit_rows(25, 7)
    gcn = make_gcn()
    expected = [1 / (1 + math.exp(-slow_logit(gcn, memory.numpy(), lists, i, j))) for i, j in pairs[:40].tolist()]
    for group in (2**15, 10):
        monkeypatch.setattr("mprd.gcn.network.PAIRS_PER_GROUP", group)
        likelihoods = gcn.predict(memory, padded(lists), pairs)
        assert not likelihoods.requires_grad
        assert likelihoods[:40].tolist() == pytest.approx(expected, abs=1e-9)
    for pair, likelihood in zip(pairs[40:50], likelihoods[40:50], strict=True):
        alone = gcn.predict(memory, padded(lists), pair[None])
        torch.testing.assert_close(alone[0], likelihood, atol=1e-12, rtol=0)


def test_no_pairs_give_no_logits_and_one_gives_one() -> None:
    gcn, memory, lists = make_gcn(), unit_rows(5, 7).requires_grad_(), random_lists(5, 3, shortest=1)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    logits = logits_of(gcn, memory, nothing, lists)
    assert logits.shape == (0,)
    gradients = torch.autograd.grad(logits.sum(), [*gcn.parameters(), memory], materialize_grads=True)
    assert not any(bool(gradient.any()) for gradient in gradients)
    assert gcn.predict(memory.detach(), padded(lists), nothing).shape == (0,)
    assert logits_of(gcn, memory, torch.tensor([[0, 1]]), lists).shape == (1,)


def test_the_same_generator_draws_the_same_weights_and_a_state_dict_holds_them() -> None:
    one, same, other = (PairGCN(7, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.theta_1, other.theta_1)
    other.load_state_dict(one.state_dict())
    inputs = unit_rows(9, 7, dtype=torch.float32), all_pairs(9), random_lists(9, 4)
    assert torch.equal(logits_of(one, *inputs), logits_of(other, *inputs))


def test_weights_of_features_and_labels_start_at_a_scale_at_which_both_count() -> None:
    gcn = PairGCN(2048, generator=torch.Generator().manual_seed(0))
    feature, label = gcn.theta_1.detach().split(gcn.columns)
    memory = unit_rows(50, 2048, dtype=torch.float32)
    assert 0.8 < (math.sqrt(2048) * memory @ feature).std() < 1.2
    assert 0.8 < label.std() < 1.2
