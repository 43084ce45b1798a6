"""A hub on this machine: as much of Hugging Face's as is needed to look at repositories and to download them.

What was asked for and how much was sent is counted by repository, so that each repository stands for one case.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_PIECE = 1 << 15
_MOST = 1 << 26  # bytes to send at once; more is counted as sent, and refused


@dataclass
class Repository:
    """A folder that is published at a commit.

    gated: its files are refused. parts: whether a part of a file can be asked for. checksums: whether the hub tells
    those of the weights, as of files in its large storage, right or `wrong`. before: called with the path and the
    position of each piece of a file; True breaks the connection. down: requests for its list of files up to this
    one, counting all, are answered with 503. requests: how many there were, of files too.
    """

    folder: Path
    gated: bool = False
    parts: bool = True
    checksums: bool = False
    wrong: bool = False
    commit: str = COMMIT
    before: Callable[[str, int], bool] = lambda path, position: False
    down: int = 0
    requests: int = 0
    sent: Counter = field(default_factory=Counter)  # bytes by path
    asked: list[tuple[str, int, int]] = field(default_factory=list)  # path, first byte, end

    @property
    def files(self) -> dict[str, Path]:
        return {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}

    def storage(self, path: str) -> dict[str, Any]:
        """What the hub tells of a file in its large storage."""
        if not self.checksums or not path.endswith(".safetensors"):
            return {}
        data = b"another" if self.wrong else self.files[path].read_bytes()
        found = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return {"lfs": found}

    def bytes_sent(self, ending: str = "") -> int:
        return sum(nbytes for path, nbytes in self.sent.items() if path.endswith(ending))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Mapping[str, Repository]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            self._api(found[1], found[2] or "")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[3])
        else:
            self._answer(404, b"")

    def _api(self, name: str, rest: str) -> None:
        repository = self.repositories.get(name)
        if repository is None:
            return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        repository.requests += 1
        if repository.requests <= repository.down:
            return self._answer(503, b"{}")
        if rest and rest.split("/")[-1] not in ("main", "v1", repository.commit):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        sizes = {path: file.stat().st_size for path, file in repository.files.items()}
        if rest.startswith("/tree"):
            answer = [{"type": "file", "path": path, "size": size, "oid": _tag(path)} for path, size in sizes.items()]
        else:
            files = [
                {"rfilename": path, "size": size, "blobId": _tag(path)} | repository.storage(path)
                for path, size in sizes.items()
            ]
            answer = {"id": name, "sha": repository.commit, "siblings": files, "private": False}
            answer |= {"tags": [], "downloads": 0}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, path: str) -> None:
        repository = self.repositories[name]
        repository.requests += 1
        if repository.gated:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        file = repository.files[path]
        size = file.stat().st_size
        headers = {"ETag": f'"{_tag(path)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not repository.parts:
            return self._answer(501, b"")
        start, stop = (int(asked[1]), int(asked[2] or size - 1) + 1) if asked else (0, size)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{min(stop, size) - 1}/{size}"
        if self.command == "HEAD":
            return self._answer(200, b"", headers | {"Content-Length": str(size)})
        if stop - start > _MOST:
            repository.sent[path] += stop - start
            return self._answer(507, b"")
        repository.asked.append((path, start, min(stop, size)))
        self._begin(206 if asked else 200, min(stop, size) - start, headers)
        with file.open("rb") as stream:
            stream.seek(start)
            while data := stream.read(min(_PIECE, stop - stream.tell())):
                if repository.before(path, stream.tell() - len(data)):
                    self.close_connection = True
                    return
                self.wfile.write(data)
                self.wfile.flush()
                repository.sent[path] += len(data)

    def _begin(self, status: int, nbytes: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(nbytes)} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()

    def _answer(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._begin(status, len(data), headers or {})
        if self.command != "HEAD":
            self.wfile.write(data)


def _tag(path: str) -> str:
    return hashlib.sha1(path.encode()).hexdigest()


@contextmanager
def hub(repositories: Mapping[str, Repository]) -> Iterator[str]:
    """The address of a hub with these repositories, until the block ends."""
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
