"""Text from elsewhere, such as answers and the names of folders, shown without control of the terminal."""

_CONTROLS: dict[int, int | None] = {  # as pictures of them
    **{code: 0x2400 + code for code in range(0x20)},
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **{0x7F: 0x2421, 0x0D: None, 0x0A: 0x0A, 0x09: 0x09},
}


def safe(text: str) -> str:
    """A text without characters that control a terminal: it moves no cursor, sets no title and opens no link."""
    return text.translate(_CONTROLS)


def safe_name(name: str) -> str:
    """A name likewise, on one line."""
    return safe(name.replace("\r", "\u240d").replace("\n", "\u240a").replace("\t", "\u2409"))
