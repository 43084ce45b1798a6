"""A Hugging Face id is judged by its headers: what does not fit, or is only looked at, is not downloaded.

One process does everything against a hub on this machine, for huggingface_hub reads its settings when it is imported.
Each repository is one case, and the hub counts what was sent of it.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hollow import hollow
from serving_hub import Repository, hub

from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import is_zero_centred
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.convert.__main__ import main as convert_command
from mlx_qwen35.doctor.command import main as doctor_command

WORK = """
import contextlib, io, json, os, shutil, sys, tempfile, warnings

from mlx_qwen35 import InputError, load
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.convert import convert
from mlx_qwen35.convert.__main__ import main as convert_command
from mlx_qwen35.doctor.command import main as doctor_command
from mlx_qwen35.checkpoint.hub import resolve

told = {}

def case(name, function, repository=None):
    output, errors, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=errors)
        try:
            function(f"it/{repository or name}")
        except InputError as error:
            code = error.code
            print(error, file=errors)
        except SystemExit as error:
            code = error.code
    told[name] = {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}

def convert_to_a_full_disk(name):
    whole, free = shutil.disk_usage, shutil.disk_usage("/")._replace(free=10**9)
    shutil.disk_usage = lambda folder: free
    try:
        convert(name, "new/converted", recipe="4bit")
    finally:
        shutil.disk_usage = whole

