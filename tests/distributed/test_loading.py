"""What rank 0 does with the others' answers while a model is loaded. The other rank's answers are written here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from refusing import refused

from mlx_qwen35 import Session
from mlx_qwen35.checkpoint.adapter_choice import Chosen
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.config import FULL
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.distributed.channel import Order
from mlx_qwen35.distributed.handshake import Facts
from mlx_qwen35.distributed.loading import Spreading
from mlx_qwen35.distributed.opening import NEEDS, described, open_described, room
from mlx_qwen35.distributed.place import Place
from mlx_qwen35.distributed.ranks import Ranks
from mlx_qwen35.engine.generation import start
from mlx_qwen35.load import LoadOptions, load_given

NANO = open_checkpoint(resolve("nano"))


@dataclass
class Other:
    """A leader whose other rank says this. answers: by the name of the order."""

    said: dict[str, Mapping[str, Any]]
    given: list[Order] = field(default_factory=list)

    def give(self, order: Order) -> None:
        self.given.append(order)

    def answers(self) -> Sequence[Mapping[str, Any]]:
        return [self.said[self.given[-1].name]]

    def fail(self, error: BaseException) -> None:
        raise AssertionError("rank 0 fails behind no order here") from error


def over(**said: Mapping[str, Any]) -> tuple[Spreading, Other]:
    """nano over this rank and one that answers like it, but for what is given."""
    answers: dict[str, Mapping[str, Any]] = {
        "open": {"facts": Facts.of(NANO, Chosen()).as_json(), "dtype": "float32"},
        "load": {"weights": 7, "warned": []}, "room": {"tokens": [10**9] * len(NEEDS)}, "chunk": {"chunk": 1024},
    }  # fmt: skip
    other = Other(answers | said)
    ranks = Ranks(Place(0, 2, "ring"), cast(Any, SimpleNamespace(rank=0, size=2)), cast(Any, other), ["here", "mini"])
    return Spreading(ranks, LoadOptions("nano"), "pipeline"), other


def loaded(spreading: Spreading):
    return load_given(spreading.given, lambda done, total: None, spreading)[0]


def test_rank_0_tells_what_each_holds_in_one_split():
    spreading, other = over()
    model = loaded(spreading)
    assert model.spread and model.spread.split == "pipeline" and model.spread.weight_bytes[1] == 7
    (load,) = [order.fields for order in other.given if order.name == "load"]
    (first, second) = load["layers"]
    assert first[0] == 0 and first[1] == second[0] and second[1] == NANO.config.text.num_hidden_layers
    assert len(model.layers) == first[1] - first[0]


def test_rank_0_has_room_for_no_more_than_the_other_rank():
    whole = loaded(over()[0])
    chunk = whole.chunk(whole.config.max_position_embeddings)
    assert room(whole, chunk, whole.memory_limit)[0] > 5000
    limit = whole.memory_limit
    del whole
    small = loaded(over(room={"tokens": [5000, 5000, 9000, 9000]})[0])
    assert small.memory_limit < limit
    found = room(small, chunk, small.memory_limit)
    assert all(own <= most for own, most in zip(found, [5000, 5000, 9000, 9000], strict=True))
    assert max(found) > 3000  # and for not much less


def test_where_no_layer_of_rank_0_keeps_tokens_it_has_room_for_as_many_as_the_other_rank():
    spreading, _ = over(room={"tokens": [4000, 4000, 9600, 8800]})
    least = 6_000_000  # bytes, of which nano's table takes a part
    spreading = replace(spreading, given=replace(spreading.given, memory_limit=least / 1e9))
    model, processor = load_given(spreading.given, lambda done, total: None, spreading)
    assert FULL not in model.held.layer_types and model.memory_limit == least
    model.memory_limit = 10**10
    (request,) = start(model, processor, [[5] * 100], mtp="off").requests
    assert (request.limit, request.limited_by) == (3900, "memory")
    with refused("memory_exceeded", "4,000"):
        start(model, processor, [[5] * 100], mtp="off", max_tokens=5000)


def test_what_another_rank_warns_of_is_told_with_its_name():
    with pytest.warns(RuntimeWarning, match="mini: 1 tensor kept in float32"):
        loaded(over(load={"weights": 7, "warned": ["1 tensor kept in float32"]})[0])


def test_chunks_are_the_shortest_that_a_rank_chooses():
    spreading, other = over()
    model = loaded(spreading)
    own = model.chunk(4096)
    other.said["chunk"] = {"chunk": 48}
    assert own > 48 == model.chunk(4096)
    assert other.given[-1].fields["context"] == 4096


def test_what_another_machine_refuses_has_its_name_and_code():
    spreading, other = over(open={"refused": ["model_not_found", "there is no folder /m", "rsync /m HOST:/m"]})
    with refused("model_not_found", "mini: there is no folder /m", "rsync /m mini:/m"):
        loaded(spreading)
    assert [order.name for order in other.given] == ["open"]


def test_machines_that_differ_are_refused_before_weights_are_read():
    facts = Facts.of(NANO, Chosen()).as_json()
    spreading, other = over(open={"facts": facts | {"versions": {"mlx-qwen35": "0.0.9"}}, "dtype": "float32"})
    with refused("ranks_differ", "mini", "0.0.9"):
        loaded(spreading)
    assert [order.name for order in other.given] == ["open"]


def test_several_machines_hold_one_model_at_a_time():
    first = loaded(over()[0])
    with refused("ranks_unsupported"):
        loaded(over()[0])
    del first
    loaded(over()[0])


def test_no_session_is_saved_of_a_model_over_machines(tmp_path):
    model, processor = load_given(LoadOptions("nano"), lambda done, total: None, over()[0])
    with Session.load(tmp_path / "a", model, processor) as session, refused("ranks_unsupported"):
        session.save()
    assert not (tmp_path / "a").exists()


def test_a_folder_is_looked_for_at_the_same_path_then_in_the_home(tmp_path, monkeypatch, checkpoint_copy):
    folder: Path = checkpoint_copy()
    monkeypatch.setenv("HOME", str(folder.parent))
    told = described(LoadOptions(folder), open_checkpoint(folder), Chosen())
    assert told["model"] == [str(folder), f"~/{folder.name}"]
    assert open_described(told | {"model": ["/absent/m", f"~/{folder.name}"]}).checkpoint.folder == folder
    with refused("model_not_found", "/absent/m"):
        open_described(told | {"model": ["/absent/m", "~/absent"]})


def test_an_id_of_the_hub_is_pinned_to_the_commit_that_rank_0_has(checkpoint_copy):
    folder = checkpoint_copy()
    place = folder.parent / "snapshots" / "abc123"
    place.parent.mkdir()
    folder.rename(place)
    told = described(LoadOptions("Qwen/Qwen3.5-4B"), open_checkpoint(place), Chosen())
    assert (told["model"], told["revision"]) == (["Qwen/Qwen3.5-4B"], "abc123")
