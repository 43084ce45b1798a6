"""mlx_qwen35.doctor --pair: what it advises and refuses from what was found, and what it finds with real processes."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen35.budget.splitting import PIPELINE, TENSOR
from mlx_qwen35.cache.kv_format import UNQUANTIZED
from mlx_qwen35.checkpoint.checkpoint import Checkpoint, open_checkpoint
from mlx_qwen35.checkpoint.fingerprint import fingerprint
from mlx_qwen35.checkpoint.hub import resolve
from mlx_qwen35.checkpoint.random import geometry, write_headers
from mlx_qwen35.convert.planned import planned
from mlx_qwen35.convert.recipes import StorageOptions
from mlx_qwen35.distributed import survey
from mlx_qwen35.distributed.survey import Facts, Question, Surveyed, Times, read_rate
from mlx_qwen35.doctor import main
from mlx_qwen35.doctor.command import show
from mlx_qwen35.doctor.pair import Paired
from mlx_qwen35.doctor.pair_show import as_json, sections
from mlx_qwen35.doctor.pair_ways import ONE, Found, Way, advised, milliseconds, reason, ways

HOSTS = ("this machine", "mini.local")
VERSIONS = {"mlx-qwen35": "1.0", "mlx": "0.32.4", "Python": "3.12.1"}


@pytest.fixture(scope="module")
def of_size(tmp_path_factory: pytest.TempPathFactory):
    """(member of the family) -> its checkpoint in 4 bit, which exists only as headers."""
    known: dict[str, Checkpoint] = {}

    def checkpoint(size: str) -> Checkpoint:
        if size not in known:
            folder = write_headers(tmp_path_factory.mktemp("headers") / size, geometry(size))
            known[size] = planned(folder, StorageOptions("4bit"))
        return known[size]

    return checkpoint


def of_mac(gigabytes: float, chip: str = "M4 Pro", **changed) -> Facts:
    facts = Facts(
        chip=f"Apple {chip}", apple=True, memory=int(gigabytes * 2**30), limit=int(gigabytes * 2**30 * 2 / 3),
        available=None, short=False, system="macOS-26.2-arm64", device="metal", versions=VERSIONS,
        backends={"ring": "", "jaccl": "rdma_ctl says disabled"}, attention_impl="fused", fingerprint="a" * 64,
        fault="",
    )  # fmt: skip
    return replace(facts, **changed)


TCP, RDMA = (0.6e-3, 0.3e-3), (30e-6, 15e-6)  # seconds of a round trip, and of a sum


def surveyed(facts: Sequence[Facts], link=TCP) -> Surveyed:
    trip, total = (Times(seconds, seconds, seconds) for seconds in link)
    return Surveyed(facts, trip, total, [1e9] * len(facts))


def found(checkpoint: Checkpoint, *facts: Facts, link=TCP, backend="ring", hosts=HOSTS, model="Qwen/27B", **given):
    told = surveyed(facts, link)
    tried = ways(Found(checkpoint, told, hosts, mx.float16, UNQUANTIZED, facts[0].limit, model))
    width = checkpoint.config.text.hidden_size
    return Paired(hosts, hosts[1:], backend, told, model, None, "float16", width, tried, given)


@pytest.fixture(scope="module")
def pipelined(of_size) -> Paired:
    """The 27B in 4 bit, which outgrows each of two Macs."""
    return found(of_size("27b"), of_mac(16), of_mac(16))


def now(paired: Paired, *facts: Facts, link=TCP, **changed) -> Paired:
    """The same with other facts, which change no way."""
    return replace(paired, surveyed=surveyed(facts, link), **changed)


# --- which way -------------------------------------------------------------------------------------------------------


def test_the_4b_needs_one_machine_and_no_command_names_two(of_size):
    paired = found(of_size("4b"), of_mac(16, "M1"), of_mac(16, "M1"), model="Qwen/Qwen3.5-4B")
    assert paired.advised.name == ONE and paired.reasons == []
    verdict = sections(paired)["verdict"]
    assert "One machine is enough, this machine" in verdict["advice"]
    assert verdict["command"] == "mlx_qwen35 chat --model Qwen/Qwen3.5-4B"


def test_what_outgrows_one_machine_is_a_pipeline_over_tcp(pipelined):
    assert pipelined.advised.name == PIPELINE and pipelined.ways[0].split is None
    verdict = sections(pipelined)["verdict"]
    assert "needs the machines together" in verdict["advice"] and "Tensor would take" in verdict["advice"]
    assert verdict["command"] == "mlx_qwen35 chat --model Qwen/27B --with mini.local"  # what auto means


def test_a_tensor_split_is_advised_over_rdma_even_where_one_machine_is_enough(of_size):
    able = {"backends": {"ring": "", "jaccl": ""}}
    paired = found(of_size("9b"), of_mac(48, **able), of_mac(48, **able), link=RDMA, backend="jaccl")
    assert paired.advised.name == TENSOR
    assert "in place of" in sections(paired)["verdict"]["advice"]
    assert paired.warnings == []


@pytest.mark.parametrize(("seconds", "name"), [(0.91, ONE), (0.89, TENSOR)])
def test_a_split_that_is_faster_by_less_than_a_tenth_is_not_worth_a_second_machine(pipelined, seconds, name):
    split = pipelined.ways[1].split
    tried = [Way(ONE, split, 1.0), Way(PIPELINE, split, 1.1), Way(TENSOR, split, seconds)]
    assert advised(tried, "jaccl").name == name


def test_what_is_faster_within_the_noise_of_the_link_is_not_worth_a_second_machine(pipelined):
    split = pipelined.ways[1].split
    for late, name in ((0.89, TENSOR), (0.91, ONE)):
        tried = [Way(ONE, split, 1.0), Way(PIPELINE, split, 1.1), Way(TENSOR, split, 0.5, late=late)]
        assert advised(tried, "jaccl").name == name


def test_over_tcp_a_pipeline_is_advised_as_auto_runs_it_and_a_faster_tensor_split_is_told(pipelined):
    split = pipelined.ways[1].split
    tried = [Way(ONE, None, 0.0, "too large"), Way(PIPELINE, split, 1.0), Way(TENSOR, split, 0.7)]
    way = advised(tried, "ring")
    assert way.name == PIPELINE and "Tensor would take 700 ms. That is computed" in reason(way, tried)
    assert "computed" not in reason(way, [*tried[:2], Way(TENSOR, split, 0.95)])
    tried[1] = Way(PIPELINE, None, 0.0, "too large")
    assert advised(tried, "ring").name == TENSOR


def test_ranks_on_one_machine_gain_nothing_by_any_link(of_size):
    paired = found(of_size("27b"), of_mac(64), of_mac(64), link=(0.0, 0.0), backend="jaccl", hosts=HOSTS[:1] * 2)
    assert paired.advised.name == ONE


@pytest.mark.parametrize(("tokens", "name"), [(8192, ONE), (7168, PIPELINE)])
def test_one_machine_without_room_for_a_useful_context_is_not_enough(pipelined, tokens, name):
    split = pipelined.ways[1].split
    alone = replace(split, plans=tuple(replace(plan, context=tokens) for plan in split.plans))
    tried = [Way(ONE, alone, 1.0), Way(PIPELINE, split, 1.1), Way(TENSOR, None, 0.0, "too large")]
    assert advised(tried, "ring").name == name
    assert name == ONE or "One machine has room for 7,168 tokens" in reason(advised(tried, "ring"), tried)


@pytest.mark.parametrize(("backend", "name"), [("ring", PIPELINE), ("jaccl", TENSOR)])
def test_of_equal_splits_the_one_that_auto_means_is_advised(pipelined, backend, name):
    split = pipelined.ways[1].split
    tried = [Way(ONE, None, 0.0, "too large"), Way(PIPELINE, split, 1.0), Way(TENSOR, split, 1.0)]
    assert advised(tried, backend).name == name


def test_the_faster_machine_alone_is_advised_where_it_is_enough(of_size):
    paired = found(of_size("4b"), of_mac(16, "M1"), of_mac(16, "M1 Max"))
    assert paired.advised.name == ONE and paired.advised.split.plans[0].machine.name == "mini.local"
    assert "mini.local" in sections(paired)["verdict"]["advice"]


def test_ranks_on_one_machine_read_weights_at_its_best_rate(of_size):
    facts = [of_mac(16, apple=False, device="cpu", attention_impl="cpu", rate=rate) for rate in (1e9, 2e9)]
    told = Found(of_size("4b"), surveyed(facts), HOSTS[:1] * 2, mx.float32, UNQUANTIZED, facts[0].limit, "4B")
    assert [told.rate(0), told.rate(1)] == [2e9, 2e9]
    assert replace(told, hosts=HOSTS).rate(0) == 1e9


def test_options_of_loading_are_in_the_command(pipelined):
    assert "--kv-bits 8" in sections(replace(pipelined, given={"kv_bits": "8"}))["verdict"]["command"]


def test_milliseconds_have_the_digits_that_matter():
    assert [milliseconds(s) for s in (1.2345, 0.0567, 0.0041, 0.00012)] == ["1,234 ms", "57 ms", "4.1 ms", "0.12 ms"]


# --- reasons and warnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlx", "mlx-qwen35"])
def test_other_versions_are_a_reason_with_both(pipelined, name):
    other = of_mac(16, versions=VERSIONS | {name: "0.1"})
    (told,) = now(pipelined, of_mac(16), other).reasons
    assert all(word in told for word in (name, VERSIONS[name], "0.1", "mini.local"))


def test_another_kind_of_processor_is_a_reason(pipelined):
    (told,) = now(pipelined, of_mac(16), of_mac(16, device="cpu")).reasons
    assert "metal here" in told and "cpu on mini.local" in told


def test_another_python_is_none(pipelined):
    assert not now(pipelined, of_mac(16), of_mac(16, versions=VERSIONS | {"Python": "3.14"})).reasons


def test_a_folder_that_is_not_there_is_a_reason_with_the_command_that_copies_it(pipelined):
    lacking = of_mac(16, fingerprint=None, fault="there is no folder /packs/27b")
    (told,) = now(pipelined, of_mac(16), lacking, model="/packs/27b", folder=Path("/packs/27b")).reasons
    assert told.endswith("rsync -aL /packs/27b/ mini.local:/packs/27b/")


@pytest.mark.parametrize(
    ("rank", "command"),
    [(1, "ssh mini.local hf download Qwen/27B --revision v1"), (0, "hf download Qwen/27B --revision v1")],
)
def test_an_id_that_is_not_there_is_a_reason_with_the_command_that_downloads_it(pipelined, rank, command):
    facts = [of_mac(16), of_mac(16)]
    facts[rank] = replace(facts[rank], fingerprint=None, fault="it is not in the hub's cache")
    (told,) = now(pipelined, *facts, given={"revision": "v1"}).reasons
    assert told.endswith(f"by: {command}")


def test_another_model_under_the_same_name_is_a_reason_with_both_fingerprints(pipelined):
    (told,) = now(pipelined, of_mac(16), of_mac(16, fingerprint="b" * 64)).reasons
    assert "a" * 12 in told and "b" * 12 in told


def test_what_fits_in_no_way_is_a_reason_for_each_split(of_size):
    paired = found(of_size("9b"), of_mac(3), of_mac(3))
    assert paired.advised is None and [PIPELINE in paired.reasons[0], TENSOR in paired.reasons[1]] == [True, True]
    assert "cannot run" in sections(paired)["verdict"]["state"]
    assert as_json(paired)["advised"] is None


@pytest.mark.parametrize(("trip", "warns"), [(2.0e-3, False), (2.1e-3, True)])
def test_a_round_trip_above_2_ms_is_taken_for_wifi(pipelined, trip, warns):
    warnings = now(pipelined, of_mac(16), of_mac(24), link=(trip, 0.3e-3)).warnings
    assert any("Wi-Fi" in text for text in warnings) is warns


def test_a_machine_that_would_swap_is_a_warning(pipelined):
    few = {"mini.local would swap": {"available": 10**9}, "is short on mini.local": {"short": True}}
    for word, facts in ((word, of_mac(24, **changed)) for word, changed in few.items()):
        assert any(word in text for text in now(pipelined, of_mac(16), facts).warnings)
    assert not now(pipelined, of_mac(16), of_mac(24, available=10**11)).warnings


def test_rdma_that_is_not_used_is_a_warning(pipelined):
    able = {"backends": {"ring": "", "jaccl": ""}}
    for facts, warns in ((able, True), ({}, False)):
        warnings = now(pipelined, of_mac(16, **able), of_mac(24, **facts)).warnings
        assert any("distributed_config" in text for text in warnings) is warns


def test_ranks_on_one_machine_share_its_memory(of_size):
    paired = found(of_size("4b"), of_mac(16), of_mac(16), hosts=HOSTS[:1] * 2)
    limits = [plan.machine.limit for plan in paired.ways[1].split.plans]
    assert limits == [of_mac(16).limit // 2] * 2
    assert paired.ways[0].split.plans[0].machine.limit == of_mac(16).limit
    assert any("trial" in text for text in paired.warnings)


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_json_has_what_the_text_has(pipelined):
    value = json.loads(json.dumps(as_json(pipelined)))
    assert value["ready"] and value["advised"]["way"] == PIPELINE
    assert [way["way"] for way in value["ways"]] == [ONE, PIPELINE, TENSOR]
    one, pipeline, _ = value["ways"]
    assert one["seconds"] is None and "does not fit" in one["why_not"]
    assert pipeline["layers"][0][1] == pipeline["layers"][1][0] and pipeline["seconds"] > 0
    assert [machine["host"] for machine in value["machines"]] == list(HOSTS)


def test_times_are_the_median_the_best_and_the_95th_of_a_hundred():
    assert Times.of([float(n) for n in range(100, 0, -1)]) == Times(51.0, 1.0, 96.0)


@pytest.mark.core(1)
@pytest.mark.parametrize("quantization", [None, (64, 4, "affine"), (32, 4, "mxfp4")])
def test_the_rate_of_weights_is_measured_in_the_form_of_the_model(quantization):
    assert read_rate(Question((), None, "float32", 64, 128, quantization)) > 0


def test_a_checkpoint_is_looked_for_at_each_place_and_not_downloaded(tmp_path):
    found_there, fault = survey.stored([str(tmp_path / "none"), str(resolve("nano"))], None)
    assert (found_there, fault) == (fingerprint(open_checkpoint(resolve("nano"))), "")
    missing, fault = survey.stored([str(tmp_path / "none"), "~/nothing/here"], None)
    assert missing is None and str(tmp_path / "none") in fault


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--plan", "nano"), "option_conflict"),
        (("--no-check",), "option_conflict"),
        (("--mtp",), "option_conflict"),
        (("--kv-bits", "8"), "option_no_effect"),
        (("--model", "no/such/folder"), "model_not_found"),
        (("--pair", "-oProxyCommand=x"), "option_invalid"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused_before_a_machine_is_asked(arguments, code, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--pair", "127.0.0.1", *arguments])
    assert ended.value.code == 2 and f"[{code}]" in capsys.readouterr().err


def test_in_a_terminal_lines_end_between_words_and_commands_stay_whole(pipelined, monkeypatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", screen := Screen())
    monkeypatch.setenv("COLUMNS", "60")
    show(sections(pipelined))
    lines = screen.getvalue().splitlines()
    long = [line for line in lines if len(line) > 60]
    assert long and all("chat --model" in line for line in long)
    monkeypatch.setattr(sys, "stdout", plain := io.StringIO())
    show(sections(pipelined))
    assert len(plain.getvalue().splitlines()) < len(lines)
    assert plain.getvalue().split() == screen.getvalue().split()


# --- with processes --------------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mlx_qwen35.doctor", *arguments]
    root = Path(survey.__file__).parents[2]
    path = {"PYTHONPATH": str(root)}
    return subprocess.run(
        command,
        env=os.environ | path | environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.full
def test_another_process_of_this_machine_is_measured_and_a_split_advised():
    done = run("--pair", "127.0.0.1", "--model", "nano", "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert value["ready"] and value["backend"] == "ring" and value["advised"]["way"] == ONE
    assert value["round_trip"]["best"] > 0 < value["all_sum"]["best"] and min(value["bandwidth"]) > 0
    own, other = value["machines"]
    assert own["fingerprint"] == other["fingerprint"] == fingerprint(open_checkpoint(resolve("nano")))
    assert all(way["seconds"] > 0 for way in value["ways"])


@pytest.fixture
def ssh(tmp_path: Path):
    """(script) -> a PATH whose ssh is this script; by default every machine is this one."""

    def path(script: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "ssh").write_text(f"#!/bin/bash\n{script}")
        (folder / "ssh").chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return path


REMOTE = """
for last; do :; done
export SSH_CONNECTION='127.0.0.1 1 127.0.0.1 22'
exec bash -c "$last"
"""


@pytest.mark.full
def test_a_machine_that_ssh_does_not_reach_is_named(ssh):
    done = run("--pair", "mini.local", PATH=ssh("echo 'ssh: Could not resolve hostname mini.local' >&2; exit 255"))
    assert done.returncode == 2 and "mini.local" in done.stderr and "[peer_unreachable]" in done.stderr
    assert done.stdout == ""


@pytest.mark.full
def test_machines_that_ssh_reaches_are_looked_at_by_name(ssh):
    done = run("--pair", "mini.local", "--model", "nano", PATH=ssh(REMOTE))
    assert done.returncode == 0, done.stderr
    assert "rank 1, mini.local" in done.stdout and "MB/s from rank 1 to rank 0" in done.stdout
    assert "chat --model nano" in done.stdout
