"""Files of rows: what is read, cut, counted and refused, and that a file is never in memory."""

import json
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refusing import refused
from talks import TOOLS, answer, call, result, user

from mlx_qwen35 import Processor
from mlx_qwen35.media.options import VisionOptions
from mlx_qwen35.train.rows import RowFile, open_rows, rows_of

ROW = {"prompt": "a", "completion": "b"}


def write(folder: Path, *rows: Any, split: str = "train") -> Path:
    """A folder with these rows; text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def train(folder: Path, processor: Processor, max_length: int = 1000, **options: Any) -> RowFile:
    rows = open_rows(folder, "train", processor, max_length, **options)
    assert rows is not None
    return rows


def picture(folder: Path, name: str, shade: int = 100, size: tuple[int, int] = (96, 64)) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, (shade, 50, 200)).save(folder / name)
    return folder / name


def test_forms_are_told_apart_row_by_row(tmp_path: Path, nano: Processor):
    rows = train(write(tmp_path, ROW, {"messages": [user("c"), answer("d")]}, "", {"text": "e f"}), nano)
    assert [row.line for row in rows] == [1, 2, 4]
    assert [nano.decode(row.tokens[-2:]) for row in rows] == ["b<|im_end|>", "d<|im_end|>", " f<|im_end|>"]


def test_a_row_is_the_same_whenever_it_is_asked_for(tmp_path: Path, nano: Processor):
    talk = {"messages": [user("ä"), answer("b"), user("c"), answer("d", "r")]}
    rows = train(write(tmp_path, ROW, talk, "  ", ROW), nano)
    assert [rows[i] for i in (3, 1, 2, 0)] == [list(rows)[i] for i in (3, 1, 2, 0)]
    assert [row.line for row in rows] == [1, 2, 2, 4]
    assert rows.lengths.tolist() == [len(row.tokens) for row in rows]
    assert rows.targets.tolist() == [sum(row.targets) for row in rows]


def test_rows_are_the_same_from_a_file_and_from_a_program(tmp_path: Path, nano: Processor):
    given = [ROW, {"messages": [user("a"), answer("b", "r")]}]
    told, read = rows_of(given, nano, 1000), train(write(tmp_path, *given), nano)
    assert list(told) == list(read) and told.fingerprint == read.fingerprint


def test_only_the_training_rows_must_be_there(tmp_path: Path, nano: Processor):
    write(tmp_path, ROW, split="valid")
    assert open_rows(tmp_path, "test", nano, 100) is None
    assert len(open_rows(tmp_path, "valid", nano, 100) or ()) == 1
    with refused("data_missing", "train.jsonl", "valid.jsonl"):
        open_rows(tmp_path, "train", nano, 100)


@pytest.mark.parametrize("path", ["none", "train.jsonl"])
def test_data_must_be_a_folder(tmp_path: Path, nano: Processor, path: str):
    write(tmp_path, ROW)
    with refused("data_missing", tmp_path / path, "Hugging Face"):
        open_rows(tmp_path / path, "train", nano, 100)


@pytest.mark.parametrize("lines", [[""], ["", "  "]])
def test_a_file_without_rows_is_refused(tmp_path: Path, nano: Processor, lines: list[str]):
    with refused("data_missing", "train.jsonl"):
        train(write(tmp_path, *lines), nano)


BROKEN = {
    "cut": '{"text": "a',
    "a list": "[",
    "an object over several lines": "{",
    "a number": "3",
    "twice the same name": '{"text": "a", "text": "b"}',
    "no number of JSON": '{"text": "a", "x": NaN}',
    "two objects": '{"text": "a"} {"text": "b"}',
    "too deep": '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_line_that_is_no_object_is_refused_by_its_number(tmp_path: Path, nano: Processor, name: str):
    with refused("data_invalid", "train.jsonl, line 3"):
        train(write(tmp_path, ROW, "", BROKEN[name]), nano)


def test_a_place_in_a_broken_line_is_a_character_of_that_line(tmp_path: Path, nano: Processor):
    with refused("data_invalid", "line 2", "at character 10"):
        train(write(tmp_path, ROW, '{"text": x}'), nano)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path, nano: Processor):
    write(tmp_path, ROW)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with refused("data_invalid", "line 1"):
        train(tmp_path, nano)


def test_a_byte_order_mark_and_line_ends_of_windows_are_skipped(tmp_path: Path, nano: Processor):
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a b"}\r\n\r\n{"text": "c d"}')
    rows = train(tmp_path, nano)
    assert [(row.line, nano.decode(row.tokens)) for row in rows] == [(1, "a b<|im_end|>"), (3, "c d<|im_end|>")]


def test_a_file_that_changes_after_the_check_is_refused(tmp_path: Path, nano: Processor):
    rows = train(write(tmp_path, ROW, {"text": "some words"}), nano)
    write(tmp_path, ROW, {"text": "some longer words"})
    with refused("data_invalid", "line 2"):
        rows[1]


def test_fingerprints_tell_data_apart(tmp_path: Path, nano: Processor):
    picture(tmp_path, "a.png", 1), picture(tmp_path, "b.png", 2)
    shown = [{**ROW, "images": [name]} for name in ("a.png", "b.png")]
    given = [[ROW], [ROW, ROW], [{**ROW, "completion": "c"}], [shown[0]], [shown[1]]]
    assert len({rows_of(rows, nano, 100, folder=tmp_path).fingerprint for rows in given}) == 5
    assert rows_of([ROW], nano, 100).fingerprint != rows_of([ROW], nano, 100, mask_prompt=False).fingerprint


# --- cutting ---------------------------------------------------------------------------------------------------------


def test_a_long_row_is_cut_at_its_end_and_counted(nano: Processor):
    whole = rows_of([{"prompt": "a", "completion": "b " * 50}], nano, 1000)
    rows = rows_of([{"prompt": "a", "completion": "b " * 50}, ROW], nano, 30)
    assert (len(rows[0].tokens), rows[0].cut) == (30, len(whole[0].tokens) - 30)
    assert rows[0].tokens == whole[0].tokens[:30] and rows[0].targets == whole[0].targets[:30]
    assert (rows.report.cut, rows.report.skipped, rows.report.longest) == (1, 0, len(whole[0].tokens))


def test_a_row_whose_targets_are_all_cut_is_left_out_and_counted(nano: Processor):
    rows = rows_of([ROW, {"prompt": "a " * 50, "completion": "b"}], nano, 30)
    assert [row.line for row in rows] == [1] and rows.report.skipped == 1


def test_a_file_whose_rows_are_all_left_out_is_refused(nano: Processor):
    with refused("data_missing", "2 tokens"):
        rows_of([ROW], nano, 2)


def test_what_stands_behind_the_last_target_is_not_trained(nano: Processor):
    """A cut that leaves an earlier answer takes what comes between it and the cut one too."""
    called = answer("", tool_calls=[call("weather", {"city": "x"})])
    given = {"messages": [user("a"), called, result("c " * 50), answer("d")], "tools": TOOLS}
    (whole,) = rows_of([given], nano, 1000)
    (row,) = rows_of([given], nano, len(whole.tokens) - 20)
    assert nano.decode(row.tokens[-2:]) == "</tool_call><|im_end|>"
    assert row.tokens == whole.tokens[: len(row.tokens)] and row.cut == len(whole.tokens) - len(row.tokens) > 50


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_no_cut_goes_through_an_image(tmp_path: Path, nano: Processor, mask_prompt: bool):
    """Nor through a video, which has text between its placeholders."""
    picture(tmp_path, "a.png")
    part = {"type": "image", "image": "a.png"}
    video = {"type": "video", "video": np.zeros((8, 64, 64, 3), np.uint8), "source_fps": 2, "fps": 2}
    row = {"messages": [user([part]), answer("b"), user([video, part]), answer("c")]}
    whole = list(rows_of([row], nano, 1000, folder=tmp_path, mask_prompt=mask_prompt))
    for limit in range(2, len(whole[-1].tokens) + 1, 2 if mask_prompt else 7):
        try:
            rows = list(rows_of([row], nano, limit, folder=tmp_path, mask_prompt=mask_prompt))
        except ValueError:  # no targets
            continue
        for own in rows:
            pads = sum(token in nano.placeholder_ids for token in own.tokens)
            assert pads == sum(placed.media.tokens for placed in own.media) and len(own.tokens) <= limit


# --- images ----------------------------------------------------------------------------------------------------------


FORMS = {
    "a part": {"messages": [user([{"type": "image", "image": "p/a.png"}, {"type": "text", "text": "?"}]), answer("b")]},
    "a part with a path": {
        "messages": [user([{"type": "image", "path": "p/a.png"}, {"type": "text", "text": "?"}]), answer("b")]},
    "a URL of a path": {"messages": [
        user([{"type": "image_url", "image_url": {"url": "p/a.png"}}, {"type": "text", "text": "?"}]), answer("b")]},
    "a column and bare parts": {
        "messages": [user([{"type": "image"}, {"type": "text", "text": "?"}]), answer("b")], "images": ["p/a.png"]},
    "a column and no part": {"messages": [user("?"), answer("b")], "images": ["p/a.png"]},
    "a column and tags": {"messages": [user("<image>?"), answer("b")], "images": ["p/a.png"]},
    "one image": {"messages": [user("?"), answer("b")], "image": "p/a.png"},
    "a path of a table": {"messages": [user("?"), answer("b")], "image": {"path": "p/a.png", "bytes": None}},
    "a prompt": {"prompt": "?", "completion": "b", "images": ["p/a.png"]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_an_image_is_found_beside_the_file(tmp_path: Path, nano: Processor, name: str):
    path = picture(tmp_path / "p", "a.png")
    (row,) = train(write(tmp_path, FORMS[name]), nano)
    asked = [{"type": "image", "image": str(path)}, {"type": "text", "text": "?"}]
    prompt = nano.encode_messages([user(asked)], enable_thinking=False)
    assert row.tokens[: len(prompt.tokens)] == prompt.tokens
    assert [placed.media.digest for placed in row.media] == [placed.media.digest for placed in prompt.media]


def test_images_of_a_column_go_to_their_places_in_order(tmp_path: Path, nano: Processor):
    for shade in (1, 2, 3):
        picture(tmp_path, f"{shade}.png", shade)
    talk = [user([{"type": "image"}, {"type": "text", "text": "x"}, {"type": "image"}]), answer("b"),
            user([{"type": "image"}]), answer("c")]  # fmt: skip
    tagged = [user("<image>x<image>"), answer("b"), user("<image>"), answer("c")]
    names = ["1.png", "2.png", "3.png"]
    rows, same = (list(rows_of([{"messages": m, "images": names}], nano, 500, folder=tmp_path)) for m in (talk, tagged))
    assert [[int(placed.media.pixels[0, 0, 0, 0]) for placed in row.media] for row in rows] == [[1, 2], [1, 2, 3]]
    assert [row.tokens for row in rows] == [row.tokens for row in same]


def test_a_text_may_show_images_too(tmp_path: Path, nano: Processor):
    picture(tmp_path, "a.png")
    (row,) = rows_of([{"text": "<|image_pad|> it is", "images": ["a.png"]}], nano, 500, folder=tmp_path)
    assert row.targets.count(False) == row.media[0].media.tokens == 2


def test_a_damaged_image_is_refused_before_the_first_step(tmp_path: Path, nano: Processor):
    path = picture(tmp_path, "a.png", size=(600, 400))
    path.write_bytes(path.read_bytes()[:-200])
    with refused("data_invalid", "line 2", "a.png"):
        train(write(tmp_path, ROW, {**ROW, "image": "a.png"}), nano)


def test_a_url_is_followed_only_where_that_is_allowed(tmp_path: Path, nano: Processor):
    data, asked = picture(tmp_path, "a.png").read_bytes(), []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        given, vision = [{**ROW, "image": url}], VisionOptions(allow_private_urls=True)
        with refused("data_invalid", url):
            rows_of(given, nano, 500, vision=vision)
        assert not asked
        rows = rows_of(given, nano, 500, vision=vision, urls=True)
        server.shutdown()
    assert rows.report.images == 1 and asked == ["/a.png"]


def test_options_of_images_hold_for_rows(tmp_path: Path, nano: Processor):
    picture(tmp_path, "a.png", size=(256, 256))
    given = [{**ROW, "image": "a.png"}]
    large, small = (
        rows_of(given, nano, 500, folder=tmp_path, vision=VisionOptions(max_pixels=n)) for n in (256**2, 64**2)
    )
    assert (large.report.visual, small.report.visual) == (64, 4)


def test_the_report_counts_what_is_trained(tmp_path: Path, nano: Processor):
    picture(tmp_path, "a.png")
    given = [{**ROW, "image": "a.png", "id": 3}, {"messages": [user("a"), answer("b", "r")], "source": "x"}, ROW]
    given[1]["messages"][0]["images"] = ["a.png"]
    rows = rows_of(given, nano, 500, folder=tmp_path)
    report = rows.report
    assert (report.lines, report.rows, report.answers, report.thinking) == (3, 3, 3, 1)
    assert (report.tokens, report.targets) == (sum(rows.lengths), sum(rows.targets))
    assert (report.images, report.visual, report.unread) == (1, 2, ("id", "messages.images", "source"))
    assert rows.shown() == [0]


def test_progress_ends_with_the_whole_file(tmp_path: Path, nano: Processor):
    seen: list[tuple[int, int]] = []
    train(write(tmp_path, ROW, ROW), nano, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == 2 and seen[-1][0] == seen[-1][1] == (tmp_path / "train.jsonl").stat().st_size


def test_a_file_takes_some_50_bytes_of_memory_a_row(tmp_path: Path, nano: Processor):
    few, many = 100, 600
    used = []
    for count in (few, many):
        folder = tmp_path / str(count)
        folder.mkdir()
        write(folder, *[{"text": "a", "about": "long " * 200}] * count)
        train(folder, nano)
        tracemalloc.start()
        rows = train(folder, nano)
        used.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(rows) == count
    assert used[1] - used[0] < 60 * (many - few)  # what other threads allocate meanwhile counts too


def test_arrays_and_pictures_of_a_program_are_images(nano: Processor):
    pixels = np.full((64, 96, 3), 7, np.uint8)
    rows = rows_of([{**ROW, "image": pixels}, {**ROW, "images": [Image.fromarray(pixels)]}], nano, 500)
    assert len({row.media[0].media.digest for row in rows}) == 1


def test_a_row_that_changes_after_it_was_checked_is_refused(tmp_path: Path, nano: Processor):
    for first, second in (({"text": "ab cd"}, {"text": "ab ce"}), (ROW, {"prompt": "a", "completion": "c"})):
        before = train(write(tmp_path, first), nano)
        write(tmp_path, second)
        assert list(train(tmp_path, nano).lengths) == list(before.lengths)
        with refused("data_invalid", "line 1", "changed"):
            before[0]


def test_an_image_that_changes_after_it_was_checked_is_refused(tmp_path: Path, nano: Processor):
    picture(tmp_path, "a.png")
    rows = train(write(tmp_path, ROW | {"image": "a.png"}), nano)
    picture(tmp_path, "a.png", shade=101)
    with refused("data_invalid", "changed"):
        rows[0]


def test_a_file_that_goes_away_is_refused(tmp_path: Path, nano: Processor):
    rows = train(write(tmp_path, ROW), nano)
    (tmp_path / "train.jsonl").unlink()
    with refused("data_missing", "train.jsonl"):
        rows[0]
