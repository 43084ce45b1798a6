"""A conversion of a repository downloads its files of weights one by one: what is on the disk, what is asked for, what
a broken download leaves.
"""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from converting import files_of
from hollow import hollow
from huggingface_hub import constants
from refusing import refused
from serving_hub import COMMIT, Repository, hub
from sharding import split

from mlx_qwen35.checkpoint.adapter import Pair
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.converted import hidden, owned
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.hub_headers import Published, RemoteFile
from mlx_qwen35.checkpoint.random import geometry
from mlx_qwen35.convert import supply
from mlx_qwen35.convert.fusion import NO_ADAPTER, AdapterOptions
from mlx_qwen35.convert.plan import make_plan
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.convert.stream import write
from mlx_qwen35.convert.supply import Downloads, most_bytes
from mlx_qwen35.convert.target import appearing_whole

OPTIONS = StorageOptions("4bit", rounding="nearest")


class Hub:
    """A repository of nano in three files of weights, on a hub, and conversions of it."""

    def __init__(self, folder: Path, address: str, repository: Repository):
        self.repository, self.told = repository, []
        self.target = folder / "out"
        repository.before = lambda path, position: False
        files = [
            RemoteFile(
                path, f"{address}/it/nano/resolve/{COMMIT}/{path}", file.stat().st_size,
                hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".safetensors" else None,
            )
            for path, file in sorted(repository.files.items())
        ]  # fmt: skip
        self.files = files
        self.weights = [file for file in files if file.path.endswith(".safetensors")]

    def tell(self, done: int, total: int, left: float | None) -> None:
        self.told.append((done, total, left))

    def convert(self, tell=None, adapter: AdapterOptions = NO_ADAPTER) -> Path:
        with owned(self.target) as place:
            source = Downloads(Published("it/nano", COMMIT, self.files), place, tell or self.tell)
            plan = make_plan(source.prepare(lambda folder: None), OPTIONS, adapter)
            with appearing_whole(self.target, False, hidden(self.target)[0].is_dir(), keeps=True) as folder:
                write(plan, folder, supply=source)
        return self.target

    def on_disk(self) -> int:
        """Bytes that downloaded weights take."""
        found = 0
        for file in hidden(self.target)[1].glob("weights/*"):
            found += file.stat().st_size
        return found

    def asked(self) -> list[tuple[int, int, int]]:
        """Number of the file, first byte and end of each request for more than a header."""
        order = {file.path: number for number, file in enumerate(self.weights)}
        asked = [(order[path], start, stop) for path, start, stop in self.repository.asked if path in order]
        return [(number, start, stop) for number, start, stop in asked if stop == self.weights[number].nbytes]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[tuple[Repository, str]]:
    repository = Repository(split(resolve("nano"), tmp_path_factory.mktemp("hub") / "nano", 3))
    with hub({"it/nano": repository}) as address:
        yield repository, address


@pytest.fixture(scope="module")
def expected(published, tmp_path_factory) -> dict[str, bytes]:
    """The files of a conversion of the folder."""
    with appearing_whole(tmp_path_factory.mktemp("whole") / "out", False) as folder:
        write(make_plan(published[0].folder, OPTIONS), folder)
        return files_of(folder)


@pytest.fixture
def nano(published, tmp_path, monkeypatch) -> Hub:
    monkeypatch.setattr(supply, "WAITS", (0, 0))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the hub is on this machine
    repository, address = published
    repository.asked.clear()
    repository.sent.clear()
    return Hub(tmp_path, address, repository)


def test_the_result_is_that_of_the_folder_and_each_file_is_asked_for_once(nano, expected):
    assert {k: v for k, v in files_of(nano.convert()).items() if k != ".conversion.jsonl"} == {
        k: v for k, v in expected.items() if k != ".conversion.jsonl"
    }
    assert nano.asked() == [(number, 0, file.nbytes) for number, file in enumerate(nano.weights)]


