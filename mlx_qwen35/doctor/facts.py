"""Facts of the machine and of a model on it, each a name and a line of text."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata

import mlx.core as mx

from mlx_qwen35.backend import TF32, backend, device_name, system_memory
from mlx_qwen35.budget.chunk import suitable_chunk
from mlx_qwen35.checkpoint.dtypes import dtype_name
from mlx_qwen35.doctor.check import Speed
from mlx_qwen35.kernels.attention import attention_impl
from mlx_qwen35.kernels.products import shortened
from mlx_qwen35.machine.chip import TUNED, TUNED_UP_TO, this_chip
from mlx_qwen35.model.enabled import EnabledLayers
from mlx_qwen35.model.lora import LoadedAdapter
from mlx_qwen35.model.model import Model
from mlx_qwen35.model.rotary import CHECKED, Rotary, is_exact, table_error

Facts = dict[str, str]
PACKAGES = ("mlx-qwen35", "mlx", "mlx-lm", "numpy", "tokenizers", "pillow", "av")
CONTEXTS = (4096, 32768, 131072, 262144)


def machine(memory_limit: int) -> Facts:
    """memory_limit: bytes that a model may take."""
    chip, memory = this_chip(), system_memory()
    return {
        "chip": f"{chip.name if chip else device_name(mx.cpu)}, {os.cpu_count()} cores",
        "memory": f"{memory / 1e9:.1f} GB, of which a model may use {memory_limit / 1e9:.1f} GB",
        "system": platform.platform(),
        "MLX computes on": backend().device,
        "versions": ", ".join([f"Python {platform.python_version()}", *map(_version, PACKAGES)]),
    }


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} not installed"


def settings(given: Mapping[str, str]) -> Facts:
    """The settings that MLX reads when it starts. given: the environment before this command changed it."""
    products = "operands rounded to 10 bits of mantissa" if shortened() else "full precision"
    found = {TF32: f"{_setting(TF32, given)}; products of float32 matrices have {products}"}
    if this_chip() is None:
        return found | {name: "does not apply: there is no Apple GPU" for name in TUNED}
    return found | {name: _setting(name, given, f" on M1 to M{TUNED_UP_TO}") for name in TUNED}


def _setting(name: str, given: Mapping[str, str], where: str = "") -> str:
    """The value of a setting, and who set it."""
    if name not in os.environ:
        return "MLX's own"
    return f"{os.environ[name]}, set by " + ("you" if name in given else f"mlx_qwen35's commands{where}")


def dtype(chosen: mx.Dtype, stored: mx.Dtype, asked: str | None) -> str:
    """The dtype of activations and unquantized weights, and why."""
    name = dtype_name(chosen)
    if asked:
        return f"{name}, as asked for"
    if backend().slow_half:
        return f"{name}: the CPU computes in 16-bit types 10 to 40 times slower"
    if chosen != stored:
        return f"{name}: this chip has no arithmetic for bfloat16"
    return f"{name}, as the weights are stored"


def adapters(model: Model) -> Facts:
    """The adapters of a model, a line each; none where it has none."""
    loaded = [model.adapters[name] for name in model.adapters.names]
    return {
        f"adapter {own.name}": f"{own.path}, of {own.format}, rank {own.rank}, "
        + ", ".join(
            [*(what for what, has in _changes(own).items() if has), f"fingerprint {own.fingerprint[:12]}"]
        )
        for own in loaded
    } | ({"memory of adapters": f"{model.adapters.nbytes / 1e6:.1f} MB"} if loaded else {})


def _changes(adapter: LoadedAdapter) -> dict[str, bool]:
    """What an adapter has beside low-rank parts of the text model."""
    return {"whole tensors": adapter.whole, "of the vision encoder too": adapter.sees,
            "of the draft head too": adapter.drafts}  # fmt: skip


def speed(found: Speed, scale: float) -> Facts:
    """scale: the layers of the whole model, in those measured."""
    prompt, decode = found.per_second(scale)
    whole = "" if scale == 1 else f" for a model of {scale:g} times these layers, which is an estimate"
    wide = ", ".join(f"{cost:.2f}" for cost in found.wide(scale))
    return {
        "prefill": f"{prompt:.1f} tokens a second, of a prompt of {found.prompt}{whole}",
        "decoding": f"{decode:.1f} tokens a second{whole}",
        "steps of 2, 3, 4 tokens": f"{wide} times a step of one; with drafts a step must give more tokens than that",
        "peak memory": f"{found.peak_bytes / 1e9:.3f} GB by MLX's count",
    }


def verdict(enabled: dict[str, EnabledLayers], found: Speed | None, scale: float) -> Facts:
    """Whether all is well, and the speed if it was measured. enabled: the layers of each kernel. scale: of `speed`."""
    wrong = [
        f"the kernel {name} runs in none of {layers.of} layers"
        for name, layers in enabled.items()
        if backend().fused_kernels and layers.of and not layers.layers
    ]
    if this_chip() and not backend().watchdog:
        wrong.append("MLX computes on the CPU, and this Mac's GPU is faster")
    if shortened():
        wrong.append(f"products of float32 matrices are not exact, since {TF32} is not 0")
    state = f"Not all is well: {'; '.join(wrong)}." if wrong else f"All is well: MLX computes on {backend().device}."
    if found is None:
        return {"state": state}
    prompt, decode = found.per_second(scale)
    whole = "" if scale == 1 else ", an estimate for the 4B in 4 bit"
    return {"state": state, "speed": f"Measured: {decode:.1f} tokens a second, {prompt:.1f} of a prompt{whole}."}


def kernels(enabled: dict[str, EnabledLayers]) -> Facts:
    """The layers in which each kernel runs."""
    if not backend().fused_kernels:
        return dict.fromkeys(enabled, f"does not apply: MLX computes on {backend().device}, by its own operations")
    return {
        name: f"{'agrees with its reference' if found.layers else 'switched off'}; runs in {found}"
        for name, found in enabled.items()
    }


def rotary(rotary: Rotary) -> Facts:
    """How exact cosines and sines of far positions are, and where the table is computed."""
    errors = [f"{table_error(rotary.config, [position]):.1e} at {position:,}" for position in CHECKED]
    place = backend().device if is_exact(rotary.config, mx.default_device().type) else "the CPU"
    return {"rotary table": f"computed on {place}; {backend().device} is off by {', '.join(errors)}"}


def prefill(model: Model) -> Facts:
    """The chunk length for some contexts, and how attention is computed."""
    config, dtype, limit, kv = model.config, model.dtype, model.memory_limit, model.kv
    contexts = [S for S in CONTEXTS if config.max_position_embeddings >= S]
    lengths = [f"{suitable_chunk(config, dtype, limit, S, kv):,} up to a context of {S:,}" for S in contexts]
    impls = {
        "cpu": "in tiles of queries, by our own code",
        "fused": "without writing scores out where they would be many",
        "tiles": "in tiles of queries, whose scores are written out",
    }
    return {
        "tokens prefilled at a time": "; ".join(lengths),
        "attention over many queries": impls[attention_impl(config.head_dim, dtype)],
    }
