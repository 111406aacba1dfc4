"""The processes that share a job out: what `torchrun` or `accelerate launch` started, and workers of our own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from vtv_nnsight.progress import progress_bar


def processes() -> PartialState:
    """The processes that a launcher started, and which this is. Accelerate looks for CPU processes only if told to."""
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu, timeout=timedelta(hours=12))  # one may wait long for what another does alone


_prepared: list[Any] = []
"""What functions are called with first, once it is made: in this process, and in each worker."""


class Workers:
    """Calls that do not depend on each other, in worker processes of one thread each; of one job, in this process. They
    end with the block.

    Args:
        jobs: How many processes; None is this one, with all of its threads.
        prepared: What functions are called with first.
        prepare: `prepare(*given)` makes the same in a worker that does not inherit it.
    """

    def __init__(self, jobs: int | None, prepared: Any, prepare: Callable[..., Any], *given: Any) -> None:
        self.jobs, self._make, self._threads = jobs, (prepare, *given), torch.get_num_threads()
        self._begun: dict[tuple[Any, ...], Future[list[str]]] = {}
        self._pool: ProcessPoolExecutor | None = None
        _prepared[:] = [prepared]

    def __enter__(self) -> Workers:
        if self.jobs is not None:
            torch.set_num_threads(1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        torch.set_num_threads(self._threads)
        _prepared.clear()
        if self._pool is not None:
            processes = self._pool._processes.values() if kind else ()
            for process in list(processes):
                process.terminate()
            self._pool.shutdown(cancel_futures=True)

    def begin(self, function: Callable[..., Any], *given: Any) -> Future[list[str]] | None:
        """Let a worker call `function(prepared, *given)`, where there are workers; once, however often this is said."""
        if self.jobs in (None, 1):
            return None
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.jobs, initializer=_begin_worker, initargs=self._make)
        call = (function, *given)
        if call not in self._begun:
            self._begun[call] = self._pool.submit(_call, *call)
        return self._begun[call]

    def each(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], show: Callable[[Any], None]
    ) -> Iterator[tuple[Any, ...]]:
        """Call a function with each of several arguments, and give these as they are done. `show` is called with the
        last argument of each before, where one is done after the other."""
        if self.jobs in (None, 1):
            for given in calls:
                show(given[-1])
                function(*_prepared, *given)
                yield given
        elif calls:
            show("")
            futures = {self.begin(function, *given): given for given in calls}
            with progress_bar(total=len(calls), unit="task") as bar:
                for future in as_completed(filter(None, futures)):
                    for text in future.result():
                        warnings.warn(text, stacklevel=2)
                    yield futures[future]
                    bar.update()


def _begin_worker(prepare: Callable[..., Any], *given: Any) -> None:
    """A worker computes on one thread, leaves Ctrl-C to the process that began it, and does not outlive that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (one bar for all, of the process that began it)
    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()
    if not _prepared:
        _prepared.append(prepare(*given))


def _follow() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[..., Any], *given: Any) -> list[str]:
    """Call a function in a worker; what it warned of."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        function(*_prepared, *given)
    return [str(warning.message) for warning in heard if warning.category is UserWarning]
