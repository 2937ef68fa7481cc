"""Ray actors: join or start Ray, check its budget of CPUs, and map a function over items on a pool of actors."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError

from mprd.errors import UserError
from mprd.parallel.cluster import find_address, start_ray
from mprd.parallel.resources import Waiting
from mprd.runtime.machine import num_cores

SETTLE_SECONDS = 15
"""Longest wait for CPUs that earlier actors are releasing."""
ITEMS_IN_FLIGHT = 2
"""Items queued per actor."""


def join_ray(num_actors: int) -> None:
    """Use the Ray of this process or of RAY_ADDRESS; otherwise start one on this machine with CPUs for the actors."""
    if not ray.is_initialized():
        # silences a warning about actors that share an object, which here lives as long as they do
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        without = "subgraphs.executor=serial and extract --num-workers 0 do without it"
        start_ray(find_address(), num_cpus=max(num_cores(), num_actors), without=without)


def actor_options(num_actors: int) -> dict[str, Any]:
    """Return how Ray places actors: beside a worker, in the logical CPUs that it reserved; elsewhere on any machine."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:
        return {"num_cpus": 1}
    beside = {"ray.io/node-id": context.get_node_id()}
    return {"num_cpus": 0 if has_reserved(num_actors) else 1, "label_selector": beside}


def has_reserved(num_actors: int) -> bool:
    """Return whether this process is a worker that holds logical CPUs for so many actors."""
    context = ray.get_runtime_context()
    return context.get_actor_id() is not None and context.get_assigned_resources().get("CPU", 0) > num_actors


def count_free() -> int:
    """Return the free logical CPUs."""
    return int(ray.available_resources().get("CPU", 0))


def count_spare(num_workers: int = 1) -> int:
    """Return the free logical CPUs per training worker."""
    if not ray.is_initialized() and find_address().is_local:
        # Ray will be started on this machine; this process needs one core
        return num_cores() - 1
    join_ray(0)
    return count_free() // num_workers


def check_budget(num_actors: int, *, setting: str, num_workers: int = 1) -> None:
    """Raise UserError with the needed number of CPUs, unless Ray has as many for the actors of all workers."""
    if has_reserved(num_actors):
        return
    total, wanted = int(ray.cluster_resources().get("CPU", 0)), num_workers * num_actors
    until, waiting = time.monotonic() + SETTLE_SECONDS, Waiting(setting, {"CPU": wanted})
    while (free := count_free()) < wanted <= total and time.monotonic() < until:
        waiting.say()
        time.sleep(0.2)
    if free < wanted:
        taken = total - free
        raise UserError(
            f"{setting}: {num_workers} x {num_actors} actors beside the {taken} logical CPUs that drivers and workers "
            f"have taken need {taken + wanted}, but Ray has {total}: start Ray with --num-cpus {taken + wanted}, or "
            "ask for fewer actors"
        )


def count_gpus(num_actors: int) -> int:
    """Join or start Ray, and return its number of GPUs."""
    join_ray(num_actors)
    return int(ray.cluster_resources().get("GPU", 0))


def map_on_actors(
    actor: Callable[..., Callable[[Any], Any]],
    job: Any,
    items: Iterable[Any],
    *,
    num_actors: int,
    num_gpus: float = 0,
    setting: str,
) -> Iterator[Any]:
    """Yield `actor(job)(item)` for each item, in order; each actor calls `actor(job)` once.

    Items are sent round-robin, a few ahead of the reader, and the actors stop after the last. An actor should return a
    UserError instead of raising it, which would wrap it in a remote traceback; it is raised here.

    Raises UserError naming `setting` if the actors do not fit or one of them dies.
    """
    join_ray(num_actors)
    check_budget(num_actors, setting=setting)
    remote: Any = ray.remote(num_cpus=1, num_gpus=num_gpus, scheduling_strategy="SPREAD")(actor)
    actors = [remote.remote(job) for _ in range(num_actors)]
    waiting: deque[Any] = deque()
    try:
        wait_for(actors, setting, num_gpus=num_gpus)
        for number, item in enumerate(items):
            waiting.append(actors[number % num_actors].__call__.remote(item))
            if len(waiting) > ITEMS_IN_FLIGHT * num_actors:
                yield take(waiting.popleft(), setting)
        while waiting:
            yield take(waiting.popleft(), setting)
    finally:
        for one in actors:
            ray.kill(one)


def wait_for(actors: Sequence[Any], setting: str, *, num_gpus: float = 0) -> None:
    """Wait until all actors are placed, saying what is missing; raise UserError where they are not in the end."""
    waiting = Waiting(setting, {"CPU": 1, "GPU": num_gpus}, len(actors))
    ready = [actor.__ray_ready__.remote() for actor in actors]
    while len(ray.wait(ready, num_returns=len(ready), timeout=1)[0]) < len(ready):
        waiting.check()


def take(result: Any, setting: str) -> Any:
    """Wait for a value; raise the UserError returned in its place, or one for a dead actor."""
    try:
        value = ray.get(result)
    except RayActorError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{setting}: an actor died ({reason}); what is done is kept, give the command again") from None
    if isinstance(value, UserError):
        raise value
    return value
