"""GET / and GET /page/NAME: the page, and the files it is made of. They are the same for everybody and need no key."""

import mimetypes
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

from mlx_qwen35.server.errors import ApiError

# The page runs its own scripts and no others, whatever a model writes. No site may frame it. DOMPurify alone may turn
# text into elements (trusted-types, where the browser knows them).
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
FOLDER = files("mlx_qwen35.server") / "page"


def _contents(folder: Traversable, prefix: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _contents(entry, f"{prefix}{entry.name}/")
        else:
            found[prefix + entry.name] = entry.read_bytes()
    return found


FILES = _contents(FOLDER)  # by name; what is not here is not served


async def page(request: Request) -> Response:
    name = request.path_params.get("name", "index.html")
    if name not in FILES:
        raise ApiError(404, "not_found", f"the page has no file {name!r}")
    kind = {"js": "text/javascript"}.get(name.rpartition(".")[2]) or mimetypes.guess_type(name)[0] or "text/plain"
    return Response(FILES[name], media_type=kind, headers=HEADERS)
