"""Adapters that are served: model ids, one batch of several, prefixes in memory and on disk, unloading, figures."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import openai
import pytest
from adapters.by_hand import made, nano_with
from mlx.utils import tree_flatten
from server.test_idle import Machine, pass_
from serving import CLIENT, Running, serving

from mlx_qwen35 import generate, load
from mlx_qwen35.checkpoint.adapter_write import write_adapter
from mlx_qwen35.checkpoint.arrays import lazy_arrays
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.names import TEXT

ASK = "What is 34 + 58?"
IDS = {"nano": "base", "nano:a": "a", "nano:b": "b"}
SAID = {"nano": "92", "nano:a": "103", "nano:b": "93"}
BODY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "messages": [{"role": "user", "content": ASK}]}
SILENT: dict[str, Any] = {"reasoning_effort": "none"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(lambda: nano_with(a=made(1), b=made(2))) as running:
        yield running


def chat(running: Running, model: str | None, **fields: Any) -> dict[str, Any]:
    answer = running.post("/v1/chat/completions", BODY | SILENT | {"model": model} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


# --- ids --------------------------------------------------------------------------------------------------------------


def test_openai_python_asks_for_two_adapters_and_none_at_once_and_each_answer_is_as_alone(server):
    names = [*IDS]
    alone = {
        own: generate(server.service.model, server.service.processor, ASK, adapter=own, temp=1, seed=5, max_tokens=8,
                      enable_thinking=False)
        for own in IDS.values()
    }  # fmt: skip

    async def asked() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            given: dict[str, Any] = BODY | {"temperature": 1, "seed": 5, "reasoning_effort": "none"}
            return await asyncio.gather(*(client.chat.completions.create(**given, model=name) for name in names))

    answers = asyncio.run(asked())
    assert [answer.model for answer in answers] == names
    assert [answer.choices[0].message.content for answer in answers] == [alone[IDS[name]] for name in names]
    assert len(set(alone.values())) == 3


def test_the_ids_are_listed_with_what_they_are_beside(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [*IDS]
        assert client.models.retrieve("nano:b").id == "nano:b"
    listed = CLIENT.get(f"{server.url}/v1/models").json()["data"]
    assert [(own["root"], own["parent"]) for own in listed] == [("nano", None), ("a", "nano"), ("b", "nano")]


@pytest.mark.parametrize("name", ["nano:pirate", "b", "other:a", "nano:"])
def test_an_answer_without_an_adapter_stands_for_none_that_was_asked_for(server, name):
    answer = server.post("/v1/chat/completions", BODY | {"model": name})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert "nano, nano:a, nano:b" in answer.json()["error"]["message"]
    assert CLIENT.get(f"{server.url}/v1/models/{name}").status_code == 404


def test_a_name_with_a_colon_is_known_behind_another_model_s():
    with serving(lambda: nano_with(**{"a:7": made(1)})) as running:
        for name in ("a:7", "other:a:7"):
            assert running.post("/v1/chat/completions", BODY | {"model": name}).status_code == 404
        assert chat(running, "other:7")["model"] == "nano"
        assert content(chat(running, "nano:a:7")) == SAID["nano:a"]


@pytest.mark.parametrize("name", [None, "gpt-4o", "nano"])
def test_any_other_name_is_answered_by_the_model_alone(server, name):
    answer = chat(server, name)
    assert (content(answer), answer["model"]) == (SAID["nano"], "nano")


# --- endpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.core(1)
@pytest.mark.parametrize("model", ["nano:a", "nano:b"])
def test_every_way_to_ask_is_answered_by_the_adapter_and_names_it(server, model):
    plain = {"model": model, "temperature": 0}
    messages = BODY["messages"]
    told = {
        "messages": server.post("/v1/messages", plain | {"max_tokens": 8, "messages": messages}).json(),
        "responses": server.post(
            "/v1/responses", plain | {"input": ASK, "max_output_tokens": 300, "reasoning": {"effort": "none"}}
        ).json(),
        "chat": chat(server, model),
    }
    assert {answer["model"] for answer in told.values()} == {model}
    assert told["messages"]["content"][0]["text"] == SAID[model] == content(told["chat"])
    assert told["responses"]["output"][0]["content"][0]["text"] == SAID[model]
    text = server.post("/v1/completions", plain | {"prompt": ASK, "max_tokens": 6}).json()
    own = generate(
        server.service.model, server.service.processor, ASK, adapter=IDS[model], temp=0, max_tokens=6,
        ignore_chat_template=True,
    )  # fmt: skip
    assert (text["choices"][0]["text"], text["model"]) == (own.text, model)


@pytest.mark.core(1)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages/count_tokens", {"messages": BODY["messages"]}), ("/tokenize", {"prompt": ASK}),
        ("/tokenize", {"messages": BODY["messages"]}), ("/detokenize", {"tokens": [20, 21]}),
    ],
)  # fmt: skip
def test_what_counts_tokens_takes_every_id(server, path, body):
    counts = [server.post(path, body | {"model": name}).json() for name in IDS]
    assert counts[0] == counts[1] == counts[2]
    assert server.post(path, body | {"model": "nano:pirate"}).status_code == 404


@pytest.mark.full
def test_a_stream_names_the_adapter_in_every_chunk(server):
    asked = BODY | SILENT | {"model": "nano:b", "stream": True}
    with CLIENT.stream("POST", f"{server.url}/v1/chat/completions", json=asked) as answer:
        chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert {chunk["model"] for chunk in chunks} == {"nano:b"}
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == SAID["nano:b"]


@pytest.mark.full
def test_several_answers_to_one_prompt_have_its_adapter(server):
    answer = chat(server, "nano:a", n=3, seed=4, temperature=1.5)
    own = [
        generate(server.service.model, server.service.processor, ASK, adapter="a", temp=1.5, seed=4 + i, max_tokens=8,
                 enable_thinking=False)
        for i in range(3)
    ]  # fmt: skip
    assert [choice["message"]["content"] for choice in answer["choices"]] == own


# --- what is kept, and what is told -----------------------------------------------------------------------------------


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.full
def test_each_id_goes_on_from_what_it_has_read_itself():
    with serving(lambda: nano_with(a=made(1), b=made(2))) as running:
        assert [cached(chat(running, name)) for name in IDS] == [0, 0, 0]
        again = [chat(running, name) for name in reversed(IDS)]
        assert all(map(cached, again))
        assert [content(answer) for answer in again] == [SAID[name] for name in reversed(IDS)]


@pytest.mark.full
def test_a_server_with_other_names_finds_in_its_folder_what_each_adapter_has_read(tmp_path):
    with serving(lambda: nano_with(a=made(1), b=made(2)), session_dir=tmp_path) as running:
        assert [cached(chat(running, name)) for name in ("nano:a", "nano")] == [0, 0]
    with serving(lambda: nano_with(b=made(2), a=made(3), c=made(1)), session_dir=tmp_path) as running:
        assert [cached(chat(running, name)) > 0 for name in ("nano:b", "nano:a", "nano:c", "nano")] == [0, 0, 1, 1]


def test_log_and_metrics_name_the_adapter(server, caplog):
    before = figures(server)
    with caplog.at_level("INFO", "mlx_qwen35.server"):
        answers = [chat(server, name) for name in ("nano:b", "nano")]
    lines = [record.getMessage() for record in caplog.records if "/v1/chat" in record.getMessage()]
    assert ["adapter b" in line for line in lines] == [True, False]
    after, name = figures(server), "mlx_qwen35_generated_tokens_total"
    for series, answer in zip((f'{name}{{adapter="b"}}', name), answers, strict=True):
        assert after[series] - before.get(series, 0) == answer["usage"]["completion_tokens"]
    assert after["mlx_qwen35_adapters_bytes"] == server.service.model.adapters.nbytes > 0


def figures(running: Running) -> dict[str, float]:
    lines = CLIENT.get(f"{running.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_admission_counts_the_adapters(server):
    model = server.service.model
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert server.service.admission.plan.weights - weights == model.adapters.nbytes > 0


@pytest.mark.full
def test_what_is_loaded_again_has_the_adapters_and_changed_files_are_refused(tmp_path):
    machine = Machine()
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(tmp_path / name, made(seed).pairs)

    def loads() -> Any:
        return load("nano", adapter={name: tmp_path / name for name in ("a", "b")})

    with serving(loads, machine.given(loads), idle_unload=1, session_dir=tmp_path / "kept") as running:
        assert content(chat(running, "nano:b")) == SAID["nano:b"]
        pass_(running, machine, 61)
        assert running.service.model is None
        again = chat(running, "nano:b")
        assert content(again) == SAID["nano:b"] and machine.loads == 1
        assert cached(again) > 0  # of the folder
        pass_(running, machine, 61)
        shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
        answer = running.post("/v1/chat/completions", BODY | {"model": "nano:b"})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_changed"
        assert "adapters" in answer.json()["error"]["message"]
        shutil.rmtree(tmp_path / "b")
        answer = running.post("/v1/chat/completions", BODY)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_unavailable"


@pytest.mark.full
def test_an_adapter_with_whole_tensors_is_the_only_id(tmp_path):
    checkpoint = open_checkpoint(resolve("nano"))
    norm = lazy_arrays(checkpoint, [f"{TEXT}norm.weight"])[f"{TEXT}norm.weight"]
    write_adapter(tmp_path / "tuned", made(1).pairs)
    file = tmp_path / "tuned" / "adapter_model.safetensors"
    tensors = mx.load(str(file))
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors | {"base_model.model.model.language_model.norm.weight": norm + 0.5})
    with serving(lambda: load("nano", adapter=tmp_path / "tuned")) as running:
        assert [*running.service.models] == ["nano:tuned"] and running.service.default == "nano:tuned"
        answers = [chat(running, name) for name in ("nano:tuned", None, "gpt-4o")]
        assert {answer["model"] for answer in answers} == {"nano:tuned"}
        assert [cached(answer) > 0 for answer in answers] == [False, True, True]
        assert CLIENT.get(f"{running.url}/v1/models/nano").status_code == 404


@pytest.mark.full
def test_many_requests_of_all_ids_at_once_are_each_answered_by_its_own(server):
    names = [*IDS] * 8
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: chat(server, name), names))
    assert [content(answer) for answer in answers] == [SAID[name] for name in names]
