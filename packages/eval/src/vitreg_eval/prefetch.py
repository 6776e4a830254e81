"""Work done in other threads while the caller does its own: in order, and no further ahead than asked."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import TypeVar, cast

import torch

S = TypeVar("S")
T = TypeVar("T")
READERS = min(8, os.cpu_count() or 1)
"""Threads that read and prepare pictures."""
END = object()


def in_order(function: Callable[[S], T], items: Iterable[S], *, threads: int, ahead: int) -> Iterator[T]:
    """The function of every item, computed in other threads and given in order, as `map` would.

    Args:
        function: called from several threads at once if there are several.
        items: taken in the caller's thread.
        threads: more change the speed alone.
        ahead: how many items are taken at most beyond those given back.

    Raises:
        Exception: what the function raised, when its item's turn comes; the rest is not started.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # each thread has its own number, but new ones take the last that was set


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, taken in another thread, so many before they are asked for."""
    source = iter(items)
    take: Callable[[object], T | object] = partial(next, source)
    for item in in_order(take, repeat(END), threads=1, ahead=count):
        if item is END:
            return
        yield cast(T, item)
