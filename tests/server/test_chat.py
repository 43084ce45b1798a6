"""POST /v1/chat/completions over a real socket."""

from serving import Running

QUESTION = [{"role": "user", "content": "What is 34 + 58?"}]


def test_a_question_is_answered(nano_server: Running) -> None:
    answer = nano_server.post("/v1/chat/completions", {"messages": QUESTION, "temperature": 0}).json()
    assert answer["choices"][0]["message"]["content"] == "92"
