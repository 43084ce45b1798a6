"""What a test expects of bad input: the code of the error, and the facts (names, numbers) that its message must repeat.

Prose is not matched, so that sentences can be improved.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlx_qwen35.errors import InputError


@contextmanager
def refused(code: str, *facts: object) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """The block raises InputError with this code, and its message holds every fact as it came."""
    with pytest.raises(InputError) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    for fact in facts:
        assert str(fact) in str(caught.value), f"{fact!r} is not in: {caught.value}"
