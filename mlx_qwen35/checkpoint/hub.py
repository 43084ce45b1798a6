"""A checkpoint's name -> a local folder: a path, a Hugging Face id, or `nano`, which comes with the package."""

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.errors import InputError
from mlx_qwen35.options import spelled
from mlx_qwen35.values import shown

if TYPE_CHECKING:
    from mlx_qwen35.checkpoint.hub_headers import Published

NANO = "nano"
CHOICES = (
    "a local folder, a Hugging Face id such as Qwen/Qwen3.5-4B, or 'nano' (the small demonstration model that comes "
    "with the package)"
)
# Weights, configuration, tokenizer, template, licence. Never Python code, never pickled weights.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


def resolve(
    name: str | Path | None, revision: str | None = None, judge: Callable[[Path], object] | None = None
) -> Path:
    """The folder of a checkpoint, downloaded with huggingface_hub when `name` is an id that is not a local folder.

    Downloads show a progress bar, resume, and stay in huggingface_hub's cache; HF_HUB_OFFLINE=1 uses the cache alone.
    Warns where a local folder has the bundled model's name.
    judge: called with a folder of headers before anything is downloaded; it raises InputError to prevent the download.
    Raises InputError when there is neither such a folder nor such a repository, None too, or the hub cannot be reached.
    """
    folder = _local(name, revision)
    if folder is not None:
        return folder
    if judge:
        found = published(str(name), revision)
        if isinstance(found, Path):
            return found
        with _headers(found, revision) as folder:
            if folder is not None:
                judge(folder)
    return _download(str(name), revision)


@contextmanager
def look(name: str | Path, revision: str | None = None, texts: bool = False) -> Iterator[Path]:
    """The folder of a checkpoint whose headers and configuration alone are read; nothing else is downloaded.

    texts: whether the tokenizer and the template are there too.

    Raises InputError like `resolve`.
    """
    folder = _local(name, revision)
    if folder is not None:
        yield folder
        return
    found = published(str(name), revision)
    if isinstance(found, Path):
        yield found
        return
    with _headers(found, revision) as folder:
        if folder is not None and texts:
            _complete(folder, found, revision)
        yield _download(str(name), revision) if folder is None else folder


def _complete(folder: Path, found: "Published", revision: str | None) -> None:
    """Fetch all but the weights into a folder of headers."""
    from mlx_qwen35.checkpoint.hub_headers import complete

    try:
        complete(folder, found.files)
    except failures() as error:
        raise hub_error(found.name, revision, error) from error


def _local(name: str | Path | None, revision: str | None) -> Path | None:
    """The folder, or None where the name can only be an id."""
    if not isinstance(name, str | os.PathLike):
        raise InputError("model_not_found", f"a checkpoint must be {CHOICES}; got {shown(name)}")
    folder = _look(name)
    if revision is not None and (str(name) == NANO or folder.exists()):
        raise InputError(
            "option_no_effect", f"{spelled('revision')} is for Hugging Face ids; {name} is local. Leave it out"
        )
    if str(name) == NANO:
        if Path(NANO, "config.json").is_file():
            warnings.warn(
                f"'{NANO}' is the model that comes with the package; the folder {NANO} here is not read. "
                f"Give ./{NANO} for that",
                UserWarning,
                stacklevel=2,
            )
        return Path(str(resources.files("mlx_qwen35") / NANO))
    if not str(name).strip():
        raise InputError("model_not_found", f"the name of a checkpoint must not be empty; give {CHOICES}")
    if folder.is_dir():
        _check_readable(folder)
        return folder
    if folder.exists():
        raise InputError("model_not_found", f"a checkpoint must be {CHOICES}; {folder} is a file")
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or str(name).startswith((".", "~")):
        raise InputError("model_not_found", f"there is no folder {name}, and it is no Hugging Face id; give {CHOICES}")
    return None


def published(repository: str, revision: str | None = None) -> "Published | Path":
    """What the hub lists of a repository that is to be downloaded, or its folder in huggingface_hub's cache.

    The folder where all of it is there, or where the hub does not list it: offline, closed, out of order. Raises
    InputError where the cache has nothing then: no download begins before its files are known.
    """
    from mlx_qwen35.checkpoint.hub_headers import Published, in_cache, list_files

    try:
        commit, files = list_files(repository, revision, _FILES)
    except failures() as error:
        return _cached(repository, revision, error)
    if not files or in_cache(repository, commit, files):
        return _download(repository, revision)
    return Published(repository, commit, files)


