"""What MLX computes on, as one object that tells by name what pays there: `backend().joins_projections`.

The current one follows MLX's default device and is asked for at each use, since a program may change the device at any
time. Everything may import this module; it imports only errors.
"""

import functools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from mlx_qwen35.errors import InputError


def remedy(reason: str, system: str, machine: str) -> str:
    """What to do where MLX cannot be imported. reason: of the ImportError."""
    if "libcuda" in reason:
        return "MLX for CUDA needs NVIDIA's driver: install it, or in a new environment mlx-qwen35[cpu]"
    if system != "Darwin":
        return "On Linux install MLX with one backend, as mlx-qwen35[cpu] or, for an NVIDIA GPU, mlx-qwen35[cuda13]"
    if machine != "arm64":
        return "MLX runs on Macs with Apple Silicon (M1 and later), and this Mac has an Intel processor"
    return "Install it again: pip install --force-reinstall mlx"


try:
    import mlx.core as mx
except ImportError as error:
    _reason = str(error).partition("\n")[0]
    raise InputError(
        "mlx_unusable", f"MLX cannot be loaded ({_reason}). {remedy(_reason, platform.system(), platform.machine())}"
    ) from None

TF32 = "MLX_ENABLE_TF32"  # environment; MLX's default is 1, which shortens float32 products (kernels/products.py)


@dataclass(frozen=True)
class Backend:
    """One of CPU, METAL and CUDA below."""

    name: str
    kernel_language: str  # what kernels/*.metal are compiled as, "metal" or "cuda"; "" where they cannot run
    compiles: bool  # mx.compile makes one launch of several elementwise operations; on the CPU it calls a C++ compiler
    joins_projections: bool  # one product instead of several saves launches; on the CPU the parts' strides cost more
    queues_layers: bool  # MLX runs ahead of the device, so prefill waits for earlier layers; on the CPU it does not
    watchdog: bool  # the system ends a command buffer that takes seconds
    slow_half: bool  # float16 and bfloat16 are 10 to 40 times slower than float32
    works_in_pieces: bool  # elementwise operations over pieces that stay in the caches beat one over all elements
    tiles_attention: bool  # kernels/cpu.py computes attention over many queries
    unpacks_for_many_rows: bool  # a product of many rows dequantizes the matrix first
    inverts_by_lapack: bool  # triangular matrices
    numpy_products: bool  # numpy's BLAS may be faster than MLX's
    usable_memory: Callable[[], int]  # bytes that a model may take
    differentiates: bool = False  # each operation has a gradient, see `gradients`

    @property
    def fused_kernels(self) -> bool:
        """Whether kernels/*.metal can run."""
        return bool(self.kernel_language)

    @property
    def device(self) -> str:
        """ "the CPU", or "the GPU" and its name."""
        return "the CPU" if self.name == "cpu" else f"the GPU, {device_name(mx.gpu)}"


def device_name(device: mx.DeviceType) -> str:
    """What MLX calls the processor (mx.cpu) or the graphics card (mx.gpu)."""
    return str(mx.device_info(device).get("device_name", platform.machine()))


def system_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_memory() -> int:
    """On a Mac what the GPU may take, since both share the memory; elsewhere all of it."""
    return _metal_memory() if mx.metal.is_available() else system_memory()


def _metal_memory() -> int:
    return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])


def _cuda_memory() -> int:
    """Nine tenths of the card's memory: the driver, cuBLAS and cuDNN take some that MLX does not count."""
    return int(mx.device_info(mx.gpu)["total_memory"]) * 9 // 10


CPU = Backend(
    "cpu", kernel_language="", compiles=False, joins_projections=False, queues_layers=False, watchdog=False,
    slow_half=True, works_in_pieces=True, tiles_attention=True, unpacks_for_many_rows=True, inverts_by_lapack=True,
    numpy_products=True, usable_memory=_cpu_memory,
)  # fmt: skip
METAL = Backend(
    "metal", kernel_language="metal", compiles=True, joins_projections=True, queues_layers=True, watchdog=True,
    slow_half=False, works_in_pieces=False, tiles_attention=False, unpacks_for_many_rows=False, inverts_by_lapack=False,
    numpy_products=False, usable_memory=_metal_memory,
)  # fmt: skip
CUDA = replace(METAL, name="cuda", kernel_language="cuda", watchdog=False, usable_memory=_cuda_memory)

_assumed: Backend | None = None
_gradients: ContextVar[bool] = ContextVar("gradients", default=False)  # of a thread: a new one begins without


def backend() -> Backend:
    """The backend of MLX's default device, or the one that `assume` has set; within `gradients` differentiable."""
    if _assumed is not None:
        current = _assumed
    elif mx.default_device() == mx.cpu:
        current = CPU
    else:
        current = METAL if mx.metal.is_available() else CUDA
    return differentiable(current) if _gradients.get() else current


@functools.cache
def differentiable(plain: Backend) -> Backend:
    """The same backend with a gradient for each operation: without kernels, which have none."""
    return replace(plain, kernel_language="", differentiates=True)


@contextmanager
def gradients(wanted: bool = True) -> Iterator[None]:
    """Compute on the differentiable backend within the block, in this thread alone; wanted False: not on it.

    What is traced for `mx.vjp` or `mx.grad` must be computed within. Operations of MLX bring their own gradients;
    where they have none, or a slow one, it is written by hand (kernels/by_hand.py).
    """
    token = _gradients.set(wanted)
    try:
        yield
    finally:
        _gradients.reset(token)


@contextmanager
def assume(assumed: Backend) -> Iterator[None]:
    """Decide as on another backend within the block, such as METAL or replace(METAL, watchdog=False).

    For tests, and to trace on any machine what another would run: MLX itself computes where it did. Not per thread.
    """
    global _assumed
    before, _assumed = _assumed, assumed
    try:
        yield
    finally:
        _assumed = before
