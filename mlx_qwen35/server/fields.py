"""Reads the JSON object of a request field by field: every error names the field, and no field is passed over.

body = await read_body(request)
model = body.text("model", None)
n = body.whole("n", 1, least=1, most=8)
options = body.option("top_p", Sampling)  # {"top_p": 0.9}, checked as the library checks it
body.refuse("audio", "this model does not speak")
body.done()  # logs unknown fields once
with body.naming("messages"):  # an InputError in here names a field
    job = service.prepare(messages, n, **options)
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from mlx_qwen35.errors import InputError
from mlx_qwen35.options import options_of
from mlx_qwen35.server.errors import ApiError
from mlx_qwen35.values import shown

LOG = logging.getLogger("mlx_qwen35.server")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")  # of a field that the log shows
_CALL_ID = re.compile(r"^tool_call_id of messages\[(\d+)\]")
_told: set[str] = set()  # unknown fields that were logged
MISSING: Any = object()


class Fields:
    """An object of a request. null counts as left out.

    Args:
        path: where it stands in the request, for errors.

    about: code of an InputError -> the field that it is about, for `naming`.
    """

    def __init__(self, given: Any, path: str = ""):
        self.path, self.about = path, dict[str, str]()
        if not isinstance(given, Mapping):
            raise self.error("", "must be an object", given)
        self._given, self._known = given, set[str]()

    def place(self, name: str) -> str:
        return ".".join(filter(None, (self.path, name)))

    def error(self, name: str, rule: str, value: Any = MISSING, code: str = "invalid_value") -> ApiError:
        place = self.place(name)
        came = "" if value is MISSING else f"; got {shown(value)[:200]}"
        return ApiError(400, code, f"{place or 'the request'} {rule}{came}", place or None)

    def any(self, name: str, default: Any = MISSING) -> Any:
        """The value as it came."""
        self._known.add(name)
        value = self._given.get(name)
        if value is not None:
            return value
        if default is MISSING:
            raise self.error(name, "must be given", code="missing_field")
        return default

    def _typed(self, name: str, default: Any, rule: str, right: Callable[[Any], bool]) -> Any:
        value = self.any(name, default)
        if value is not default and not right(value):
            raise self.error(name, rule, value)
        return value

    def text(self, name: str, default: Any = MISSING) -> Any:
        return self._typed(name, default, "must be a string", lambda v: isinstance(v, str))

    def flag(self, name: str, default: Any = MISSING) -> Any:
        return self._typed(name, default, "must be true or false", lambda v: isinstance(v, bool))

    def choice(self, name: str, among: Collection[str], default: Any = MISSING) -> Any:
        rule = f"must be one of {', '.join(among)}"
        return self._typed(name, default, rule, lambda v: isinstance(v, str) and v in among)

    def whole(self, name: str, default: Any = MISSING, *, least: int, most: int | None = None) -> Any:
        rule = f"must be an integer from {least} to {most}" if most is not None else f"must be an integer >= {least}"

        def right(value: Any) -> bool:
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole and value >= least and (most is None or value <= most)

        return self._typed(name, default, rule, right)

    def number(self, name: str, default: Any = MISSING, *, least: float, most: float) -> Any:
        def right(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

        return self._typed(name, default, f"must be a number from {least:g} to {most:g}", right)

    def items(self, name: str, default: Any = MISSING, *, most: int | None = None) -> Sequence[Any]:
        items = self._typed(name, default, "must be a list", lambda v: isinstance(v, list))
        if most is not None and len(items) > most:
            raise self.error(name, f"must be a list of at most {most:,}; it has {len(items):,}")
        return items

    def object(self, name: str, default: Any = MISSING) -> Any:
        """A Fields of the object; the default where it is left out."""
        value = self.any(name, default)
        return value if value is default else Fields(value, self.place(name))

    def objects(self, name: str, default: Any = MISSING, *, most: int | None = None) -> list["Fields"]:
        """A Fields of each object in a list."""
        return [Fields(item, f"{self.place(name)}.{i}") for i, item in enumerate(self.items(name, default, most=most))]

    def option(self, name: str, group: type, own: str = "") -> dict[str, Any]:
        """A field that is an option of the library, checked as that, under the library's name; {} if it is left out."""
        value, own = self.any(name, None), own or name
        if value is None:
            return {}
        try:
            return {own: options_of(group)[own].checked(self.place(name), value)}
        except InputError as error:
            raise ApiError(400, "invalid_value", str(error), self.place(name)) from None

    def refuse(self, name: str, why: str, idle: Collection[Any] = (False, 0, "", [], {})) -> None:
        """Refuse a field that would have no effect, unless its value asks for nothing."""
        value = self.any(name, None)
        if value is not None and value not in idle:
            raise self.error(name, f"is not supported: {why}", code="unsupported_field")

    def only(self, why: str) -> None:
        """Refuse all fields that nobody asked for."""
        for name in self._given.keys() - self._known:
            self.refuse(str(name), why, idle=())

    def unread(self, names: Iterable[str]) -> list[str]:
        """Those of the names that nobody asked for."""
        return [name for name in names if name not in self._known]

    def ignore(self, *names: str) -> None:
        """Fields that change nothing of the answer, as the user's name."""
        self._known.update(names)

    def done(self) -> None:
        """Log the fields that nobody asked for, each once."""
        for name in self._given:
            place = self.place(plain_name(name))
            if name not in self._known and place not in _told and len(_told) < 1000:
                _told.add(place)
                LOG.warning("unknown field %r is ignored", place)

    @contextmanager
    def naming(self, field: str, call_id: str = r"tool_call_id of messages.\1") -> Iterator[None]:
        """In the block an InputError becomes a refusal that names a field: by `about`, else this one.

        call_id: what a result's id is called here, where the messages are not those of the request.
        """
        try:
            yield
        except InputError as error:
            told = ApiError.of(error, self.about.get(error.code, field))
            told.message = _CALL_ID.sub(call_id, told.message)
            raise told from error


def plain_name(name: str) -> str:
    """The name of a field, which a client may have made up, for the log."""
    return name[:40] if _NAME.fullmatch(name) else "?" * bool(name)


async def read_body(request: Request) -> Fields:
    """The JSON object of a request, which guard.py has parsed."""
    return Fields(request.scope["json"])
