"""An estimate of the time and memory of a run, from about two seconds of forward and backward passes.

Measured: seconds per image of the backbone, with and without gradients, and of decoding and augmentation. Counted:
bytes that autograd saves per image, and the sizes of weights, memory and features.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from mprd.backbone.network import Backbone
from mprd.engine.trainer import Trainer
from mprd.runtime.machine import memory_bytes, num_cores

MEASURED_SECONDS = 2.0
FLOAT = 4
"""Bytes of a float32."""
OVERHEAD = 2.0
"""Total time over that of the images' passes: on the demo, neighbors and GCN take as long again."""
LIBRARIES = 250_000_000
"""Bytes of modules that a run imports later, for event files and plots."""


@dataclass(frozen=True)
class Cost:
    """The estimate for a run, and the measurements behind it."""

    train_seconds: float
    """Per image, forward and backward."""
    extract_seconds: float
    """Per image, forward alone."""
    load_seconds: float
    """Per image, decoding and augmentation by all loader processes together."""
    least_seconds: float
    """The passes of all images over all epochs, without neighbors and GCN."""
    likely_seconds: float
    """`least_seconds` times OVERHEAD."""
    memory_bytes: int
    """Peak memory on the device."""
    available_bytes: int


def estimate_cost(trainer: Trainer) -> Cost:
    """Measure a few passes of a trainer's backbone and extrapolate to the run; the network is not changed."""
    num_bytes, seconds = measure_training(trainer)
    forward = measure_extraction(trainer.state.backbone, random_images(trainer, 2), device=trainer.device)
    load = measure_loading(trainer)
    least = run_seconds(trainer, train=seconds, extract=forward, load=load)
    return Cost(
        train_seconds=seconds,
        extract_seconds=forward,
        load_seconds=load,
        least_seconds=least,
        likely_seconds=OVERHEAD * least,
        memory_bytes=run_bytes(trainer, activation_bytes=num_bytes),
        available_bytes=available_bytes(trainer.device),
    )


def random_images(trainer: Trainer, num_images: int) -> Tensor:
    """Return noise images of the configured size."""
    data = trainer.config.data
    return torch.rand(num_images, 3, data.height, data.width, device=trainer.device)


def measure_training(trainer: Trainer) -> tuple[int, float]:
    """Return the bytes that autograd saves and the seconds of a forward and backward pass, per image."""
    backbone, most = trainer.state.backbone.train(), trainer.config.train.batch_size
    norms = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    size = 2
    num_bytes = count_saved(backbone, random_images(trainer, size)) // size
    seconds = train_seconds(backbone, random_images(trainer, size), device=trainer.device)
    size = max(2, min(most, int(MEASURED_SECONDS / 2 / seconds)))
    seconds = min(train_seconds(backbone, random_images(trainer, size), device=trainer.device) for _ in range(2))
    backbone.zero_grad(set_to_none=True)
    for name, buffer in backbone.named_buffers():
        buffer.copy_(norms[name])
    return num_bytes, seconds


def count_saved(backbone: Backbone, images: Tensor) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    backbone.batch_split.set_batch(len(images))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = backbone(images)
    del output
    return sum(kept.values())


def train_seconds(backbone: Backbone, images: Tensor, *, device: torch.device) -> float:
    """Return the seconds per image of one forward and backward pass."""
    backbone.batch_split.set_batch(len(images))
    started = now(device)
    backbone(images).sum().backward()
    return (now(device) - started) / len(images)


@torch.no_grad()
def measure_extraction(backbone: Backbone, images: Tensor, *, device: torch.device) -> float:
    """Return the seconds per image of a forward pass in evaluation mode."""
    backbone.eval()
    backbone(images)
    started = now(device)
    backbone(images)
    return (now(device) - started) / len(images)


def now(device: torch.device) -> float:
    """Return the time, after a sync with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_loading(trainer: Trainer) -> float:
    """Return the seconds per image of decoding and augmentation, divided by the loader processes."""
    num_images = min(16, trainer.num_images)
    started = time.perf_counter()
    for index in range(num_images):
        trainer.train_images[index]
    processes = min(max(1, trainer.config.data.num_workers), num_cores())
    return (time.perf_counter() - started) / num_images / processes


def run_seconds(trainer: Trainer, *, train: float, extract: float, load: float) -> float:
    """Return the time of all images' passes over all epochs; loader processes overlap with the passes."""
    config, num_images = trainer.config, trainer.num_images
    is_overlapped = config.data.num_workers > 0
    step = max(train, load) if is_overlapped else train + load
    look = max(extract, load) if is_overlapped else extract + load
    # perturbed copies of the images without a positive, at first all of them; clean features for frozen lists
    plain = num_images * (1 + (config.neighbors.source == "mean"))
    tested = num_tested(trainer)
    epoch = num_images * step + plain * look + tested * look / config.eval.every
    return config.train.epochs * epoch + (num_images + tested) * look


def num_tested(trainer: Trainer) -> int:
    """Return the number of images of an evaluation."""
    dataset = trainer.dataset
    return len(dataset.query) + len(dataset.gallery) if dataset.can_evaluate else 0


def run_bytes(trainer: Trainer, *, activation_bytes: int) -> int:
    """Return the peak memory: weights, a batch's activations, the feature memory, features, and the process."""
    config, backbone, num_images = trainer.config, trainer.state.backbone, trainer.num_images
    weights = sum(parameter.numel() for parameter in backbone.parameters()) * FLOAT
    # weights, gradient and momentum; AdamW has two moments
    weights *= 4 if config.train.optimizer == "adamw" else 3
    batch = min(config.train.batch_size, num_images)
    # the memory, again with the perturbed copies appended, and features for lists and evaluation
    rows = 3 * num_images + (config.neighbors.source == "mean") * num_images + 2 * num_tested(trainer)
    similarities = 4 * batch * num_images * FLOAT
    held = weights + batch * activation_bytes + rows * backbone.num_features * FLOAT + similarities
    return held + (0 if trainer.device.type == "cuda" else process_bytes() + LIBRARIES)


def process_bytes() -> int:
    """Return the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes(device: torch.device) -> int:
    """Return the memory of the accelerator, or of the machine or container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_bytes()
