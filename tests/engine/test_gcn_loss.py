from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mprd.engine.gcn_loss import GcnLoss, RecordedGcnLoss, rounded
from mprd.engine.gcn_pairs import LabelledPairs
from mprd.engine.gcn_pool import PoolStep
from mprd.gcn.network import PairGCN
from mprd.gcn.node_features import CELLS_PER_CHUNK
from mprd.neighbors.reciprocal import measure_similarities
from mprd.runtime.distributed import WorkerGroup
from mprd.subgraphs import build_subgraphs

NUM_ANCHORS, NUM_FEATURES = 6, 12
SETTINGS: list[dict[str, Any]] = [
    *({"variant": variant} for variant in ("paper", "structure", "reciprocal")),
    {"variant": "structure", "link": "drop", "read_out": "both"},
    {"read_out": "scalars"},
]


class Recorder:
    """Stands in for torch's: what is recorded reads the tensors that it was recorded with, and no others."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, network: nn.Module, samples: tuple[Tensor, ...], *, allow_unused_input: bool) -> Any:
        assert allow_unused_input
        assert not any(sample.requires_grad for sample in samples)
        self.sizes.append(tuple(samples[2].shape))

        def replay(*inputs: Tensor) -> Tensor:
            # torch would copy others to where these are
            assert all(one is other for one, other in zip(inputs, samples, strict=True))
            return network(*samples)

        return replay


def draw_features(num_images: int, draw: torch.Generator) -> Tensor:
    return nn.functional.normalize(torch.randn(num_images, NUM_FEATURES, generator=draw), dim=1)


def draw_step(
    num_pairs: tuple[int, int], num_images: int, draw: torch.Generator, device: str | None = None
) -> PoolStep:
    sides = []
    for count in num_pairs:
        first = torch.randint(num_images, (count,), generator=draw)
        second = (first + torch.randint(1, num_images, (count,), generator=draw)) % num_images
        anchors = torch.randint(NUM_ANCHORS, (count,), generator=draw)
        is_positive = torch.rand(count, generator=draw) < 0.4
        columns = (torch.stack([first, second], dim=1), is_positive, anchors)
        sides.append(LabelledPairs(*(column.to(device) for column in columns)))
    return PoolStep(*sides, NUM_ANCHORS)


def draw_lists(num_images: int, width: int, draw: torch.Generator) -> Tensor:
    others = torch.rand(num_images, num_images, generator=draw).fill_diagonal_(-1).argsort(dim=1, descending=True)
    lists, lengths = others[:, :width], torch.randint(width + 1, (num_images, 1), generator=draw)
    return lists.where(torch.arange(width) < lengths, -1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("device", "tolerance"),
    [
        ("cpu", 2e-6),
        pytest.param("cuda", 2e-3, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_a_recorded_step_has_the_loss_and_the_gradients_of_one_launched(
    device: str, tolerance: float, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, draw = Recorder(), torch.Generator().manual_seed(3)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    gcn = PairGCN(NUM_FEATURES, hidden=8, mlp_hidden=6, generator=draw, **settings).to(device)
    plain, recorded = GcnLoss(gcn, WorkerGroup()), RecordedGcnLoss(gcn)
    # the second epoch has fewer images than the first, and lists that are longer
    for num_images, width in ((40, 6), (37, 9)):
        features = draw_features(num_images, draw).to(device)
        similarities = measure_similarities(features, k1=5, k2=2) if gcn.needs_similarities else None
        eta = 0.3 + width / 10
        begun = [loss.begin(features, similarities, eta=eta) for loss in (plain, recorded)]
        # large, small, none, one-sided
        for num_pairs in ((50, 40), (3, 2), (0, 0), (0, 5), (70, 0), (100, 90)):
            step = draw_step(num_pairs, num_images, draw, device)
            lists = draw_lists(num_images, width, draw).to(device)
            subgraphs = build_subgraphs(step.pairs, lists, is_trimmed=False)
            outcomes = []
            for loss_of in begun:
                gcn.zero_grad()
                loss = loss_of(subgraphs, step)
                loss.backward()
                found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in gcn.parameters()]
                outcomes.append([loss.detach().clone(), *found])
            torch.testing.assert_close(outcomes[1], outcomes[0], atol=tolerance, rtol=tolerance)
            assert sum(num_pairs) == 0 or outcomes[0][0] > 0.1
    sizes = [(128, 16), (64, 16), (256, 16), (128, 32), (64, 32), (256, 32)]
    assert [*recorded.steps] == sizes
    assert recorder.sizes == (sizes if device == "cpu" else [])


def test_another_number_of_images_is_recorded_anew_and_a_step_too_large_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder, draw = Recorder(), torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder)
    gcn = PairGCN(NUM_FEATURES, hidden=8, generator=draw)
    recorded = RecordedGcnLoss(gcn)
    for num_images in (64, 128, 128):
        features, step = draw_features(num_images, draw), draw_step((9, 9), num_images, draw)
        subgraphs = build_subgraphs(step.pairs, draw_lists(num_images, 4, draw))
        recorded.begin(features, None, eta=1.0)(subgraphs, step)
    assert recorder.sizes == 2 * [(64, 16)]
    monkeypatch.setitem(CELLS_PER_CHUNK, "cpu", 64 * (2 + 16) * 8 - 1)
    loss = recorded.begin(features, None, eta=1.0)(subgraphs, step)
    torch.testing.assert_close(loss, GcnLoss(gcn, WorkerGroup()).begin(features, None, eta=1.0)(subgraphs, step))
    assert len(recorder.sizes) == 2


def test_numbers_are_rounded_up_to_few() -> None:
    assert [rounded(number, digits=1) for number in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
    assert {rounded(number, digits=3) for number in range(65, 129)} == {80, 96, 112, 128}
    assert all(number <= rounded(number, digits=3) <= 1.25 * number for number in range(4, 3000))
