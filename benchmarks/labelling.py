"""Hold g_ij of all candidate pairs by the fast path against one PyG graph a pair, built in Python (on a sample).

A memory of Market-1501's size. The fast path's time includes building the pair graphs and projecting the memory.
Bar: at least 150 times faster, logits and gradients equal to 1e-5; at least 1,000,000 pair graphs a second on one core.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import get_args

import torch
import torch.nn.functional as F
from common import interleaved_medians, median_seconds, report
from neighbors import draw
from torch import Tensor

from mprd.gcn.network import PairGCN
from mprd.gcn.node_features import Variant
from mprd.neighbors.exact import find_neighbors
from mprd.neighbors.reciprocal import SimilarityTable, measure_similarities
from mprd.subgraphs import SubgraphBatch, build_subgraphs

K = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, three runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=512, help="pairs that the reference judges")
    parser.add_argument("--variant", choices=get_args(Variant), default="paper")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    memory = draw(3234 if options.quick else 12936).to(options.device)
    ids = find_neighbors(memory, k=K, similarity=1.0).ids
    pairs = torch.stack([torch.arange(len(ids), device=ids.device).repeat_interleave(K), ids.flatten()], dim=1)
    gcn = PairGCN(memory.shape[1], variant=options.variant, generator=torch.Generator().manual_seed(0))
    gcn = gcn.to(options.device)
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: options.sample]
    sample = pairs[chosen.to(options.device)]

    similarities = measure_similarities(memory) if gcn.needs_similarities else None
    measuring = median_seconds(partial(measure_similarities, memory), runs=1) if gcn.needs_similarities else None
    errors = compare(gcn, memory, build_subgraphs(sample, ids), similarities)
    print(f"{len(pairs)} pairs; on {len(sample)} of them, {errors}")

    @torch.no_grad()
    def judge_by_graphs() -> Tensor:
        return gcn.forward_reference(memory, build_subgraphs(sample, ids), similarities=similarities).sigmoid()

    runs = 3 if options.quick else 5
    judge_fast = partial(gcn.predict, memory, ids, pairs, similarities=similarities)
    reference, fast = interleaved_medians(judge_by_graphs, judge_fast, runs=runs)
    reference *= len(pairs) / len(sample)
    torch.set_num_threads(1)
    host_pairs, host_ids = pairs.cpu(), ids.cpu()
    building = median_seconds(lambda: build_subgraphs(host_pairs, host_ids), runs=9)
    torch.set_num_threads(options.threads)
    report(
        ratio=reference / fast,
        ratio_is="time of per-pair graphs (scaled from the sample) over time of the fast path; bar: at least 150",
        fast_seconds=fast,
        reference_seconds=reference,
        similarity_seconds=measuring,
        builder_pairs_per_second=round(len(pairs) / building),
        **errors,
        ran_on=options.device,
        variant=options.variant,
        num_images=len(memory),
        num_features=memory.shape[1],
        num_pairs=len(pairs),
        num_sampled=len(sample),
    )


def compare(
    gcn: PairGCN, memory: Tensor, subgraphs: SubgraphBatch, similarities: SimilarityTable | None
) -> dict[str, float]:
    """Measure how far logits, and gradients of a mean cross-entropy, lie apart at most on the two paths."""
    memory = memory.clone().requires_grad_()
    targets = (torch.arange(len(subgraphs), device=memory.device) % 2).to(memory.dtype)
    logits, gradients = [], []
    for path in (gcn.forward, gcn.forward_reference):
        logits.append(path(memory, subgraphs, similarities=similarities))
        loss = F.binary_cross_entropy_with_logits(logits[-1], targets)
        gradients.append(torch.autograd.grad(loss, [*gcn.parameters(), memory]))
    return {
        "logit_error": float((logits[0] - logits[1]).abs().max().detach()),
        "gradient_error": max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)),
    }


if __name__ == "__main__":
    main()
