"""A checkpoint's name -> a local folder: a path, a Hugging Face id, or `nano`, which comes with the package."""

import os
import sys
from importlib import resources
from pathlib import Path

from mlx_qwen35.errors import InputError
from mlx_qwen35.values import shown

NANO = "nano"
CHOICES = (
    "a local folder, a Hugging Face id such as Qwen/Qwen3.5-4B, or 'nano' (the small demonstration model that comes "
    "with the package)"
)
# Weights, configuration, tokenizer, template, licence. Never Python code, never pickled weights.
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded with huggingface_hub when `name` is an id that is not a local folder.

    Downloads show a progress bar, resume, and stay in huggingface_hub's cache; HF_HUB_OFFLINE=1 uses the cache alone.
    Raises InputError when there is neither such a folder nor such a repository, or the hub cannot be reached.
    """
    if not isinstance(name, str | os.PathLike):
        raise InputError("model_not_found", f"a checkpoint must be {CHOICES}; got {shown(name)}")
    folder = _look(name)
    if revision is not None and (str(name) == NANO or folder.exists()):
        raise InputError(
            "option_no_effect", f"a revision is for Hugging Face ids; {name} is local. Leave --revision out"
        )
    if str(name) == NANO:
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
    return _download(str(name), revision)


def _look(name: str | Path) -> Path:
    """The path of this name, of which it can be told whether something is there."""
    try:
        folder = Path(name).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long, closed to this user, a home that is none
        raise InputError("model_not_found", f"{shown(str(name))} cannot be looked at: {error}") from error
    return folder


def _check_readable(folder: Path) -> None:
    """InputError where this user must not read the folder, or a file in it that belongs to a checkpoint."""
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
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    offline = f"'--model {NANO}' works without the network"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_FILES)))
    except HFValidationError as error:
        raise InputError("model_not_found", f"{repository!r} is no Hugging Face id: {error}; give {CHOICES}") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            "model_not_found", f"there is no folder {repository} and no public repository of that id; give {CHOICES}"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            "hub_failed",
            f"could not get {repository}{at} from the Hugging Face hub ({type(error).__name__}: {reason}). Check the "
            f"network and the id, or give a local folder; {offline}",
        ) from error


def _unreachable() -> tuple[type[Exception], ...]:
    """What huggingface_hub's HTTP library, which differs by version, raises where there is no network."""
    modules = (sys.modules.get(name) for name in ("httpx", "httpx2"))
    return tuple(module.TransportError for module in modules if module)


def check_repository(repository: str) -> None:
    """InputError where this can be no repository's id."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            "repository_invalid", f"--upload-repo must be an id such as name/model, got {repository!r}: {error}"
        ) from error
    if repository.count("/") != 1:
        raise InputError("repository_invalid", f"--upload-repo must be an id such as name/model, got {repository!r}")


def upload(folder: Path, repository: str) -> str:
    """Publish a folder as a model repository of this id, made if it is not there; return its address.

    Raises InputError when the id is none, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    check_repository(repository)
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), repo_type="model")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, *_unreachable()) as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise InputError(
            "upload_failed",
            f"{folder} is whole, but could not be published as {repository} ({type(error).__name__}: {reason}). Log in "
            f"with `hf auth login`, check the network and the id, or upload it with `hf upload {repository} {folder}`",
        ) from error
    return f"https://huggingface.co/{repository}"