case("plan", lambda name: doctor_command(["--plan", name]))
case("dry-run", lambda name: convert_command(["--hf-path", name, "--recipe", "4bit", "--dry-run"]))
case("memory", lambda name: load(name, memory_limit=4, dtype="bfloat16"))
case("disk", convert_to_a_full_disk)
case("broken", load)
case("sidecar", lambda name: convert_command(["--hf-path", name, "--recipe", "8bit", "--dry-run"]))
case("nano", lambda name: resolve(name, judge=open_checkpoint))
case("cached", lambda name: doctor_command(["--plan", name]), "nano")
case("gated", load)
case("absent", load)
case("down", lambda name: resolve(name, judge=open_checkpoint))
case("down, to be converted", lambda name: convert(name, "new/small", recipe="4bit"), "down-too")
case("revision", lambda name: load(name, revision="v9"), "plan")
case("no parts", lambda name: doctor_command(["--plan", name]), "no-parts")
told["left"] = os.listdir(tempfile.gettempdir())
print(json.dumps(told))
"""


def with_sidecar(raw: Path, folder: Path) -> Path:
    """A trunk in the layout of MLX programs, and its head, as it was trained, in a file that config.json names."""
    (folder / "heads").mkdir(parents=True)
    arrays = {name: array for file in raw.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    head = {name: arrays.pop(name) for name in list(arrays) if name.startswith("mtp.")}
    trunk = {n: a + 1 if is_zero_centred(n) else a for n, a in arrays.items()}
    trunk = {n: mx.contiguous(a.swapaxes(1, 2)) if n.endswith("conv1d.weight") else a for n, a in trunk.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), trunk)
    mx.save_safetensors(str(folder / "heads" / "mtp.safetensors"), head)
    config = json.loads((raw / "config.json").read_text())
    config["mlx_lm_extra_tensors"] = {"mtp_file": "heads/mtp.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, checkpoint_folder) -> dict[str, Repository]:
    place = tmp_path_factory.mktemp("hub")
    large = hollow(place / "plan", geometry("4b"))
    broken = hollow(place / "broken", geometry("4b"))
    (broken / "config.json").write_text(json.dumps(geometry("9b")))
    small = checkpoint_folder(vision=False)
    found = {name: Repository(large) for name in ("plan", "dry-run", "memory", "disk")}
    found |= {"broken": Repository(broken), "gated": Repository(large, gated=True)}
    found |= {"nano": Repository(resolve("nano")), "no-parts": Repository(resolve("nano"), parts=False)}
    found |= {name: Repository(resolve("nano"), down=1) for name in ("down", "down-too")}
    return found | {"sidecar": Repository(with_sidecar(small, place / "sidecar"))}


@pytest.fixture(scope="module")
def told(repositories, tmp_path_factory) -> dict[str, Any]:
    """What each case printed, and the code with which it ended."""
    place = tmp_path_factory.mktemp("home")
    (place / "temporary").mkdir()
    with hub({f"it/{name}": repository for name, repository in repositories.items()}) as address:
        own = {"HF_ENDPOINT": address, "HF_HOME": str(place / "cache"), "TMPDIR": str(place / "temporary")}
        own |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", WORK], env=os.environ | own, cwd=place, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def printed(capsys, command, *arguments: str) -> str:
    command([*arguments])
    return capsys.readouterr().out


def whole(repository: Repository, ending: str = "") -> int:
    """Bytes of the files whose paths end so."""
    return sum(file.stat().st_size for path, file in repository.files.items() if path.endswith(ending))


@pytest.mark.parametrize("name", ["plan", "dry-run", "memory", "disk"])
def test_less_than_a_thousandth_is_sent_of_what_is_only_judged(name, told, repositories):
    repository = repositories[name]
    assert repository.bytes_sent(".safetensors"), "the headers were not asked for"
    assert 1000 * repository.bytes_sent() < whole(repository)


def test_the_plan_of_an_id_is_that_of_the_folder(told, repositories, capsys):
    folder = str(repositories["plan"].folder)
    expected = printed(capsys, doctor_command, "--plan", folder).replace(folder, "it/plan")
    assert told["plan"]["code"] is None
    assert told["plan"]["output"].split() == expected.split()  # lines break elsewhere


def test_the_dry_run_of_an_id_is_that_of_the_folder(told, repositories, capsys):
    folder = str(repositories["dry-run"].folder)
    expected = printed(capsys, convert_command, "--hf-path", folder, "--recipe", "4bit", "--dry-run")
    assert (told["dry-run"]["code"], told["dry-run"]["output"]) == (None, expected)


def test_a_head_in_a_file_of_its_own_is_seen_and_its_form_known(told, repositories, capsys):
    folder = str(repositories["sidecar"].folder)
    expected = printed(capsys, convert_command, "--hf-path", folder, "--recipe", "8bit", "--dry-run")
    assert "mtp.layers.0.input_layernorm.weight" in expected
    assert told["sidecar"] == {"code": None, "output": expected, "errors": ""}


def test_a_model_that_does_not_fit_is_refused_by_its_id(told):
    assert told["memory"]["code"] == "memory_exceeded"
    assert "--model it/memory --recipe 4bit" in told["memory"]["errors"]


def test_a_disk_too_small_for_the_conversion_is_told(told):
    assert told["disk"]["code"] == "disk_full"


def test_what_the_headers_refuse_is_named_by_the_id_and_not_by_a_temporary_folder(told):
    assert told["broken"]["code"] == "tensors_mismatch"
    assert "it/broken" in told["broken"]["errors"] and "mlx_qwen35-headers" not in told["broken"]["errors"]


def test_what_fits_is_downloaded(told, repositories):
    assert told["nano"]["code"] is None
    assert repositories["nano"].sent["tokenizer.json"]


def test_an_id_that_is_whole_in_the_cache_is_asked_for_no_header(told, repositories):
    nano = repositories["nano"]
    header = struct.unpack("<Q", nano.files["model.safetensors"].read_bytes()[:8])[0]
    assert told["cached"]["code"] is None and "it/nano" in told["cached"]["output"]
    assert nano.bytes_sent(".safetensors") == whole(nano, ".safetensors") + 8 + (8 + header)


def test_a_hub_without_parts_of_files_is_told_of_and_downloaded_from(told, repositories):
    assert told["no parts"]["code"] is None
    assert "warning: the headers of it/no-parts" in told["no parts"]["errors"]
    assert repositories["no-parts"].sent["model.safetensors"]


def test_a_gated_repository_is_told_in_one_sentence(told):
    assert told["gated"]["code"] == "hub_failed"
    assert "it/gated" in told["gated"]["errors"] and "hf auth login" in told["gated"]["errors"]


@pytest.mark.parametrize("name", ["down", "down, to be converted"])
def test_a_first_request_that_fails_ends_in_an_error_and_not_in_a_download(name, told, repositories):
    assert told[name]["code"] == "hub_failed"
    assert repositories["down"].bytes_sent() == repositories["down-too"].bytes_sent() == 0


def test_an_unknown_repository_is_told(told):
    assert told["absent"]["code"] == "model_not_found"


def test_a_revision_that_is_not_there_is_named(told):
    assert told["revision"]["code"] == "hub_failed"
    assert "'v9'" in told["revision"]["errors"]


def test_no_folder_of_headers_is_left(told):
    assert [name for name in told["left"] if name.startswith("mlx_qwen35-headers")] == []
