"""What the package depends on: bounds that are tested, and a lock that keeps to them and trusts no address."""

import re
from pathlib import Path

import pytest
from lowest import PROJECT, lowest
from packaging.requirements import Requirement

LOCK = (Path(__file__).parent.parent / "requirements.lock").read_text()
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = [Requirement(line.rstrip(" \\")) for line in LOCK.splitlines() if re.match(r"[a-z]", line)]
WANTED = [Requirement(line) for line in [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["server"]]]
PYTHONS = ("3.11", "3.12", "3.13")
SYSTEMS = (("darwin", "Darwin", "arm64"), ("linux", "Linux", "x86_64"))


def name(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def applies(requirement: Requirement, python: str, system: tuple[str, str, str]) -> bool:
    values = dict(zip(("sys_platform", "platform_system", "platform_machine"), system, strict=True))
    values |= {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(values)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system[0])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_every_dependency_within_its_bounds(python, system):
    pins = {name(pin): next(iter(pin.specifier)).version for pin in LOCKED if applies(pin, python, system)}
    for wanted in (wanted for wanted in WANTED if applies(wanted, python, system)):
        assert wanted.specifier.contains(pins[name(wanted)]), f"{wanted}, the lock has {pins[name(wanted)]}: make lock"


def test_every_locked_version_is_exact_and_has_hashes():
    entries = re.split(r"^(?=[a-z])", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) == len(LOCKED)
    for entry, pin in zip(entries, LOCKED, strict=True):
        assert [bound.operator for bound in pin.specifier] == ["=="] and "--hash=sha256:" in entry, entry


def test_the_lock_names_no_address():
    assert not re.search(r"://|^\s*-|--(extra-)?index|--find-links| @ |\bfile:", re.sub(r"--hash=\S+", "", LOCK), re.M)


def test_every_dependency_has_a_lower_bound_to_be_tested():
    assert len(lowest()) == len(PROJECT["dependencies"])


def test_the_package_whose_inner_functions_are_called_has_an_upper_bound():
    (wanted,) = (wanted for wanted in WANTED if name(wanted) == "mlx-lm")
    assert any(bound.operator == "<" for bound in wanted.specifier)
