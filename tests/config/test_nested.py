"""Nested settings and their dotted names."""

from __future__ import annotations

from mprd.config.nested import flatten, get, layered, nest, pop


def test_nested_settings_have_dotted_names() -> None:
    dotted = {"meta.eta.end": 0.1, "meta.num_ids": 5, "seed": 0}
    nested = {"meta": {"eta": {"end": 0.1}, "num_ids": 5}, "seed": 0}
    assert nest(dotted) == nested
    assert flatten(nested) == dotted
    assert [get(nested, name) for name in ("meta.eta.end", "meta.mu", "seed.x")] == [0.1, None, None]
    pop(nested, "meta.eta.end")
    assert nested == {"meta": {"eta": {}, "num_ids": 5}, "seed": 0}


def test_later_layers_win_and_none_is_changed() -> None:
    first, second = {"a": {"x": 1, "y": [1]}}, {"a": {"x": 2}, "b": {"z": 3}}
    found = layered(first, second)
    assert found == {"a": {"x": 2, "y": [1]}, "b": {"z": 3}}
    found["a"]["y"].append(2)
    assert (first, second) == ({"a": {"x": 1, "y": [1]}}, {"a": {"x": 2}, "b": {"z": 3}})
