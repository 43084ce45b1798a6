"""Which rank a process is, how machines are named, and whether they reach each other."""

import hashlib
import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from distributed.starting import REACHES, REFUSES, with_ssh
from refusing import refused

from mlx_qwen35.distributed.hosts import HERE, check_hosts, host_of, hostfile_of
from mlx_qwen35.distributed.launch import free_ports
from mlx_qwen35.distributed.place import Place, check_ring, this_place


@pytest.fixture
def ranked(monkeypatch, tmp_path):
    """(rank, addresses) -> the environment that mlx.launch makes."""

    def make(rank: int, hostfile: object) -> None:
        file = tmp_path / "hostfile"
        file.write_text(json.dumps(hostfile) if hostfile else "\n")
        monkeypatch.setenv("MLX_RANK", str(rank))
        monkeypatch.setenv("MLX_HOSTFILE", str(file))

    return make


def test_a_process_of_its_own_has_no_place():
    assert this_place() is None


def test_a_rank_of_two_knows_the_addresses_of_the_ring(ranked):
    ranked(1, [["127.0.0.1:5000"], ["127.0.0.1:5001"]])
    assert this_place() == Place(1, 2, "ring", ["127.0.0.1:5000", "127.0.0.1:5001"])


def test_one_rank_alone_is_a_process_like_any_other(ranked):
    ranked(0, None)
    assert this_place() is None
    ranked(0, [["127.0.0.1:5000"]])
    assert this_place() is None


def test_ranks_of_jaccl_are_counted_by_their_devices(ranked, monkeypatch, tmp_path):
    ranked(1, None)
    (tmp_path / "devices").write_text(json.dumps([[None, "rdma_en2"], ["rdma_en2", None]]))
    monkeypatch.setenv("MLX_IBV_DEVICES", str(tmp_path / "devices"))
    monkeypatch.setenv("MLX_JACCL_COORDINATOR", "10.0.0.1:5000")
    assert this_place() == Place(1, 2, "jaccl", [])


def test_a_backend_without_neighbours_is_refused(ranked, monkeypatch):
    ranked(0, None)
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    with refused("option_invalid"):
        this_place()


@pytest.mark.parametrize(("rank", "hostfile"), [(0, [1, 2]), (0, {"a": 1}), (2, [["a:1"], ["b:2"]]), (1, None)])
def test_a_place_that_is_none_is_refused(ranked, rank, hostfile):
    ranked(rank, hostfile)
    with refused("option_invalid", "MLX_HOSTFILE"):
        this_place()


def test_ports_of_ranks_are_none_that_systems_give_to_connections():
    assert all(10_000 <= free_ports(HERE, 3) < 32_768 for _ in range(20))
    with refused("address_unusable", "192.0.2.1"):
        free_ports("192.0.2.1", 2)


def test_a_stranger_at_a_port_is_taken_for_no_rank():
    port = free_ports(HERE, 2)
    ring = [f"{HERE}:{port}", f"{HERE}:{port + 1}"]
    with ThreadPoolExecutor() as pool, socket.socket() as stranger:
        first = pool.submit(check_ring, Place(0, 2, "ring", ring), seconds=20)
        while stranger.connect_ex((HERE, port)):
            pass
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\r\n\r\n\r\n")
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        check_ring(Place(1, 2, "ring", ring), seconds=20)
        first.result()


def test_a_neighbour_that_hangs_is_told_with_its_address():
    port = free_ports(HERE, 2)
    ring = [f"{HERE}:{port}", f"{HERE}:{port + 1}"]
    with socket.create_server((HERE, port + 1)), ThreadPoolExecutor() as pool, socket.socket() as other:
        first = pool.submit(check_ring, Place(0, 2, "ring", ring), seconds=1)
        while other.connect_ex((HERE, port)):
            pass
        other.sendall(hashlib.sha256(f"0 of {ring}".encode()).digest())
        with refused("peer_unreachable", "rank 1 has not met its neighbours", f"{HERE}:{port + 1}"):
            first.result()


