"""What one part of the engine takes of a turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any


class Toll:
    """Sums the seconds that the public methods of `part` take, while it is entered. Calls among them count once.

    What others do to ask it nothing, such as to look at a flag, is not seen.
    """

    def __init__(self, part: object) -> None:
        self._part = part
        self._names = [n for n, m in vars(type(part)).items() if callable(m) and not n.startswith("_")]
        self._inside = False
        self.seconds = 0.0
        self.calls = 0

    def __enter__(self) -> Toll:
        for name in self._names:
            setattr(self._part, name, self._timed(getattr(self._part, name)))
        self._begun = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.total = time.perf_counter() - self._begun
        for name in self._names:
            delattr(self._part, name)

    @property
    def share(self) -> float:
        """Of all the time that it was entered."""
        return self.seconds / self.total

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **named: Any) -> Any:
            if self._inside:
                return method(*args, **named)
            begun, self._inside = time.perf_counter(), True
            try:
                return method(*args, **named)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - begun
                self.calls += 1

        return call