def test_an_adapter_is_fused_while_the_source_is_downloaded(nano, tmp_path):
    """Its whole tensors are read from its own folder, which is left as it is."""
    shapes = open_checkpoint(resolve("nano")).shapes
    up, norm = (f"model.language_model.layers.{end}.weight" for end in ("1.mlp.up_proj", "0.input_layernorm"))
    random = np.random.default_rng(0)
    a, b = (mx.array(random.normal(0, 0.1, (rows, 2)).astype(np.float32)) for rows in reversed(shapes[up]))
    write_adapter(tmp_path / "mine", {up: Pair(a.T, b, 1.0)})
    tensors = mx.load(str(tmp_path / "mine" / "adapter_model.safetensors"))
    tensors[f"base_model.model.{norm}"] = mx.array(random.normal(0, 0.1, shapes[norm]).astype(np.float32))
    mx.save_safetensors(str(tmp_path / "mine" / "adapter_model.safetensors"), tensors)
    before, chosen = files_of(tmp_path / "mine"), AdapterOptions(tmp_path / "mine")
    found = files_of(nano.convert(adapter=chosen))
    with appearing_whole(tmp_path / "whole", False) as folder:
        write(make_plan(nano.repository.folder, OPTIONS, chosen), folder)
    assert found == files_of(tmp_path / "whole") and files_of(tmp_path / "mine") == before
    assert nano.asked() == [(number, 0, file.nbytes) for number, file in enumerate(nano.weights)]


