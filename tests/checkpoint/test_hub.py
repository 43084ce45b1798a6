"""Names of checkpoints: folders, Hugging Face ids, nano. Nothing here touches the network."""

import huggingface_hub
import pytest
import refusing
from huggingface_hub import errors

from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import look, resolve


def hub_raises(monkeypatch, error: BaseException) -> None:
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)


def refused(name, code: str, *facts: object, **options) -> None:
    with refusing.refused(code, *facts):
        resolve(name, **options)


def test_nano_comes_with_the_package():
    folder = resolve("nano")
    assert open_checkpoint(folder).raw
    assert (folder / "tokenizer.json").is_file()


def test_a_local_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_a_local_folder_is_found_before_an_id(tmp_path, monkeypatch):
    hub_raises(monkeypatch, AssertionError("the hub was asked"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").samefile(tmp_path / "owner" / "name")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


def test_an_id_is_downloaded_without_code_or_pickles(monkeypatch, tmp_path):
    asked = {}

    def download(repository, revision=None, allow_patterns=None):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("Qwen/Qwen3.5-4B", revision="abc") == tmp_path
    assert (asked["repository"], asked["revision"]) == ("Qwen/Qwen3.5-4B", "abc")
    assert not any(
        pattern.endswith((".py", ".bin", ".pt", "*")) and pattern != "LICENSE*" for pattern in asked["patterns"]
    )


def test_a_file_is_refused(tmp_path):
    (tmp_path / "weights.gguf").write_text("x")
    refused(tmp_path / "weights.gguf", "model_not_found", "weights.gguf")


def test_a_revision_of_something_local_is_refused(tmp_path):
    for name in ("nano", tmp_path):
        with refusing.refused("option_no_effect"):
            resolve(name, revision="main")


def test_an_empty_name_is_refused():
    for name in ("", " "):
        refused(name, "model_not_found")


@pytest.mark.parametrize("name", ["absent", "./absent/model", "a/b/c", "/absent/model", "~/absent", "owner/"])
def test_what_is_neither_folder_nor_id_is_refused(name, tmp_path, monkeypatch):
    hub_raises(monkeypatch, AssertionError("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    refused(name, "model_not_found", "Qwen/Qwen3.5-4B")


class Response:
    """As much of an HTTP answer as huggingface_hub's exceptions look at."""

    headers: dict = {}  # noqa: RUF012
    status_code = 404
    request = None
    url = "https://huggingface.co"

    def json(self):
        return {}


def test_an_unknown_repository_is_told(monkeypatch):
    hub_raises(monkeypatch, errors.RepositoryNotFoundError("404 Client Error.", response=Response()))
    refused("Qwen/Qwen9", "model_not_found")


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder"),
        errors.HfHubHTTPError("503 Server Error\nmore", response=Response()),
        ConnectionError("Name or service not known"),
        OSError("No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_cannot_be_reached_names_the_way_without_network(error, monkeypatch):
    hub_raises(monkeypatch, error)
    refused("Qwen/Qwen3.5-4B", "hub_failed", type(error).__name__, "--model")
    refused("Qwen/Qwen3.5-4B", "hub_failed", "v9", revision="v9")


def test_an_error_without_a_message_is_still_told(monkeypatch):
    hub_raises(monkeypatch, OSError())
    refused("Qwen/Qwen3.5-4B", "hub_failed", "--model")


def test_a_revision_that_is_not_there_is_named(monkeypatch):
    hub_raises(monkeypatch, errors.RevisionNotFoundError("404 Client Error.", response=Response()))
    refused("Qwen/Qwen3.5-4B", "hub_failed", "v9", revision="v9")


def test_an_id_that_the_hub_finds_invalid_is_told(monkeypatch):
    hub_raises(monkeypatch, errors.HFValidationError("Repo id must use alphanumeric chars"))
    refused("a--b/c..d", "model_not_found")


def test_offline_the_cache_alone_is_used(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    refused("Qwen/Qwen3.5-4B", "hub_failed", "--model")


@pytest.mark.parametrize("error", [ConnectionError("down"), errors.HfHubHTTPError("503", response=Response())])
def test_what_the_cache_has_is_used_without_a_download_where_the_hub_fails(error, monkeypatch, tmp_path):
    def listing(*args, **options):
        raise error

    def download(*args, local_files_only=False, **options):
        assert local_files_only, "a download was begun"
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", listing)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("Qwen/Qwen3.5-4B", judge=open_checkpoint) == tmp_path
    with look("Qwen/Qwen3.5-4B") as folder:
        assert folder == tmp_path
