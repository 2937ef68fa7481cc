"""Export the network as ONNX, TorchScript or torch.export."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"app": "cli"})