@pytest.mark.full
def test_a_source_whose_table_the_adapter_repeats_is_downloaded_whole_to_be_compared(nano, published, tmp_path):
    """PEFT stores the whole table beside a low-rank part of it. By the headers alone it would look like another one."""
    key, random = "base_model.model.model.language_model.embed_tokens", np.random.default_rng(0)
    arrays = mx.load(str(resolve("nano") / "model.safetensors"))
    table = arrays["model.language_model.embed_tokens.weight"]
    shapes = (2, len(table)), (table.shape[1], 2)
    a, b = (mx.array(random.normal(0, 0.1, shape).astype(np.float32)) for shape in shapes)
    write_adapter(tmp_path / "mine", {"model.language_model.layers.0.mlp.up_proj.weight": Pair(b.T, a.T[:1], 1.0)})
    tensors = {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b, f"{key}.base_layer.weight": table}
    mx.save_safetensors(str(tmp_path / "mine" / "adapter_model.safetensors"), tensors)
    given = ["--adapter", str(tmp_path / "mine"), "--adapter-scale", "0.5", "--recipe", "4bit"]
    own = {"HF_ENDPOINT": published[1], "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    own |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    for name, path in (("it/nano", "hub"), (str(nano.repository.folder), "folder")):
        command = [sys.executable, "-m", "mlx_qwen35.convert", "--hf-path", name, "--mlx-path", str(tmp_path / path)]
        done = subprocess.run([*command, *given], env=os.environ | own, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "hub") == files_of(tmp_path / "folder")
    told = [json.loads((tmp_path / path / "quality.json").read_text())["adapter"] for path in ("hub", "folder")]
    assert told[0] == told[1] and told[0]["whole_tensors"] == 0


def test_the_disk_holds_one_file_of_the_source_at_a_time(nano):
    seen: list[int] = []

    def before(path: str, position: int) -> bool:
        seen.append(nano.on_disk())
        return False

    nano.repository.before = before
    nano.convert()
    sizes = [file.nbytes for file in nano.weights]
    assert 0 < max(seen) <= max(sizes) < sum(sizes) // 2  # the server is ahead of what is written
    assert nano.on_disk() == 0


def test_progress_ends_at_the_bytes_of_the_source_and_never_goes_back(nano):
    nano.convert()
    total = sum(file.nbytes for file in nano.weights)
    done = [done for done, _, _ in nano.told]
    assert done == sorted(done) and nano.told[-1][:2] == (total, total)
    assert nano.told[-1][2] == 0


def test_a_connection_that_breaks_goes_on_where_it_broke(nano, expected):
    breaks = {(nano.weights[1].path, 1 << 16), (nano.weights[1].path, 1 << 18)}

    def before(path: str, position: int) -> bool:
        found = (path, position) in breaks
        breaks.discard((path, position))
        return found

    nano.repository.before = before
    assert files_of(nano.convert())["model-00001-of-00001.safetensors"] == expected["model-00001-of-00001.safetensors"]
    size = nano.weights[1].nbytes
    assert not breaks
    assert [found for found in nano.asked() if found[0] == 1] == [(1, 0, size), (1, 1 << 16, size), (1, 1 << 18, size)]


def test_a_download_that_breaks_for_good_leaves_what_came_and_goes_on_later(nano, expected):
    nano.repository.before = lambda path, position: path == nano.weights[2].path and position == 1 << 17
    with refused("hub_failed", "it/nano"):
        nano.convert()
    assert nano.on_disk() == 1 << 17 and not nano.target.exists()
    nano.repository.before = lambda path, position: False
    nano.repository.asked.clear()
    assert files_of(nano.convert())["model-00001-of-00001.safetensors"] == expected["model-00001-of-00001.safetensors"]
    assert nano.asked() == [(2, 1 << 17, nano.weights[2].nbytes)]


def test_an_interrupted_conversion_asks_for_no_file_again_that_is_there(nano, expected):
    def tell(done: int, total: int, left: float | None) -> None:
        if left is not None and done > total * 0.55:  # within the second file
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nano.convert(tell)
    before = nano.asked()
    assert [number for number, *_ in before] == [0, 1]
    nano.convert()
    assert [number for number, start, _ in nano.asked() if start == 0] == [0, 1, 2]


def test_a_file_with_another_checksum_is_refused_and_removed(nano):
    wrong = RemoteFile(nano.weights[0].path, nano.weights[0].url, nano.weights[0].nbytes, "0" * 64)
    nano.files[nano.files.index(nano.weights[0])] = wrong
    with refused("hub_failed", "SHA-256", wrong.path):
        nano.convert()
    assert nano.on_disk() == 0


def test_another_commit_starts_anew(nano, monkeypatch):
    nano.repository.before = lambda path, position: path == nano.weights[1].path and position == 1 << 17
    with refused("hub_failed"):
        nano.convert()
    nano.repository.before = lambda path, position: False
    nano.repository.asked.clear()
    with owned(nano.target) as place:
        other = Downloads(Published("it/nano", "f" * 40, nano.files), place, nano.tell)
        plan = make_plan(other.prepare(lambda folder: None), OPTIONS)
        with refused("resume_differs"), appearing_whole(nano.target, False, True) as folder:
            write(plan, folder, supply=other)
    assert [path.name for path in place.iterdir() if path.is_dir()] == ["f" * 40]


def test_files_that_are_needed_together_are_there_together(tmp_path):
    """A weight in one file and its factors in another, then a file of its own."""
    a, b, c = (tmp_path / name for name in "abc")
    turns = supply.in_turn([frozenset({a}), frozenset({a, b}), frozenset({c}), frozenset({a})])
    assert turns == [
        ([0, 3], frozenset({a}), frozenset()), ([1], frozenset({a, b}), frozenset({a, b})),
        ([2], frozenset({c}), frozenset({c})),
    ]  # fmt: skip


def test_a_full_disk_ends_it_with_its_code_and_it_goes_on_later(nano, monkeypatch):
    write_at, count = os.pwrite, iter(range(10_000))

    def full(*given):
        if next(count) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_at(*given)

    monkeypatch.setattr(os, "pwrite", full)
    with refused("disk_full"):
        nano.convert()
    assert hidden(nano.target)[0].is_dir()
    nano.convert()
    assert nano.target.is_dir()


def test_the_4b_in_two_files_takes_the_result_and_the_larger_of_them(hollow_4b):
    plan = make_plan(hollow_4b, StorageOptions("4bit"))
    sizes = sorted(file.stat().st_size for file in hollow_4b.glob("*.safetensors"))
    needs = [frozenset(part.file for part in job.source.parts) for job in plan.jobs]
    assert most_bytes(needs) == sizes[-1]
    assert 9.0e9 < sum(sizes) < 9.6e9 and 2.8e9 < plan.nbytes < 3.4e9
    assert plan.nbytes + most_bytes(needs) < 0.8 * (plan.nbytes + sum(sizes))


@pytest.fixture(scope="module")
def hollow_4b(tmp_path_factory) -> Path:
    """The published 4B as far as headers tell, in two files of about the published sizes."""
    return hollow(tmp_path_factory.mktemp("4b") / "4b", geometry("4b"))
