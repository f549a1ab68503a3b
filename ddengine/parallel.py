"""Independent jobs over worker processes, in order, with the same bits for any number of workers."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import active_children, connection, parent_process
from types import FrameType
from typing import Any

import torch
import torch.multiprocessing

from ddengine import origins
from ddengine.errors import DDError, require_positive

Work = Callable[[Any, Any], Any]  # (shared, job) -> result
MapJobs = Callable[[Sequence[Any]], Iterator[Any]]
_given: list[Any] = []  # in a worker process: [work, shared]


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside, so that results do not depend on the machine; the count is restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def signals(then: Callable[[], object] = lambda: None) -> Iterator[list[int]]:
    """A list that receives the number of a SIGINT or SIGTERM; a second one raises KeyboardInterrupt.

    `then` is called at the first one. Handlers are set in the main thread only and are put back at the end.
    """
    caught: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        then()

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def job_pool(work: Work, shared: Any, workers: int = 1, *, ordered: bool = True) -> Iterator[MapJobs]:
    """A function that maps jobs to `work(shared, job)`, lazily and in order, each computed on one thread.

    With `workers` > 1 the jobs run in that many processes of their own; `work` is a module-level function,
    and `shared` is sent once to each (its tensors should be in shared memory); without `ordered` results come
    as they are ready. When the block is left early, by Ctrl-C or by an error, the processes are ended. A
    process that dies raises DDError.
    """
    require_positive("workers", workers)
    if workers == 1:
        yield lambda jobs: _here(work, shared, jobs)
        return
    others = active_children()
    method = start_method()
    context, sent = torch.multiprocessing.get_context(method), work if method == "fork" else _Named(work)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(sent, shared))
    try:
        yield lambda jobs: _collect(_submitted(pool, jobs), ordered)
    except BrokenProcessPool as error:
        raise _died(workers) from error
    except BaseException:
        for child in set(active_children()).difference(others):
            child.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_method() -> str:
    """How processes start: as copies of this one, at once, where that is safe; else anew, after seconds.

    It is safe on Linux where no accelerator may have threads or a context of its own in this process, and no
    other thread of Python may be inside a library that a copy would find locked.
    """
    alone = threading.active_count() == 1 and not torch.accelerator.is_available()
    return "fork" if sys.platform == "linux" and alone else "spawn"


def workers_of(given: int | None, device: str = "cpu") -> int:
    """The processes to work with: as many as given, else one for each core, or one where a GPU does it."""
    if given is not None:
        return given
    return 1 if device == "cuda" else os.cpu_count() or 1


def _died(workers: int) -> DDError:
    return DDError(
        f"one of {workers} worker processes died while it worked (killed, out of memory, or not started)",
        "Repeat with workers=1; a script of your own needs `if __name__ == '__main__':` around its calls",
    )


class Pool:
    """A `job_pool` that stays open from its making to `close`, for work that comes in many small rounds."""

    def __init__(self, work: Work, shared: Any, workers: int = 1) -> None:
        self._workers = workers
        self._context = job_pool(work, shared, workers)
        self._map: MapJobs = self._context.__enter__()

    def map(self, jobs: Sequence[Any]) -> Iterator[Any]:
        """The results of `jobs`, in order (DDError where a process dies)."""
        try:
            yield from self._map(jobs)
        except BrokenProcessPool as error:
            raise _died(self._workers) from error

    def close(self) -> None:
        """End the processes."""
        self._context.__exit__(None, None, None)


class _Named:
    """A function on its way to a worker, which puts our packages first, where we do, before it imports it."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __reduce__(self) -> tuple[Callable[..., Work], tuple[str, str, bool]]:
        return _found, (self.work.__module__, self.work.__qualname__, origins.SiblingFinder in sys.meta_path)


def _found(module: str, name: str, pinned: bool) -> Work:
    if pinned:
        origins.pin()
    return getattr(import_module(module), name)


def _here(work: Work, shared: Any, jobs: Sequence[Any]) -> Iterator[Any]:
    for job in jobs:
        with one_thread():
            result = work(shared, job)
        yield result


def _submitted(pool: ProcessPoolExecutor, jobs: Sequence[Any]) -> list[Future]:
    """Futures of the jobs. Signals wait while processes start, and they inherit that they never get them: a
    Ctrl-C goes to the whole group, and one in the middle of its imports would die of it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return [pool.submit(_run, job) for job in jobs]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _collect(futures: Sequence[Future], ordered: bool) -> Iterator[Any]:
    for future in futures if ordered else as_completed(futures):
        yield future.result()


def _start(work: Any, shared: Any) -> None:
    """What a worker does first: leave signals to its parent, end with it, keep what all jobs share."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a signal to the whole group reaches the parent too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _given[:] = [work, shared]


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(job: Any) -> Any:
    work, shared = _given
    return work(shared, job)
