"""The terminal of a process that ends at once, without the end of whatever has changed it."""

import os
import signal
import sys
from contextlib import suppress

_VISIBLE = b"\x1b[?2004l\x1b[?25h"  # no marks around what is pasted, and a cursor


def sane_terminal() -> None:
    """Have the terminal of standard input show what is typed, and hand it over by lines, as a shell expects it. From
    any thread; without a terminal it does nothing.
    """
    try:
        import termios

        terminal = sys.stdin.fileno()
        settings = termios.tcgetattr(terminal)
    except (ImportError, AttributeError, OSError, ValueError, termios.error):
        return
    before = [*settings]
    settings[0] |= termios.ICRNL | termios.IXON | termios.BRKINT
    settings[1] |= termios.OPOST | termios.ONLCR
    settings[3] |= termios.ECHO | termios.ICANON | termios.ISIG | termios.IEXTEN
    settings[3] &= ~termios.NOFLSH
    if settings != before:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # which stops a process in the background
        with suppress(OSError, termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, settings)
            os.write(terminal, _VISIBLE)
