"""The clipboard: an image in it, and text put into it."""

import base64
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

from mlx_qwen35.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Programs that put standard input into the clipboard.
_COPIERS = (("pbcopy",), ("wl-copy",), ("xclip", "-selection", "clipboard"))
_SECONDS = 5  # that one of them may take


class Clipboard:
    """The clipboard of this machine, or of the terminal."""

    def image(self) -> "Image.Image | list[str]":
        """The image in it, or the names of files that were copied. InputError where there is neither."""
        from PIL import ImageGrab

        try:
            found = ImageGrab.grabclipboard()
        except (NotImplementedError, OSError, ValueError, subprocess.SubprocessError) as error:
            raise InputError("media_unreadable", f"the clipboard must be readable: {error}") from error
        if not found:
            raise InputError("media_not_found", "the clipboard must hold an image; it holds none")
        return found

    def copy(self, text: str) -> str:
        """Put a text into it; by what. InputError where nothing can."""
        for command in _COPIERS:
            if shutil.which(command[0]) and _run(command, text):
                return command[0]
        if not sys.stdout.isatty():
            raise InputError(
                "output_unwritable",
                "the clipboard must be reachable: there is no pbcopy, wl-copy or xclip that works, and no terminal",
            )
        sys.stdout.write(f"\033]52;c;{base64.b64encode(text.encode()).decode()}\a")
        sys.stdout.flush()
        return "the terminal (OSC 52), if it allows that"


def _run(command: tuple[str, ...], text: str) -> bool:
    """Whether it worked. xclip stays to serve the text, so nothing waits for the end of its output. pbcopy reads in the
    encoding of the locale.
    """
    try:
        done = subprocess.run(
            command, input=text.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=_SECONDS,
            env={**os.environ, "LC_CTYPE": "UTF-8"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
