"""mlx_qwen35.bench --serve: what it asks, counts and says. No timing is asserted."""

import json
import re
from pathlib import Path
from threading import Barrier

import mlx.core as mx
import pytest

from mlx_qwen35.bench import main
from mlx_qwen35.bench.measure import OURS, ProgramError
from mlx_qwen35.bench.scatter import NOT_MEASURABLE
from mlx_qwen35.bench.serve import Reply, Run, Server, Settings, measure
from mlx_qwen35.bench.serve_model import add_tokenizer, prepared
from mlx_qwen35.bench.serve_report import format_tables, summarize
from mlx_qwen35.checkpoint.checkpoint import open_checkpoint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.load import stored_dtype
from mlx_qwen35.prompt.tokenizer import load_tokenizer

SETTINGS = Settings(prompt_tokens=9, answer_tokens=3, clients=(1, 2), repeats=2, dtype="float32", requests=2, turns=3)


class FakeServer:
    """Answers like a server, and notes what it was asked."""

    def __init__(self, name: str, fails_after: int = 1000):
        self.name, self.fails_after, self.asked = name, fails_after, list[list[dict[str, str]]]()

    def ask(self, messages: list[dict[str, str]], tokens: int) -> Reply:
        if len(self.asked) >= self.fails_after:
            raise ProgramError(self.name, "out of paper")
        self.asked.append(list(messages))
        return Reply(1.0, 2.0, "so", 10 * len(messages), 4, tokens)


def measured(*servers: FakeServer) -> tuple[list[Run], dict[str, str]]:
    failures: dict[str, str] = {}
    return measure(servers, SETTINGS, failures, lambda line: None), failures  # type: ignore[arg-type]


def run_of(program: str, round: int, seconds: float, first: float, clients: int = 2, cached: int = 0) -> Run:
    return Run(program, clients, round, seconds, (Reply(first, 1.0, "so", 10, cached, 4),) * 4)


def test_every_server_gets_the_same_prompts_each_of_digits_and_never_twice():
    servers = FakeServer(OURS), FakeServer("a")
    runs, failures = measured(*servers)
    assert not failures and {run.program for run in runs} == {OURS, "a"}
    assert sorted(map(str, servers[0].asked)) == sorted(map(str, servers[1].asked))
    alone = [messages[0]["content"] for messages in servers[0].asked if len(messages) == 1]
    assert len(alone) == len(set(alone)) and all(text.isdigit() and len(text) == 9 for text in alone)


def test_each_client_asks_so_often_in_a_round_and_the_session_sends_all_before_it():
    runs, _ = measured(server := FakeServer(OURS))
    assert [(run.clients, len(run.replies)) for run in runs] == [(1, 2), (1, 2), (2, 4), (2, 4), (0, 3), (0, 3)]
    one, two, three = server.asked[-3:]
    assert two[:1] == one and three[:3] == two and three[1] == {"role": "assistant", "content": "so"}
    assert [run.tokens_read for run in runs[-2:]] == [90 - 12] * 2  # 10, 30 and 50, of each 4 were kept


def test_clients_ask_at_the_same_time():
    server = FakeServer(OURS)
    both = Barrier(2)

    def ask(messages: list[dict[str, str]], tokens: int) -> Reply:
        both.wait(timeout=30)  # breaks where one client waits for the other
        return Reply(1.0, 2.0, "so", 10, 0, tokens)

    server.ask = ask  # type: ignore[method-assign]
    settings = Settings(9, 3, clients=(2,), repeats=1, dtype="float32", turns=0)
    assert len(measure([server], settings, {}, lambda line: None)[0].replies) == 4  # type: ignore[list-item]


def test_a_server_that_fails_is_named_and_the_others_go_on():
    runs, failures = measured(FakeServer(OURS), FakeServer("a", fails_after=5))
    assert failures == {"a": "out of paper"} and {run.program for run in runs} == {OURS}
    assert measured(FakeServer(OURS, fails_after=5), FakeServer("a")) == ([], {OURS: "out of paper"})


def test_ratios_are_medians_over_the_pairs_of_a_round():
    ours = [run_of(OURS, i, seconds, 1.0) for i, seconds in enumerate((1.0, 2.0, 6.0))]
    theirs = [run_of("a", i, seconds, 4.0, cached=5) for i, seconds in enumerate((4.0, 2.0, 6.0))]
    us, it = summarize([*ours, *theirs])
    assert (us.ours_requests, us.ours_first, us.ours_read) == (1, 1, 1)
    assert it.ours_requests == 1.0  # of 4, 1 and 1; the medians alone would say 2
    assert (it.ours_first, it.ours_read) == (0.25, 2.0)
    assert (it.requests_per_second, it.tokens_per_second, it.tokens_read) == (1.0, 4.0, 60)


