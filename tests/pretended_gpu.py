"""A GPU simulated on the CPU: tensors report device cuda:0 and hold their values in host memory.

Operators refuse mixed devices as CUDA does, and what would synchronize with the host is counted: shapes that depend on
values, and copies in either direction unless `non_blocking`. Gradients are zero, because torch's autograd engine needs
a driver for a backward pass on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
BYTES = 80 << 30
WAITING = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount")}
WAITING |= {f"aten::{name}" for name in ("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave")}
INDEXING = {f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")}
COPYING = {"aten::copy_", "aten::_to_copy"}


class Remote(Tensor):
    """A tensor on the pretended GPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Remote:
        dense = {}
        if values.layout == torch.strided:
            dense = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, layout=values.layout, device=GPU, **dense
        )
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} met a tensor of the pretended GPU after its end")

    def __repr__(self, **_: Any) -> str:
        return f"Remote({self.values!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert a tensor of the pretended GPU to numpy")
        return self.detach().cpu().numpy()

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)


class PretendedGpu(TorchDispatchMode):
    """Run operators on the device that the tensors report; `waits` counts synchronizations with the host."""

    def __init__(self) -> None:
        # the mode of fake tensors: torch does not look for a driver
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
        if remote:
            self.refuse_mixtures(name, args, tensors)
            if name in WAITING or (name == "aten::index" and is_masked(args)):
                self.waits += 1
        wanted = kwargs.get("device")
        on_gpu = bool(remote) if wanted is None else torch.device(wanted).type == "cuda"
        if is_awaited_copy(name, args, kwargs, on_gpu=on_gpu):
            self.waits += 1
        found = func(*tree_map(local, args), **tree_map(local, kwargs))
        if on_gpu and name != "aten::_local_scalar_dense":
            found = tree_map(lambda leaf: Remote(leaf) if isinstance(leaf, Tensor) else leaf, found)
        if remote and (func._schema.is_mutable or name not in COPYING) and isinstance(found, Tensor):
            return return_and_correct_aliasing(func, args, kwargs, found)
        return found

    def refuse_mixtures(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        """Raise where CUDA would; scalar tensors and indices may be on the host."""
        is_mixed = any(tensor.dim() and not isinstance(tensor, Remote) for tensor in tensors)
        may_mix = name in COPYING or (name in INDEXING and isinstance(args[0], Remote))
        if is_mixed and not may_mix:
            raise RuntimeError(f"{name}: tensors of two devices: {[(type(t).__name__, *t.shape) for t in tensors]}")


class PretendedStream:
    """A CUDA stream, and an event of it; synchronizing with it counts."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu

    def record_event(self) -> PretendedStream:
        return self

    def synchronize(self) -> None:
        self.gpu.waits += 1


def local(leaf: Any) -> Any:
    """Return the host values of a remote tensor, and the CPU for the device cuda."""
    if isinstance(leaf, Remote):
        return leaf.values
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf


def is_awaited_copy(name: str, args: Any, kwargs: Any, *, on_gpu: bool) -> bool:
    """Return whether an operator is a blocking copy between host and GPU."""
    if name in INDEXING and isinstance(args[0], Remote):
        return any(isinstance(index, Tensor) and not isinstance(index, Remote) for index in args[1])
    if name not in COPYING:
        return False
    if name == "aten::copy_":
        target, source = isinstance(args[0], Remote), isinstance(args[1], Remote)
        return target != source and not (kwargs.get("non_blocking") or args[2:] == (True,))
    return on_gpu != isinstance(args[0], Remote) and not kwargs.get("non_blocking")


def is_masked(args: Any) -> bool:
    """Return whether an index is a boolean mask, whose number of true cells the host needs."""
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])


def zero_gradients(loss: Tensor) -> None:
    """Set the gradient of every parameter of a loss to 0."""
    seen, rest = set(), [loss.grad_fn]
    while rest:
        node = rest.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (parameter := getattr(node, "variable", None)) is not None:
            parameter.grad = torch.zeros_like(parameter)
        rest += [ahead for ahead, _ in node.next_functions]


@contextmanager
def zero_gradients_only() -> Iterator[None]:
    """Replace every backward pass by gradients of 0."""
    with patch.object(Tensor, "backward", zero_gradients):
        yield


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Simulate one GPU on this machine."""
    made_sparse, gpu = torch.sparse_coo_tensor, PretendedGpu()

    def nothing(*_: Any) -> None:
        pass

    def unchecked(*args: Any, **settings: Any) -> Tensor:
        return made_sparse(*args, **settings | {"check_invariants": False})

    # autograd starts one thread per device at the first backward pass; started before the pretended device exists,
    # they do not keep later tests from forking
    torch.zeros(1, requires_grad=True).sum().backward()
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (
            patch.multiple(
                torch.cuda,
                is_available=lambda: True,
                device_count=lambda: 1,
                current_device=lambda: 0,
                synchronize=nothing,
                current_stream=lambda *_: PretendedStream(gpu),
                mem_get_info=lambda *_: (BYTES, BYTES),
            ),
            # cuDNN has no operators on the CPU
            torch.backends.cudnn.flags(enabled=False),
            patch.object(Tensor, "pin_memory", lambda self: self),
            # checking invariants reads device memory
            patch.object(torch, "sparse_coo_tensor", unchecked),
            zero_gradients_only(),
            gpu,
        ):
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
