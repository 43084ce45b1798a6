"""The one exception for input that breaks a rule: its message says the rule, what came and what to do."""


class InputError(ValueError):
    """Something the caller can mend: a path, a file, an option, a prompt. The commands print it without a traceback."""
