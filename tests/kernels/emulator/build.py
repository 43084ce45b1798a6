"""From the Metal text of a launch to a shared library: rewriting into C++, checking, compiling, caching.

The compiler is clang, from the ziglang wheel. Libraries lie in the user's cache folder under the hash of everything
that goes into them, so that an unchanged kernel is compiled once on a machine.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from kernels.capture import Launch

HERE = Path(__file__).parent
RUNTIME = ("runtime.cpp", "police.cpp")
COMMON = ["-std=c++17", "-fno-sanitize=undefined", "-fno-strict-aliasing", "-fno-exceptions", "-Wno-everything"]
CHECK = ["-c", "-O0", "-DEMU_CHECK", "-Wuninitialized", "-Wsometimes-uninitialized", "-Wreturn-type", "-Werror"]
# No contraction: what means one rounding says fma. Level 3: FMA and F16C, and the same bits on all machines.
RUN = ["-c", "-O2", "-fPIC", "-mcpu=x86_64_v3", "-ffp-contract=off"]
# The police sees loads and stores of up to 16 bytes, one by one, also those that a store to the same place follows.
POLICE = ["-fsanitize=thread", "-fno-vectorize", "-fno-slp-vectorize"]
POLICE += [x for name in ("func-entry-exit=0", "read-before-write=1") for x in ("-mllvm", f"-tsan-instrument-{name}")]

VECTOR = r"(float|half|bfloat|bfloat16_t|int|uint|short|ushort|char|uchar|long|ulong)([234])"


class CompileError(Exception):
    """The compiler refused a kernel; the message is the compiler's."""


def missing() -> str:
    """Why the emulator cannot run here; empty where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the Metal emulator switches lanes with x86-64 Linux instructions"
    flags = Path("/proc/cpuinfo").read_text().split()
    if not {"avx2", "fma", "f16c"} <= set(flags):
        return "the Metal emulator compiles for processors with AVX2, FMA and F16C"
    if importlib.util.find_spec("ziglang") is None:
        return "the Metal emulator needs the compiler in the package ziglang: pip install ziglang"
    return ""


def library(launch: Launch, police: bool = False) -> Path:
    """The shared library that runs a launch. The text is checked with real address spaces first (CompileError)."""
    return compiled(translate(launch), police, CHECK)


def compiled(text: str, police: bool = False, check: Sequence[str] = ()) -> Path:
    """The shared library of a C++ text that defines emu_kernel. check: options of a compilation before, if any."""
    folder = libraries()
    target = folder / f"{_hash(text, _headers(), check, RUN, POLICE, police)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(text, police, check, Path(scratch)).rename(target)
    return target


def libraries() -> Path:
    """The folder of the compiled launches."""
    return cache_folder()


@cache
def _headers() -> str:
    return "".join(path.read_text() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp"))


def _hash(*parts: object) -> str:
    everything = repr((*parts, COMMON, importlib.metadata.version("ziglang")))
    return hashlib.sha256(everything.encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Where libraries, and what zig itself keeps, may lie; can be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "mlx-qwen35-emulator"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "mlx-qwen35-emulator"
        folder.mkdir(exist_ok=True)
    return folder


def _compile(text: str, police: bool, check: Sequence[str], folder: Path) -> Path:
    """Check and compile a translated kernel in a folder -> the library there."""
    (folder / "kernel.cpp").write_text(text)
    builds = [[*check, "-o", "check.o"]] if check else []
    builds.append([*RUN, *(POLICE if police else []), "-o", "kernel.o"])
    with ThreadPoolExecutor(len(builds)) as pool:
        list(pool.map(lambda build: _compiler(folder, "kernel.cpp", *build), builds))
    _compiler(folder, "-shared", "-nostdlib++", "kernel.o", *map(_runtime, RUNTIME), "-o", "kernel.so")
    return folder / "kernel.so"


def _runtime(name: str) -> str:
    """The compiled part of the runtime, from the cache or made now."""
    folder = cache_folder()
    target = folder / f"{name}-{_hash(_headers(), RUN)}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compiler(Path(scratch), *RUN, str(HERE / name), "-o", "runtime.o")
            (Path(scratch) / "runtime.o").rename(target)
    return str(target)


def _compiler(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "ziglang", "c++", *COMMON, f"-I{HERE}", *arguments]
    zig = str(cache_folder() / "zig")
    environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr.strip())


def translate(launch: Launch) -> str:
    """The launch's text as C++, with the function that runs one thread of it."""
    body = launch.source
    body = re.sub(r"//[^\n]*|/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n") or " ", body, flags=re.S)
    body = re.sub(r"\[\[.*?\]\]", "", body)
    body = re.sub(rf"\bstatic_cast<(vec<[^<>;]*>|{VECTOR})>\s*\(", r"\1(", body)
    body = re.sub(rf"\b(?:packed_)?{VECTOR}\s*\(", r"emu_vec<\1, \2>::make(", body)
    body = re.sub(r"\bvec<([^<>;]*)>\s*\(", r"emu_vec<\1>::make(", body)
    body = threadgroup_variables(body)
    arguments = ", ".join(_argument(launch, i) for i in range(len(launch.parameters)))
    return f"""#include "metal.h"
#line 1 "{launch.name[:60]}.metal"
{body}
#ifndef EMU_CHECK
extern "C" void emu_kernel(void** buffers, const emu_Attributes* attributes) {{
  {launch.function}({arguments});
}}
#endif
"""


def _argument(launch: Launch, index: int) -> str:
    parameter = launch.parameters[index]
    if parameter.kind != "attribute":
        kind = re.sub(r"\b(device|constant)\b", "", parameter.type)
        plain = kind.removesuffix("&").removesuffix("*")
        return f"{'*' if kind.endswith('&') else ''}({plain}*)buffers[{index}]"
    value = f"attributes->{parameter.name}"
    return f"uint3{{{value}.x, {value}.y, {value}.z}}" if parameter.type == "uint3" else value


def threadgroup_variables(body: str) -> str:
    """`threadgroup float a[4], b[2][3];` -> one EMU_THREADGROUP for each name."""
    sites = iter(range(256))

    def declared(match: re.Match[str]) -> str:
        kind, names = match.groups()
        macros = []
        for declarator in re.findall(r"\w+(?:\s*\[[^\]]*\])*", names):
            name, _, dimensions = declarator.partition("[")
            dimensions = f"[{dimensions}" if dimensions else ""
            macros.append(f"EMU_THREADGROUP({next(sites)}, {name.strip()}, ({dimensions}), {kind});")
        return " ".join(macros)

    declarator = r"\w+(?:\s*\[[^\];]*\])*"
    pattern = rf"\bthreadgroup\s+([\w:]+(?:<[^<>;]*>)?)\s+({declarator}(?:\s*,\s*{declarator})*)\s*;"
    return re.sub(pattern, declared, body)