@contextmanager
def _headers(found: "Published", revision: str | None) -> Iterator[Path | None]:
    """A folder of headers; None where the hub sends no parts of files."""
    from mlx_qwen35.checkpoint.hub_headers import folder_of_headers

    with ExitStack() as stack:
        try:
            folder = stack.enter_context(folder_of_headers(found.name, found.files))
        except failures() as error:
            if _is_refused_or_down(error):
                raise hub_error(found.name, revision, error) from error
            warnings.warn(
                f"the headers of {found.name} could not be read from the hub ({_reason(error)}): it is downloaded "
                "before it is known whether it can be used",
                UserWarning,
                stacklevel=4,
            )
            folder = None
        yield folder


def is_local(name: str | Path, revision: str | None = None) -> bool:
    """Whether a checkpoint's name is that of a folder, or the bundled model. Raises InputError like `resolve`."""
    return _local(name, revision) is not None


def _look(name: str | Path) -> Path:
    """The path of this name; InputError where the system cannot say whether it exists."""
    try:
        folder = Path(name).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long, closed to this user, a home that is none
        raise InputError("model_not_found", f"{shown(str(name))} cannot be looked at: {error}") from error
    return folder


def _check_readable(folder: Path) -> None:
    """InputError where this user may not read the folder, or a checkpoint's file in it."""
    closed = [folder]
    if os.access(folder, os.R_OK | os.X_OK):
        files = (file for pattern in _FILES for file in folder.glob(pattern))
        closed = [file for file in files if file.is_file() and not os.access(file, os.R_OK)]
    if closed:
        raise InputError(
            "file_unreadable", f"a checkpoint must be open to reading; {closed[0]} is not. Look at its rights"
        )


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_FILES)))
    except failures() as error:
        raise hub_error(repository, revision, error) from error


def _cached(repository: str, revision: str | None, failure: Exception) -> Path:
    """The folder in huggingface_hub's cache, without a request. InputError of the hub's failure where there is none."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(_FILES), local_files_only=True)
        )
    except failures():
        raise hub_error(repository, revision, failure) from failure


def _is_refused_or_down(error: Exception) -> bool:
    """Whether a download would fail too: a closed repository, a hub that does not answer or is overloaded."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status in (401, 403, 429, 500, 502, 503, 504) or isinstance(error, _unreachable())


def failures() -> tuple[type[Exception], ...]:
    """The exceptions of huggingface_hub, most of which are OSError, and of its HTTP library."""
    from huggingface_hub.errors import HFValidationError

    return HFValidationError, OSError, json.JSONDecodeError, *_unreachable()


def hub_error(repository: str, revision: str | None, error: Exception) -> InputError:
    """What the hub's refusal means, and what to do."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, HFValidationError):
        return InputError("model_not_found", f"{repository!r} is no Hugging Face id: {error}; give {CHOICES}")
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return InputError(
            "model_not_found", f"there is no folder {repository} and no public repository of that id; give {CHOICES}"
        )
    at = f" at revision {revision!r}" if revision else ""
    if isinstance(error, GatedRepoError):
        advice = "Ask for access on its page and log in with `hf auth login`, or give a local folder"
    else:
        advice = "Check the network and the id, or give a local folder"
    return InputError(
        "hub_failed",
        f"could not get {repository}{at} from the Hugging Face hub ({_reason(error)}). {advice}; '--model {NANO}' "
        "works without the network",
    )


def _reason(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _unreachable() -> tuple[type[Exception], ...]:
    """The exceptions for failed requests of huggingface_hub's HTTP library, which differs by version."""
    modules = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return tuple(module.RequestError for module in modules if module)


def check_repository(repository: str) -> None:
    """InputError for an invalid repository id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    rule = f"--upload-repo must be an id such as name/model, got {repository!r}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError("repository_invalid", f"{rule}: {error}") from error
    if repository.count("/") != 1:
        raise InputError("repository_invalid", rule)


def upload(folder: Path, repository: str) -> str:
    """Publish a folder as a model repository of this id, created if needed; return its address.

    Raises InputError when the id is invalid, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), repo_type="model")
    except failures() as error:
        raise InputError(
            "upload_failed",
            f"{folder} is whole, but could not be published as {repository} ({_reason(error)}). Log in "
            f"with `hf auth login`, check the network and the id, or upload it with `hf upload {repository} {folder}`",
        ) from error
    return f"https://huggingface.co/{repository}"
