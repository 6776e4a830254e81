"""Values kept in memory up to a number of bytes; those not asked for longest are dropped first."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Generic, Protocol, TypeVar, runtime_checkable


@runtime_checkable
class Kept(Protocol):
    """What can be kept: it knows its size."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


V = TypeVar("V", bound=Kept)


class Cache(Generic[V]):
    """A bounded memory that threads may share."""

    def __init__(self, most: int) -> None:
        """Args: `most` is in bytes; a value that is larger by itself is not kept."""
        self.most = most
        self.nbytes = 0
        self.values: OrderedDict[Hashable, V] = OrderedDict()
        self.lock = Lock()

    def get(self, key: Hashable) -> V | None:
        """The value under a key, or None where there is none any more."""
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value, in place of what stood there; drop others until all fit."""
        with self.lock:
            if key in self.values:
                self.nbytes -= self.values.pop(key).nbytes
            if value.nbytes > self.most:
                return
            self.values[key] = value
            self.nbytes += value.nbytes
            while self.nbytes > self.most:
                self.nbytes -= self.values.popitem(last=False)[1].nbytes
