"""Export the network of a run as ONNX, TorchScript or torch.export, with a description of its pre-processing.

The exported network maps prepared images `[n, 3, H, W]`, float32, any n, to unit features `[n, D]`, float32. The file
is moved to its final name only after its output has been compared with the original's.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mprd.backbone.network import Backbone, fix_camera
from mprd.data.datasets import load_dataset
from mprd.data.images import PlainImages
from mprd.data.synthetic.dataset import Drawing, write_dataset
from mprd.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from mprd.errors import UserError
from mprd.model import Model
from mprd.neighbors.similarity import Whitening
from mprd.runtime.files import disk_reason

TOLERANCE = 1e-4
"""Largest accepted absolute difference from the original, in any entry of a unit feature."""
NUM_SAMPLES = 32
"""Images that the comparison uses."""
INPUT, OUTPUT = "images", "features"
SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript", "torch-export": ".pt2"}
DESCRIPTION_FORMAT = 2

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """An exported network that has passed the comparison."""

    path: Path
    description: Path
    """JSON with the pre-processing and the output."""
    difference: float
    num_images: int
    source: str
    """Description of the images compared on."""


class WhitenedNetwork(torch.nn.Module):
    """A network whose features are mapped as training compares them."""

    def __init__(self, backbone: Backbone, whitening: Whitening) -> None:
        super().__init__()
        self.matrix: Tensor
        self.bias: Tensor
        self.backbone = backbone
        self.register_buffer("matrix", whitening.matrix)
        self.register_buffer("bias", -(whitening.mean @ whitening.matrix))

    def forward(self, images: Tensor) -> Tensor:
        """Return unit features `[n, D]`."""
        return torch.nn.functional.normalize(self.backbone(images) @ self.matrix + self.bias)


def export_network(model: Model, path: Path, *, kind: str, whiten: bool = False, camera: str | None = None) -> Exported:
    """Write the network of a model on the CPU and, beside it, its description.

    Statistics of batch norms are those of a camera as in file names, or of all training images; with `whiten`
    features are mapped as training compares them.

    Raises UserError if a package is missing, no such camera was trained on, the run has no whitening, writing fails, or
    the output differs by more than 1e-4; nothing is left behind then.
    """
    check_packages(kind)
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; name a file in it")
    images, source = sample_images(model)
    backbone = deepcopy(model.backbone)
    fix_camera(backbone, camera_row(model, camera))
    network = WhitenedNetwork(backbone, model.need_whitening()).eval() if whiten else backbone
    with staging_folder(path) as folder:
        # torch.export requires its suffix
        temporary = folder / f"network{SUFFIXES[kind]}"
        with silenced_exporters():
            WRITERS[kind](network, images[:2], temporary)
            difference = compare(network, READERS[kind](temporary), images)
        if not difference <= TOLERANCE:
            raise UserError(f"{path}: not written: its features differ by {difference:.1e} from the network's own, "
                            f"more than {TOLERANCE:.0e} (checked on {len(images)} images)")  # fmt: skip
        description = describe_network(model, path, kind=kind) | {
            "camera": camera,
            "whitening": whiten,
            "checked": {"num_images": len(images), "images": source, "max_difference": difference},
        }
        description_file(folder / path.name).write_text(json.dumps(description, indent=2) + "\n", "utf-8")
        temporary.rename(folder / path.name)
    return Exported(path, description_file(path), difference, len(images), source)


def camera_row(model: Model, camera: str | None) -> int:
    """Return the number in training of a camera as in file names, -1 for None; raise UserError for others."""
    if camera is None:
        return -1
    if model.backbone.num_cameras == 0:
        raise UserError(f"--camera: {model.name} has no statistics of cameras (backbone.camera_bn)")
    number = model.camera_number(camera)
    if number is None or number not in model.camera_numbers:
        known = ", ".join(model.camera_names)
        raise UserError(f"--camera must be one of {known}, the cameras of {model.name}, but got {camera}")
    return model.camera_numbers.index(number)


def description_file(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def check_packages(kind: str) -> None:
    """Raise UserError for an unknown format, and if its packages are not installed."""
    if kind not in SUFFIXES:
        raise UserError(f"--format must be {', '.join(SUFFIXES)}, but got {kind!r}")
    wanted = ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ()
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx needs {', '.join(missing)}: pip install 'mprd[export]'")


def sample_images(model: Model) -> tuple[Tensor, str]:
    """Prepare up to 32 images, evenly spaced in the run's data set, or synthetic ones if it cannot be read.

    Returns:
        Float32 `[n, 3, H, W]`, and a description of the source.
    """
    config = model.config.data
    if config.dataset != "synthetic":
        try:
            dataset = load_dataset(config)
            return prepare_sample(model, dataset.query.paths or dataset.train.paths), f"{config.root}"
        except UserError:
            pass
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "drawn"
        write_dataset(root, Drawing(num_train_ids=2, num_test_ids=4, num_cameras=2, images_per_camera=2))
        return prepare_sample(model, tuple(sorted(root.rglob("*.jpg")))), "drawn pedestrians"


def prepare_sample(model: Model, paths: tuple[Path, ...]) -> Tensor:
    """Prepare up to NUM_SAMPLES of the images as for testing."""
    rows = np.linspace(0, len(paths) - 1, min(NUM_SAMPLES, len(paths))).astype(int)
    crops = PlainImages([paths[row] for row in rows], model.config.data, hint="")
    return torch.stack([crops[index][0] for index in range(len(crops))])


@torch.no_grad()
def compare(backbone: torch.nn.Module, network: Network, images: Tensor) -> float:
    """Return the largest absolute difference of the features, in a batch of all images and in a batch of one."""
    parts = (images, images[:1])
    # Python's max can skip a NaN
    return float(torch.stack([(network(part) - backbone(part)).abs().max() for part in parts]).max())


def dynamic_batch() -> dict[str, Any]:
    """Declare the number of images as dynamic."""
    return {INPUT: {0: torch.export.Dim("batch")}}


def write_onnx(backbone: torch.nn.Module, images: Tensor, path: Path) -> None:
    program = torch.onnx.export(
        backbone,
        (images,),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=dynamic_batch(),
        verbose=False,
    )
    assert program is not None
    path.write_bytes(program.model_proto.SerializeToString())


def read_onnx(path: Path) -> Network:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def write_torchscript(backbone: torch.nn.Module, images: Tensor, path: Path) -> None:
    with path.open("wb") as file:
        torch.jit.save(torch.jit.trace(backbone, images), file)


def read_torchscript(path: Path) -> Network:
    with path.open("rb") as file:
        return torch.jit.load(file, map_location="cpu")


def write_torch_export(backbone: torch.nn.Module, images: Tensor, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(torch.export.export(backbone, (images,), dynamic_shapes=dynamic_batch()), file)


def read_torch_export(path: Path) -> Network:
    with path.open("rb") as file:
        return torch.export.load(file).module()


WRITERS = {"onnx": write_onnx, "torchscript": write_torchscript, "torch-export": write_torch_export}
# by open files, as neither torch nor ONNX Runtime takes a path that is not UTF-8
READERS = {"onnx": read_onnx, "torchscript": read_torchscript, "torch-export": read_torch_export}


def describe_network(model: Model, path: Path, *, kind: str) -> dict[str, Any]:
    """Return pre-processing and output in full, for programs that do not import mprd."""
    data = model.config.data
    return {
        "format": DESCRIPTION_FORMAT,
        "file": path.name,
        "kind": kind,
        "run": model.name,
        "fingerprint": model.fingerprint,
        "input": {
            "name": INPUT,
            "shape": ["batch", 3, data.height, data.width],
            "dtype": "float32",
            "colour": "RGB",
            "height": data.height,
            "width": data.width,
            "resize": "bicubic, antialiased, aspect ratio not kept (Pillow's Image.resize with BICUBIC), on 8-bit RGB",
            "scale": 1 / 255,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
        "output": {
            "name": OUTPUT,
            "shape": ["batch", model.num_features],
            "dtype": "float32",
            "num_features": model.num_features,
            "unit_length": True,
            "similarity": "the dot product of two features, which is their cosine",
        },
    }


@contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved to that of `path` if the block succeeds, `path` itself last."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            yield Path(folder)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise UserError(f"{path}: cannot write: {disk_reason(error)}") from None


@contextmanager
def silenced_exporters() -> Iterator[None]:
    """Suppress the exporters' warnings: graph rewriting, the deprecation of TorchScript."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
