"""Tasks by their names."""

from __future__ import annotations

import re
from functools import reduce
from operator import add
from typing import Any, TypeVar

from vtv_nnsight.tasks.base import AnyTask, Sum, Task, read_setting
from vtv_nnsight.tasks.builtin import VTV, detection, edges, pairs
from vtv_nnsight.tasks.text import WORDS, words
from vtv_nnsight.text import check_kind, quoted

_REGISTRY: dict[str, AnyTask] = {}
_KINDS: dict[str, type[AnyTask]] = {}
_OUTSIDE_BRACKETS = r"(?![^(]*\))"
_Registered = TypeVar("_Registered", bound=AnyTask | type[Task])


def register(task: _Registered) -> _Registered:
    """Let `get`, and with it the command line, find a task by its name, and its kind with any settings.

    Args:
        task: A task, or a class of tasks with a default for every setting (so that it decorates a class).

    Returns:
        What was given.

    Raises:
        TypeError: when it is no task.
        ValueError: when the name belongs to one of the package's tasks. A task of yours is replaced.
    """
    instance = task() if isinstance(task, type) and issubclass(task, Task) else task
    if not isinstance(instance, AnyTask):
        raise TypeError(f"{task!r} is not a task; give an instance or a subclass of tasks.Task.")
    if isinstance(instance, Sum):
        raise ValueError(f"{instance.name!r} is a sum; register its parts, and get finds the sum.")
    kind = instance.name.partition("(")[0]
    other = _KINDS.get(kind, type(instance))
    if other is not type(instance) and other.__module__.startswith(f"{__package__}."):
        raise ValueError(f"{kind!r} is the name of another task; choose another.")
    _REGISTRY[instance.name], _KINDS[kind] = instance, type(instance)
    return task


def get(name: str) -> Any:
    """The task of a name such as "lowlight", "lowlight(0.1)" or "antonym", or of several of pictures joined by "+".

    Returns:
        An `AnyTask`: of pictures a `Task`, else a `Text`.

    Raises:
        ValueError: naming the tasks there are, or what is wrong with the settings.
    """
    check_kind(name, str, "the name of a task", "a name such as 'lowlight'")
    parts = list(map(_parse, re.split(r"\+" + _OUTSIDE_BRACKETS, name)))
    if len(parts) > 1 and not all(isinstance(part, Task) for part in parts):
        raise ValueError(f"{name!r} joins tasks of texts; give one of them, or add their vectors.")
    return reduce(add, parts)


def get_all(names: str) -> list[Any]:
    """The tasks of names with commas between them, as the command line takes them; each once."""
    return list({task.name: task for task in map(get, re.split("," + _OUTSIDE_BRACKETS, names))}.values())


def names() -> list[str]:
    """The names that `get` knows; settings in brackets make others of them."""
    return list(_REGISTRY)


def _parse(name: str) -> AnyTask:
    """The task of a name without "+"."""
    name = name.strip()
    if name in _REGISTRY:
        return _REGISTRY[name]
    kind, bracket, rest = name.partition("(")
    if kind not in _KINDS or (bracket and not rest.endswith(")")):
        raise ValueError(
            f"{quoted(name)} is not a task; choose from {', '.join(_REGISTRY)}, with settings in brackets as in "
            "'lowlight(0.1)', or join several with '+'."
        )
    settings = [part.strip().partition("=") for part in rest.removesuffix(")").split(",")] if bracket else []
    try:
        return _KINDS[kind](
            *(read_setting(value) for value, equals, _ in settings if not equals),
            **{key: read_setting(value) for key, equals, value in settings if equals},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is not a {kind} task: {error}") from error


for _task in (*VTV, detection, edges, pairs, *map(words, WORDS)):
    register(_task)
