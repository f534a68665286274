"""What sections read off an engine that nobody else asks: its captured decode steps."""

from __future__ import annotations

from typing import Any

from ... import api
from ...engine.decode_graphs import DecodeGraphs


def graphs_of(model: Any) -> DecodeGraphs | None:
    """The captured decode steps of an optimised model's engine; None where nothing is captured."""
    core = api.require(model).engine()
    return core._mailbox.call(lambda: None if core._runner is None else core._runner.graphs)
