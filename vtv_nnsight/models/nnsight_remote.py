"""How a block travels to where a model runs without this package, an NDIF server: for `nnsight_compat`.

nnsight sends a block's source and what it names. Of ours, models and tracers travel as nnsight's own classes, what
`PLAIN` names as plain tensors, dicts and functions of `inside_trace`, and that module by its source.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType
from typing import Any

from httpx import HTTPError
from nnsight import ndif, register, save
from nnsight.intervention.backends.remote import RemoteError
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.serialization import CustomCloudPickler
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import push
from websocket import WebSocketException

from vtv_nnsight.models import inside_trace
from vtv_nnsight.models.interface import ByStage, Place

PACKAGE = __name__.partition(".")[0]
PLAIN: dict[Any, Callable[[Any], Any]] = {}
"""A class or a function of ours → what an object of it, or the function, is there."""
SENDERS: list[Any] = []
"""The models of the blocks that are being sent, the last one's last."""
OURS: dict[str, Callable[[Any, Any], Any]] = {}
"""The first key of a dict that came back → what becomes of it, called with the model and the dict."""

PLAIN[Place] = tuple
PLAIN[ByStage] = lambda values: {key.site: value for key, value in values.items()}
BY_VALUE = (inside_trace.__name__, f"{PACKAGE}.search.loops")
"""The modules that travel by their source."""
for _module in BY_VALUE:
    register(_module)
_reduce = CustomCloudPickler.reducer_override


def nnsight_class(kind: type) -> type:
    """The class of nnsight's own that one of ours extends; others as they are."""
    own = (base for base in kind.__mro__ if base.__module__.partition(".")[0] != PACKAGE)
    return next(own) if issubclass(kind, (Envoy, Tracer)) else kind


def _travels(kind: type) -> bool:
    """Whether something of this class has a form there."""
    return kind.__module__.partition(".")[0] != PACKAGE or kind in PLAIN or nnsight_class(kind) is not kind


def _travel(self: Any, value: Any) -> Any:
    """How nnsight's pickler reduces a value.

    Raises:
        TypeError: naming one of ours that has no form there.
    """
    kind = type(value)
    named = value if isinstance(value, (type, FunctionType)) else kind
    if isinstance(value, type):
        if (other := nnsight_class(value)) is not value:
            return copy.copy, (other,)
    elif (plain := PLAIN.get(value if kind is FunctionType else kind)) is not None:
        return copy.copy, (plain(value),)
    elif (other := nnsight_class(kind)) is not kind:
        _, _, state, *_ = value.__reduce_ex__(2)
        return object.__new__, (other,), {name: part for name, part in state.items() if _travels(type(part))}
    if named.__module__.partition(".")[0] == PACKAGE and named.__module__ not in BY_VALUE:
        raise TypeError(
            f"{named.__qualname__} of {PACKAGE} does not travel; name in the block what there is of it: models, "
            "vectors, activations, sets of units, prompts, capture and patch."
        )
    return _reduce(self, value)


CustomCloudPickler.reducer_override = _travel


class Fetching(Backend):
    """Another backend; its plain results become ours in the frame around the block.

    Args:
        backend: nnsight's, which sends the block.
        model: The model of the block.
    """

    def __init__(self, backend: Backend, model: Any) -> None:
        self.backend, self.model = backend, model

    def ours(self, value: Any) -> Any:
        """What becomes of a result."""
        if isinstance(value, list) and value and self.ours(value[0]) is not value[0]:
            return [self.ours(part) for part in value]
        kind = next(iter(value), None) if isinstance(value, dict) else None
        return OURS[kind](self.model, value) if isinstance(kind, str) and kind in OURS else value

    def __call__(self, tracer: Any = None) -> Any:
        """Run the block there."""
        SENDERS.append(self.model)
        try:
            result = self.backend(tracer)
        finally:
            SENDERS.pop()
        if tracer is not None:
            values = dict(tracer.info.frame.f_locals)
            changed = {name: new for name, value in values.items() if (new := self.ours(value)) is not value}
            push(tracer.info.frame, changed)
            self.model.cost = getattr(self.backend, "meta", None) or {}
        return result


class RemoteFailure(RuntimeError):
    """A job that a server refused or did not end, or that was not sent."""


def check_remote(remote: Any, nameless: str | None) -> None:
    """Refuse what is no place, and a model that servers have no name for, which is called `nameless` here.

    Raises:
        ValueError: naming it.
    """
    if not (isinstance(remote, bool) or remote == "local" or str(remote).startswith(("http://", "https://"))):
        raise ValueError(f"remote={remote!r} is unknown; give True, a host's address (http://…), or 'local'.")
    if nameless and remote not in (False, "local"):
        raise ValueError(f"{nameless!r} has no name that a server knows; give a Hub id, OWNER/NAME.")


def check_server(model: Any, remote: bool | str) -> None:
    """Ask, before anything is sent, whether a server runs this model.

    Raises:
        RemoteFailure: saying that there is no key, no answer, or no such model.
        ValueError: as `check_remote`.
    """
    check_remote(remote, model.nameless)
    if remote == "local":
        return
    api = CONFIG.API
    before, api.HOST = api.HOST, remote if isinstance(remote, str) else api.HOST
    try:
        if remote is True and not api.APIKEY:
            raise RemoteFailure(f"{api.HOST} wants a key; nnsight.login() keeps one, or set NDIF_API_KEY. {UNSENT}")
        if not ndif.status(raw=True):
            raise RemoteFailure(f"{api.HOST} does not answer; look at the network and the address. {UNSENT}")
        if not ndif.is_model_running(model.repo_id, model.revision or "main"):
            raise RemoteFailure(
                f"{model.repo_id!r} is not running at {api.HOST}; print(nnsight.status()) lists what is. {UNSENT}"
            )
    except OSError as error:
        raise RemoteFailure(f"the Hub does not tell what {model.repo_id!r} is: {error} {UNSENT}") from error
    finally:
        api.HOST = before


class Weighing(Backend):
    """Sends nothing, and tells how many bytes it would."""

    def __call__(self, tracer: Any = None) -> None:
        """Pack the block."""
        self.bytes = len(RequestModel.serialize(tracer, CONFIG.API.COMPRESS))


def weigh(model: Any, function: Callable[..., Any], *arguments: Any) -> int:
    """The bytes that `there` would send."""
    backend = Weighing()
    with model.session(backend=backend):
        result = save(function(model, *arguments))  # noqa: F841
    return backend.bytes


UNSENT = "Nothing was sent."
LOST = "A search with resume= goes on from what it has."


def there(model: Any, remote: bool | str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of `inside_trace`, called with the model, gives where the model runs: one job.

    Args:
        model: The model.
        remote: As for nnsight's `trace`.
        function: It imports torch alone, or other such functions.
        *arguments: Tensors, numbers, strings, and lists and dicts of them.

    Raises:
        RemoteFailure: when the job fails there, or the way there does.
    """
    try:
        with model.session(remote=remote):
            result = save(function(model, *arguments))
    except (RemoteError, OSError, HTTPError, WebSocketException) as error:
        reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
        raise RemoteFailure(f"the server did not do this job: {reason.rstrip('.')}. {LOST}") from error
    return result
