"""The terminal that this process was started from, as a process leaves it that ends at once."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

_VISIBLE = b"\x1b[?2004l\x1b[?25h"  # no marks around what is pasted, and a cursor


def terminal_as_it_is() -> Callable[[], None]:
    """What makes the terminal of standard input as it is now: of a prompt it may show nothing that is typed. From any
    thread, and without a terminal it does nothing.
    """
    try:
        import termios

        terminal = sys.stdin.fileno()
        settings = termios.tcgetattr(terminal)
    except (ImportError, AttributeError, OSError, ValueError, termios.error):
        return lambda: None

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # which stops a process in the background
        with suppress(OSError, termios.error):
            changed = termios.tcgetattr(terminal) != settings
            termios.tcsetattr(terminal, termios.TCSANOW, settings)
            if changed:
                os.write(terminal, _VISIBLE)

    return restore
