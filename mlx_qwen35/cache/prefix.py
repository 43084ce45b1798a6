"""A library of prefixes: what was read once is not read again."""


class PrefixLibrary:
    """Snapshots of the beginnings of prompts."""
