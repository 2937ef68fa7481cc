"""Ray's notice that a machine will be taken, by a spot market for one: its processes save, and go on elsewhere."""

from __future__ import annotations

import time

import ray
from ray._private.state import state

from mprd.train.signals import StopRequest

LOOK_SECONDS = 2.0
"""Least seconds between two looks."""


class MachineTaken(Exception):
    """Ends a process whose state is saved, for Ray to start it on another machine."""


class Notice:
    """A request to stop: a given one, or Ray's notice that this machine will be taken (`ray drain-node`)."""

    def __init__(self, request: StopRequest | None = None) -> None:
        self.request = request
        self.machine = ray.get_runtime_context().get_node_id()
        self.is_given, self.looked_at = False, 0.0

    @property
    def stop(self) -> bool:
        """True from the request on."""
        if not self.is_given and time.monotonic() - self.looked_at > LOOK_SECONDS:
            self.is_given, self.looked_at = self.machine in state.get_draining_nodes(), time.monotonic()
        return self.is_given or (self.request is not None and self.request.stop)

    def error(self) -> MachineTaken:
        """Return the error that names this machine."""
        return MachineTaken(f"machine {ray.util.get_node_ip_address()} will be taken")
