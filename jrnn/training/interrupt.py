"""Ending a run by ^C between two steps, when its state is whole."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

__all__ = ["Interrupt"]


class Interrupt:
    """Within this context the first ^C sets ``asked``, and the second raises KeyboardInterrupt as usual.

    Does nothing outside of the main thread, where no signals arrive, or where the program has a handler of its own.

    >>> before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a program of its own
    >>> with Interrupt() as interrupt:
    ...     signal.raise_signal(signal.SIGINT)
    ...     interrupt.asked
    True
    >>> _ = signal.signal(signal.SIGINT, before)
    """

    def __init__(self) -> None:
        self.asked = False
        self._installed = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._installed = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nending after this step; ^C again to end at once", file=sys.stderr, flush=True)