def test_ranks_that_reach_each_other_go_on_together():
    port = free_ports(HERE, 3)
    ring = [f"{HERE}:{port + rank}" for rank in range(3)]
    done: list[int] = []

    def rank(number: int) -> None:
        check_ring(Place(number, 3, "ring", ring), seconds=20)
        done.append(number)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2]


def test_a_rank_that_does_not_come_is_told_with_its_address():
    port = free_ports(HERE, 2)
    with refused("peer_unreachable", "rank 1", f"{HERE}:{port + 1}"):
        check_ring(Place(0, 2, "ring", [f"{HERE}:{port}", f"{HERE}:{port + 1}"]), seconds=0.2)


def test_who_waits_in_vain_hears_of_it_at_once():
    port = free_ports(HERE, 2)

    def watch() -> None:
        raise KeyError("a rank has ended")

    with pytest.raises(KeyError):
        check_ring(Place(0, 2, "ring", [f"{HERE}:{port}", f"{HERE}:{port + 1}"]), watch)


@pytest.mark.parametrize("given", ["", "mini.local,", ",", "-oProxyCommand=x", "a b", "mini,mini", "me@mini,mini", 7])
def test_names_that_are_none_are_refused(given):
    with refused("option_invalid"):
        check_hosts("--with", given)


def test_a_machine_has_a_name_and_perhaps_a_python():
    assert host_of("me@mini.local").python == sys.executable
    assert (host_of("mini:/opt/bin/python").name, host_of("mini:/opt/bin/python").python) == ("mini", "/opt/bin/python")
    assert host_of("localhost").is_here and check_hosts("--with", f"{HERE},{HERE}") == (HERE, HERE)


def test_a_machine_that_ssh_reaches_is_met_at_the_address_that_ssh_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", with_ssh(tmp_path, REACHES)["PATH"])
    found = hostfile_of(["me@mini.local"])
    assert found.as_json()["hosts"] == [
        {"ssh": HERE, "ips": [HERE], "rdma": []}, {"ssh": "me@mini.local", "ips": [HERE], "rdma": []},
    ]  # fmt: skip
    assert (tmp_path / "hosts").read_text() == "me@mini.local\n"


@pytest.mark.parametrize(
    ("ssh", "word", "told"),
    [
        (REFUSES, "mini.local", "Connection refused"),
        (REACHES, "mini.local:/nowhere/python", "no Python at /nowhere/python"),
        (REACHES, "mini.local:{bare}", "no mlx_qwen35"),
    ],
    ids=["refuses", "no python", "no package"],
)
def test_a_machine_that_lacks_something_is_named_with_what_it_lacks(tmp_path, monkeypatch, ssh, word, told):
    monkeypatch.setenv("PATH", with_ssh(tmp_path, ssh)["PATH"])
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    with refused("peer_unreachable", "mini.local", told):
        hostfile_of([word.replace("{bare}", str(bare))])


def test_a_machine_without_ssh_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("peer_unreachable", "no ssh"):
        hostfile_of(["mini.local"])


HOSTS = [{"ssh": "a", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"]},
         {"ssh": HERE, "ips": ["10.0.0.2"], "rdma": ["rdma_en2", None]}]  # fmt: skip


def test_a_file_of_distributed_config_gives_devices_and_backend(tmp_path):
    file = tmp_path / "hosts.json"
    file.write_text(json.dumps({"backend": "jaccl", "envs": ["A=1"], "hosts": HOSTS}))
    found = hostfile_of([str(file)]).as_json()
    assert (found["backend"], found["envs"]) == ("jaccl", ["A=1"])
    assert [host["rdma"] for host in found["hosts"]] == [[None, "rdma_en2"], ["rdma_en2", None]]
    assert found["hosts"][0]["ssh"] == HERE  # the first is this machine


@pytest.mark.parametrize("text", ["", "[]", '{"hosts": 1}', json.dumps({"backend": "mpi", "hosts": HOSTS}),
                                  json.dumps([HOSTS[0], HOSTS[1] | {"ssh": "-oProxyCommand=x"}])])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str):
    (tmp_path / "hosts.json").write_text(text)
    with refused("option_invalid"):
        hostfile_of([str(tmp_path / "hosts.json")])
