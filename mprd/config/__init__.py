"""Settings: their schema, and how presets, files and overrides are merged."""

from mprd.lazy import lazy_names

__getattr__, __all__ = lazy_names(__name__, {"Config": "schema", "load_config": "loading"})
