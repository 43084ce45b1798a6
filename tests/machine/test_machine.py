"""Chips, and settings of MLX: who sets them, and that importing a command does not start MLX before they are set."""

import os
import platform
import subprocess
import sys

import pytest

from mlx_qwen35 import load
from mlx_qwen35.console.run import as_command
from mlx_qwen35.machine import chip as machine
from mlx_qwen35.machine.chip import MEGABYTES, OPERATIONS, TUNED, CommandBuffers, command_buffers, parse_chip, tune

TIERS = ("", " Pro", " Max", " Ultra")
FAMILY = [f"Apple M{n}{tier}" for n in range(1, 6) for tier in TIERS]


@pytest.fixture
def on(monkeypatch):
    """(brand or None) -> this machine has that chip, and nothing is set for MLX."""

    def chip(brand: str | None) -> None:
        monkeypatch.setattr(machine, "this_chip", lambda: parse_chip(brand) if brand else None)
        monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("MLX_MAX")})

    return chip


def settings() -> dict[str, str]:
    return {name: os.environ[name] for name in TUNED if name in os.environ}


# --- before MLX starts -----------------------------------------------------------------------------------------------


def test_importing_every_command_starts_nothing_of_mlx():
    """Streams are numbered as they are made: one of an array computed on the way would have taken the number 0."""
    code = (
        "import mlx.core as mx, mlx_qwen35.generate.__main__, mlx_qwen35.chat, mlx_qwen35.convert.__main__\n"
        "import mlx_qwen35.bench, mlx_qwen35.doctor, mlx_qwen35.checkpoint.random\n"
        "print(mx.get_active_memory(), mx.get_peak_memory(), mx.new_stream(mx.cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=2) == ["0", "0", "Stream(Device(cpu, 0), 0)\n"]


@pytest.mark.parametrize("brand", [f"Apple M{n}{tier}" for n in range(1, 5) for tier in TIERS])
def test_commands_set_larger_command_buffers_on_m1_to_m4(on, brand):
    on(brand)
    with as_command("a command"):
        assert settings() == {OPERATIONS: "1000", MEGABYTES: "200"}


@pytest.mark.parametrize("brand", ["Apple M5", "Apple M5 Max", "Apple M12 Ultra", "Apple processor", None])
def test_nothing_is_set_on_m5_and_later_on_unknown_chips_and_off_a_mac(on, brand):
    on(brand)
    with as_command("a command"):
        assert settings() == {}


@pytest.mark.parametrize("name", list(TUNED))
def test_the_user_s_setting_wins_and_the_other_is_still_ours(on, name):
    on("Apple M1")
    os.environ[name] = "7"
    tune()
    assert settings() == {**{n: str(value) for n, value in TUNED.items()}, name: "7"}


def test_loading_a_model_in_a_program_of_one_s_own_sets_nothing(on):
    on("Apple M1")
    load("nano")
    assert settings() == {}


# --- what MLX goes by ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("brand", "number"), [("Apple M1", 40), ("Apple M3 Pro", 40), ("Apple M4 Max", 50)])
def test_mlx_s_own_command_buffers_follow_the_tier(brand, number):
    assert command_buffers(parse_chip(brand), {}) == CommandBuffers(number, number)


@pytest.mark.parametrize(
    ("text", "number"), [("1000", 1000), (" 12 ", 12), ("5x", 5), ("1e6", 1), ("-3", -3), ("many", 0), ("", 0)]
)
def test_settings_are_read_as_c_reads_numbers(text, number):
    given = command_buffers(parse_chip("Apple M1"), {OPERATIONS: text})
    assert given == CommandBuffers(number, 40)


# --- chips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("brand", FAMILY)
def test_a_brand_says_generation_and_tier(brand):
    chip = parse_chip(brand)
    assert chip.name == brand == f"Apple M{chip.generation} {chip.tier}".strip()


def test_from_m3_on_chips_compute_in_bfloat16():
    assert [n for n in range(1, 7) if parse_chip(f"Apple M{n} Pro").native_bfloat16] == [3, 4, 5, 6]


@pytest.mark.parametrize("brand", ["Apple M6", "Apple M6 Max", "Apple M20 Pro", "Apple processor", "VirtualApple", ""])
def test_an_unknown_chip_counts_as_new_and_as_slow_as_the_slowest(brand):
    chip = parse_chip(brand)
    assert chip.native_bfloat16 and chip.generation > machine.TUNED_UP_TO
    same_tier = [parse_chip(name) for name in FAMILY if parse_chip(name).tier == chip.tier]
    assert chip.flops == min(known.flops for known in same_tier)
    assert chip.bandwidth == min(known.bandwidth for known in same_tier)


@pytest.mark.parametrize(
    ("brand", "cores", "of_one"),  # GPU cores of the smallest sold, and teraflops of one, by its maker's figures
    [
        ("Apple M1", 7, 0.325), ("Apple M1 Pro", 14, 0.325), ("Apple M1 Max", 24, 0.325), ("Apple M1 Ultra", 48, 0.325),
        ("Apple M2", 8, 0.363), ("Apple M2 Pro", 16, 0.363), ("Apple M3", 8, 0.355), ("Apple M3 Pro", 14, 0.355),
        ("Apple M4", 8, 0.426), ("Apple M4 Pro", 16, 0.426),
    ],
)  # fmt: skip
def test_no_chip_is_taken_for_more_than_two_percent_faster_than_it_is(brand, cores, of_one):
    assert parse_chip(brand).flops < 1.02 * cores * of_one * 1e12


def test_larger_tiers_are_faster():
    for n in range(1, 6):
        tiers = [parse_chip(f"Apple M{n}{tier}") for tier in TIERS]
        assert [c.flops for c in tiers] == sorted({c.flops for c in tiers})
        assert [c.bandwidth for c in tiers] == sorted({c.bandwidth for c in tiers})


@pytest.mark.parametrize(
    ("system", "processor", "brand"),
    [("Darwin", "arm64", "Apple M2 Max"), ("Darwin", "arm64", ""), ("Linux", "arm64", None), ("Darwin", "i386", None)],
)
def test_the_system_is_asked_for_the_chip_on_a_mac_with_apple_silicon_alone(monkeypatch, system, processor, brand):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, f"{brand}\n", "")

    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(subprocess, "run", run)
    chip = machine.this_chip.__wrapped__()
    assert chip == (None if brand is None else parse_chip(brand or "Apple, unknown"))
    assert asked == ([] if brand is None else [["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]])
