"""A run as a whole, on nano: interrupted and resumed, ended early, refused, broken by its own numbers."""

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image
from refusing import refused

from mlx_qwen35.checkpoint.adapter import read_adapter
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.train import Trained, Training, TrainOptions, Watcher, train
from mlx_qwen35.train.order import Order
from mlx_qwen35.train.rows import open_rows
from mlx_qwen35.train.state import RunFolder

OPTIONS = {"epochs": 1, "accumulate": 1, "learning_rate": 0.01, "rank": 2, "validate_every": 2, "targets": "down_proj"}


def write_rows(folder: Path, split: str, texts: Sequence[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def data(tmp_path) -> Path:
    write_rows(tmp_path / "data", "train", ["one two", "two three four", "three", "four five"])
    write_rows(tmp_path / "data", "valid", ["one two three", "five six"])
    return tmp_path / "data"


def run(
    data: Path, out: Path, resume: bool = False, watchers: Sequence[Watcher] = (), dtype: str | None = None, **options
) -> Trained:
    own = TrainOptions(**OPTIONS | options)
    return train("nano", data, out, own, dtype=dtype, report=False, resume=resume, watchers=watchers)


def bytes_of(out: Path) -> tuple[bytes, bytes]:
    return (out / "adapter_model.safetensors").read_bytes(), (out / "run" / "log.jsonl").read_bytes()


class Stopper(Watcher):
    """Raises an exception in the middle of a step, or in its validation."""

    def __init__(self, what: str, error: type[BaseException] = KeyboardInterrupt):
        self.what, self.error = what, error

    def moves(self, training: Training, what: str, done: int, total: int) -> None:
        if what == self.what:
            raise self.error


@pytest.mark.core(1)
@pytest.mark.parametrize("at", ["step 3", "step 1", "step 2"])
def test_interrupted_and_resumed_is_not_interrupted_byte_for_byte(tmp_path, data, at):
    whole = run(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "parts", watchers=[Stopper(at)])
    assert [path.name[-13:-12] for path in RunFolder(tmp_path / "parts").states] == [str(int(at[-1]) - 1)]
    resumed = run(data, tmp_path / "parts", resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert [step.step for step in resumed.run.steps] == [1, 2, 3, 4]
    assert (resumed.tokens, resumed.targets) == (whole.tokens, whole.targets)


def test_each_step_trains_its_rows(tmp_path, data, nano):
    seen = [step.tokens for step in run(data, tmp_path / "out", epochs=2, accumulate=3).run.steps]
    lengths = open_rows(data, "train", nano, 2048).lengths
    order = Order(lengths, 1, 3, 0)
    assert seen == [sum(lengths[i] for batch in order[step] for i in batch) for step in range(4)]
    assert sum(seen) == 2 * sum(lengths)


@pytest.mark.full
def test_interrupted_in_a_validation_it_makes_that_step_again(tmp_path, data):
    run(data, tmp_path / "whole")
    with pytest.raises(SystemExit):
        run(data, tmp_path / "parts", watchers=[Stopper("validation", SystemExit)])  # before the first step
    run(data, tmp_path / "parts", resume=True)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


@pytest.mark.full
def test_rows_with_images_are_trained_and_their_embeddings_are_kept(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{number}.png")
    rows = [
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": f"{number}.png"}]},
            {"role": "assistant", "content": "a wall"},
        ]}
        for number in range(2)
    ]  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained = run(folder, tmp_path / "out", epochs=20, batch_size=2, validate_every=None)
    losses = [step.loss for step in trained.run.steps]
    assert trained.run.counts["train"].images == 2 and losses[-1] < 0.7 * losses[0]
    assert len(list((tmp_path / "out" / "run" / "images").iterdir())) == 2


@pytest.mark.full
def test_a_run_that_has_ended_is_resumed_without_another_step(tmp_path, data):
    ended = run(data, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    again = run(data, tmp_path / "out", resume=True, watchers=[Stopper("step 1")])
    assert bytes_of(tmp_path / "out") == before and again.run.steps == ended.run.steps and again.peak == ended.peak


@pytest.mark.full
def test_a_run_goes_on_without_its_log_and_says_what_is_lost(tmp_path, data, capsys):
    whole = run(data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out", watchers=[Stopper("step 3")])
    (tmp_path / "out" / "run" / "log.jsonl").unlink()
    again = run(data, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out")[0] == bytes_of(tmp_path / "whole")[0] and again.steps == 4
    assert [step.step for step in again.run.steps] == [3, 4] and "lost 2 of 4 steps" in again.run.ended
    assert again.run.steps[-1].loss == whole.run.steps[-1].loss and "log.jsonl has lost 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "options", "facts"),
    [
        ("option_no_effect", {"patience": 2}, ["patience=2", "1 validations", "4 steps"]),
        ("option_no_effect", {"epochs": 0.5, "patience": 1}, ["patience=1", "0 validations"]),
        ("option_conflict", {"warmup": 4}, ["warmup", "4 steps"]),
    ],
)
def test_options_without_effect_on_a_run_are_refused(tmp_path, data, code, options, facts):
    with refused(code, *facts):
        run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_end_a_run_and_leave_what_was_saved(tmp_path, data):
    wild = {"alpha": 1e4, "learning_rate": 10, "clip": 0, "optimizer": "sgd", "save_every": 1, "validate_every": 9}
    with refused("loss_not_finite", "step 1", "learning_rate"):
        run(data, tmp_path / "out", dtype="float16", **wild)
    arrays = mx.load(str(RunFolder(tmp_path / "out").states[-1]))
    assert arrays and all(mx.isfinite(array).all().item() for array in arrays.values())
    read_adapter(tmp_path / "out", open_checkpoint(resolve("nano")))
    with refused("loss_not_finite", "No state"):
        run(data, tmp_path / "unsaved", dtype="float16", **wild | {"save_every": 9})
    assert not RunFolder(tmp_path / "unsaved").check(resume=False)  # nothing to go on with, and free for another run


def test_validation_without_a_lower_loss_ends_a_run_and_the_best_adapter_is_kept(tmp_path, data):
    trained = run(data, tmp_path / "out", epochs=2, validate_every=1, patience=2, learning_rate=1)
    losses = [own.loss for own in trained.run.validations]
    best = losses.index(min(losses))
    assert len(trained.run.steps) == best + 2 < 8 and trained.run.best == best
    adapter = read_adapter(tmp_path / "out", open_checkpoint(resolve("nano")))
    state = mx.load(str(RunFolder(tmp_path / "out").states[-1]))
    assert adapter.pairs and all(
        mx.array_equal(pair.b, state[f"best|{name}|b"]) and not mx.array_equal(pair.b, state[f"parameters|{name}|b"])
        for name, pair in adapter.pairs.items()
    )
    assert "lowest" in trained.kept and trained.run.ended.startswith("Validation")


def test_another_run_and_other_data_are_not_gone_on_with(tmp_path, data):
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "out", watchers=[Stopper("validation")])
    with refused("resume_differs", "rank was 2 and is 3", "seed was 0 and is 1"):
        run(data, tmp_path / "out", resume=True, rank=3, seed=1, save_every=1)
    with refused("target_refused", "out"):
        run(data, tmp_path / "out")
    write_rows(data, "train", ["another text"])
    with refused("resume_differs", "train.jsonl"):
        run(data, tmp_path / "out", resume=True)


def test_what_cannot_be_done_is_refused_before_the_folder_is_made(tmp_path, data):
    for code, options in (
        ("option_invalid", {"targets": ["lora"]}),
        ("adapter_not_found", {"from_adapter": str(tmp_path / "none"), "rank": None, "targets": None}),
        ("adapter_unsupported", {"targets": ["embed_tokens"], "adapter_format": "mlx-lm"}),
    ):
        with refused(code):
            run(data, tmp_path / "out", **options)
    (data / "valid.jsonl").unlink()
    with refused("option_no_effect", "patience"):
        run(data, tmp_path / "out", patience=1)
    with refused("data_missing"):
        run(tmp_path / "none", tmp_path / "out")
    with refused("model_not_found"):
        train(tmp_path / "none", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
