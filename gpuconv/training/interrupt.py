"""Signals that ask a run to stop: the first is noted, the second is obeyed at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequest"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_NOTE = b"\nstopping after this step, to save it; once more to leave at once\n"


class StopRequest:
    """Notes Ctrl-C, SIGTERM and SIGHUP inside a ``with`` block; call it to ask whether one came.

    After the first signal all have their default action, so the second ends the process even
    where Python is inside a long call. A signal that is ignored (as under ``nohup``) stays so.

    Attributes
    ----------
    number : int or None
        The signal that came.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Return whether a signal came."""
        return self.number is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is None:
                    continue
                before = signal.getsignal(number)
                # None: a handler that Python did not install and could not put back.
                if before not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(2, _NOTE)
