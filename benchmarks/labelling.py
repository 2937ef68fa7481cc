"""Compare the fast path of the GCN on all candidate pairs with its reference path on a sample (mprd.gcn.reference).

The memory has Market-1501's size. The fast path's time includes building the pair graphs and projecting the memory.
Limits: 150 times faster, logits and gradients equal to 1e-5, 1,000,000 pair graphs a second on one core.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from common import interleaved_medians, median_seconds, report
from neighbors import draw
from torch import Tensor

from mprd.gcn.network import PairGCN
from mprd.gcn.reference import reference_logits
from mprd.neighbors.exact import find_neighbors
from mprd.subgraphs import SubgraphBatch, build_subgraphs

K = 8


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    memory = draw(3234 if options.quick else 12936).to(options.device)
    ids = find_neighbors(memory, k=K, similarity=1.0).ids
    pairs = torch.stack([torch.arange(len(ids), device=ids.device).repeat_interleave(K), ids.flatten()], dim=1)
    gcn = PairGCN(memory.shape[1], generator=torch.Generator().manual_seed(0))
    gcn = gcn.to(options.device)
    chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[: options.sample]
    sample = pairs[chosen.to(options.device)]
    errors = compare(gcn, memory, build_subgraphs(sample, ids))
    print(f"{len(pairs)} pairs; on {len(sample)} of them, {errors}")

    @torch.no_grad()
    def predict_by_reference() -> Tensor:
        return reference_logits(gcn, memory, build_subgraphs(sample, ids)).sigmoid()

    predict = partial(gcn.predict, memory, ids, pairs)
    reference, fast = interleaved_medians(predict_by_reference, predict, runs=3 if options.quick else 5)
    reference *= len(pairs) / len(sample)
    report(
        ratio=reference / fast,
        ratio_is="time of the reference path (scaled from the sample) over time of the fast path; limit: at least 150",
        fast_seconds=fast,
        reference_seconds=reference,
        builder_pairs_per_second=pairs_per_second(pairs.cpu(), ids.cpu(), threads=options.threads),
        **errors,
        ran_on=options.device,
        num_images=len(memory),
        num_features=memory.shape[1],
        num_pairs=len(pairs),
        num_sampled=len(sample),
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, three runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sample", type=int, default=512, help="pairs for the reference path")
    return parser.parse_args()


def pairs_per_second(pairs: Tensor, ids: Tensor, *, threads: int) -> int:
    """Measure the rate at which one core builds pair graphs."""
    torch.set_num_threads(1)
    seconds = median_seconds(lambda: build_subgraphs(pairs, ids), runs=9)
    torch.set_num_threads(threads)
    return round(len(pairs) / seconds)


def compare(gcn: PairGCN, memory: Tensor, subgraphs: SubgraphBatch) -> dict[str, float]:
    """Return the largest differences of logits, and of gradients of a mean cross-entropy, between both paths."""
    memory = memory.clone().requires_grad_()
    targets = (torch.arange(len(subgraphs), device=memory.device) % 2).to(memory.dtype)
    logits, gradients = [], []
    for path in (gcn, partial(reference_logits, gcn)):
        logits.append(path(memory, subgraphs))
        loss = F.binary_cross_entropy_with_logits(logits[-1], targets)
        gradients.append(torch.autograd.grad(loss, [*gcn.parameters(), memory]))
    return {
        "logit_error": float((logits[0] - logits[1]).abs().max().detach()),
        "gradient_error": max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)),
    }


if __name__ == "__main__":
    main()