def test_the_slowest_of_twenty_is_not_the_95th_hundredth():
    replies = tuple(Reply(float(first), 1.0, "so", 10, 0, 4) for first in range(20))
    (row,) = summarize([Run(OURS, 1, 0, 1.0, replies)])
    assert (row.first, row.first_p95) == (9.5, 18.0)


def test_the_tables_name_machine_settings_and_every_server():
    runs = [run_of(name, 0, 2.0, 0.5, clients, 5) for clients in (2, 0) for name in (OURS, "a")]
    lines = format_tables({"chip": "abacus"}, "some model", SETTINGS, summarize(runs)).splitlines()
    assert "abacus" in lines[0] and "some model, float32" in lines[1]
    assert ["a", "2", "2.00", "8.0", "0.50", "s", "0.50", "s", "1.00x", "1.00x"] in [line.split() for line in lines]
    assert ["a", "2.00", "s", "40", "20", "0.50", "s", "0.50", "s", "1.00x", "1.00x"] in [x.split() for x in lines]


@pytest.mark.full
def test_our_server_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, few = tmp_path / "all.json", ["--prompt-lengths", "9", "--decode-tokens", "20", "--repeats", "1"]
    main(["--model", "nano", "--serve", "--clients", "2", *few, "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["failures"] == {} and "mlx" in written["machine"]["versions"]
    at_once, session = written["rows"]
    assert (at_once["clients"], at_once["requests"], at_once["tokens"]) == (2, 4, 80)  # no answer ended before
    assert (session["clients"], session["requests"]) == (0, 8)
    assert 0 < session["tokens_read"] < session["prompt_tokens"]  # the turns before were kept
    assert f"\n{OURS} " in capsys.readouterr().out


def test_a_server_that_does_not_start_says_why(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ProgramError, match=r"config_missing.*ended with code 2"):
        Server(OURS, tmp_path, "float32")


def test_random_weights_get_a_tokenizer_whose_words_are_texts_that_read_as_them(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 20000}}')
    add_tokenizer(tmp_path)
    made, nano = load_tokenizer(tmp_path), load_tokenizer(resolve("nano"))
    words = list(range(991 + 128, 20000, 97))  # behind nano's tokens and the letters
    assert made.encode(made.decode(words)) == words
    assert made.encode("<|endoftext|>") == [20000] and max(made.get_vocab().values()) == 20032
    assert json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"][32]["id"] == 20032
    for text in ("What is 34 + 58?", "0123456789", "Who are you?"):
        assert made.encode(text) == nano.encode(text)


def test_weights_of_another_dtype_are_copied_in_the_one_that_all_servers_run():
    nano = resolve("nano")
    with prepared(nano, mx.bfloat16) as folder:
        assert folder == nano
    with prepared(nano, mx.float32) as folder:
        assert folder != nano and stored_dtype(open_checkpoint(folder)) == mx.float32
        assert (folder / "chat_template.jinja").read_bytes() == (nano / "chat_template.jinja").read_bytes()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nano", "--clients", "2"], "[option_no_effect]"),
        (["--model", "nano", "--serve", "--prefill-step-size", "2"], "[option_no_effect]"),
        (["--model", "nano", "--serve", "--needle", "300"], "not allowed with"),
        (["--model", "nano", "--serve", "--prompt-lengths", "2,3"], "[option_conflict]"),
        (["--model", "nano", "--serve", "--compare", "transformers"], "[option_conflict]"),
    ],
)
def test_what_would_have_no_effect_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_rounds_that_scatter_are_told_and_a_server_that_read_nothing_has_no_ratio():
    servers = {OURS: 5, "a": 10, "b": 12}  # tokens of each prompt of 10 that it says it kept
    runs = [run_of(name, i, i + 1.0, 0.5, clients=0, cached=kept) for name, kept in servers.items() for i in range(2)]
    rows = summarize(runs)
    assert [row.ours_read for row in rows] == [1, None, None] and rows[0].requests_range == (2.0, 4.0)
    text = format_tables({}, "some model", SETTINGS, rows)
    assert "rounds scatter by 67%" in text and text.count(NOT_MEASURABLE) == 5 and not re.search(r"(?<![\w~])-\d", text)
