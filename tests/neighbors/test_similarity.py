"""The similarity: whitening by hand, by the surest pairs of the loop, and its file."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import NeighborsConfig
from mprd.neighbors.lists import FrozenLists
from mprd.neighbors.similarity import KnownIds, Similarity, fit_similarity, fit_whitening

CONFIG = NeighborsConfig(whitening=True, k=4, k_max=12)
PEOPLE, PER_PERSON, CAMERAS = 60, 6, 3


def crowd() -> tuple[Tensor, Tensor, Tensor]:
    """Draw people whose images differ most in the dimensions that tell people apart least, under three cameras."""
    draw = torch.Generator().manual_seed(0)
    people = torch.randn(PEOPLE, 24, generator=draw) * torch.linspace(1.6, 0.4, 24)
    noise = torch.randn(PEOPLE * PER_PERSON, 24, generator=draw) * torch.linspace(0.4, 2.4, 24)
    pids = torch.arange(PEOPLE).repeat_interleave(PER_PERSON)
    return F.normalize(people[pids] + noise), pids, torch.arange(len(pids)) % CAMERAS


def share_of_true(lists: FrozenLists, pids: Tensor) -> float:
    return float((pids[lists.ids] == pids[:, None]).float().mean())


def slow_whitening(x: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Whiten by the covariance of the differences of pairs, each weighted by 1 / sqrt(degree_i degree_j)."""
    degree = [max(1, sum(i in pair for pair in pairs)) for i in range(len(x))]
    within, total = np.zeros((x.shape[1], x.shape[1])), 0.0
    for i, j in pairs:
        weight = (degree[i] * degree[j]) ** -0.5
        within += weight * np.outer(x[i] - x[j], x[i] - x[j])
        total += weight
    within /= total
    within += np.trace(within) / len(within) * np.eye(len(within))
    values, vectors = np.linalg.eigh(within)
    y = (x - x.mean(0)) @ vectors / np.sqrt(values)
    return y / np.linalg.norm(y, axis=1, keepdims=True)


def test_whitening_has_the_cosines_of_the_inverse_square_root_of_the_pairs_covariance() -> None:
    features, *_ = crowd()
    pairs = [(0, 1), (1, 2), (0, 3), (20, 24), (24, 25), (40, 1)]
    whiten = fit_whitening(features.double(), *torch.tensor(pairs).T)
    expected = slow_whitening(features.double().numpy(), pairs)
    found = whiten(features.double())
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-9)


def test_features_are_whitened_by_the_surest_pairs_found_twice() -> None:
    features, _, camids = crowd()
    compared = features
    for _ in range(2):
        table = FrozenLists(compared, camids, CONFIG, similarity=Similarity()).similarities
        first, second = table.pairs
        best = table.values.sort(descending=True, stable=True).indices[: 2 * len(features)]
        pairs = [*zip(first[best].tolist(), second[best].tolist(), strict=True)]
        compared = torch.from_numpy(slow_whitening(features.double().numpy(), pairs)).float()
    found = fit_similarity(features, camids, CONFIG)(features)
    torch.testing.assert_close(found @ found.T, compared @ compared.T, atol=1e-4, rtol=0)


def test_a_whitening_of_the_epoch_before_stands_for_the_first_round() -> None:
    features, _, camids = crowd()
    first = fit_similarity(features, camids, CONFIG)
    second = fit_similarity(features, camids, CONFIG, last=first.whitening)
    # the pairs of a third round
    table = FrozenLists(first(features), camids, CONFIG, similarity=Similarity()).similarities
    surest = table.surest(2 * len(features))
    expected = fit_whitening(features, *(ids[surest] for ids in table.pairs))(features)
    torch.testing.assert_close(second(features), expected)


def test_a_network_that_has_collapsed_gets_no_whitening() -> None:
    features, camids = F.normalize(torch.ones(40, 8), dim=1), torch.arange(40) % 2
    similarity = fit_similarity(features, camids, CONFIG)
    assert similarity.whitening is None
    assert torch.equal(similarity(features), features)


def test_lists_of_whitened_features_hold_more_mates() -> None:
    features, pids, camids = crowd()
    plain = FrozenLists(features, camids, CONFIG, similarity=Similarity())
    whitened = FrozenLists(features, camids, CONFIG, similarity=fit_similarity(features, camids, CONFIG))
    assert share_of_true(whitened, pids) > share_of_true(plain, pids) + 0.02


def test_pairs_with_labeled_images_are_judged_as_far_as_they_are_known() -> None:
    # images 0 to 2 show person 7, image 3 person 8; 4 and 5 are unknown
    ids, pids = torch.tensor([0, 1, 2, 3]), torch.tensor([7, 7, 7, 8])
    first, second = torch.tensor([[0, 1], [1, 2], [0, 3], [2, 4], [4, 5]]).T.repeat(1, 20)
    whole, partly = (KnownIds.of(ids, pids, num_images=6, is_whole=is_whole) for is_whole in (True, False))
    assert whole.precision(first, second) == 2 / 4
    assert partly.precision(first, second) == 2 / 3
    assert whole.precision(first[4:5], second[4:5]) is None


def test_lists_behind_j_are_as_long_as_labeled_identities_are_large() -> None:
    def labeled(sizes: tuple[int, ...], *, is_whole: bool = True) -> KnownIds:
        pids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        return KnownIds.of(torch.arange(len(pids)), pids, num_images=200, is_whole=is_whole)

    assert labeled((5, 10, 15)).k1 == 17
    assert [labeled((2, 2)).k1, labeled((90,)).k1] == [6, 32]
    assert labeled((10, 20, 30), is_whole=False).k1 == labeled(()).k1 == 20


def test_a_similarity_is_restored_to_the_bit() -> None:
    features, _, camids = crowd()
    similarity = fit_similarity(features, camids, CONFIG)
    restored = Similarity.from_state_dict(similarity.state_dict())
    assert torch.equal(restored(features), similarity(features))
    assert (restored.report, restored.k1) == (similarity.report, similarity.k1)
