"""The part of a text model that one of several machines holds, cut from a checkpoint before a model is made of it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx

from mlx_qwen35.checkpoint.adapter import Adapter, Pair
from mlx_qwen35.checkpoint.checkpoint import Checkpoint
from mlx_qwen35.checkpoint.config import TextConfig
from mlx_qwen35.checkpoint.cut import cut
from mlx_qwen35.checkpoint.folder import shorten
from mlx_qwen35.checkpoint.names import TEXT, hugging_face_name
from mlx_qwen35.checkpoint.tensors import Entry
from mlx_qwen35.errors import InputError

ROWS, COLUMNS = 0, 1
_LAYERS = f"{TEXT}layers."
Value = TypeVar("Value")
Rule = tuple[int, Callable[[TextConfig], tuple[int, ...]] | None]


def _mixed(config: TextConfig) -> tuple[int, ...]:
    return config.key_dim, config.key_dim, config.value_dim  # q, k, v


# How a layer's tensors are divided over machines: by which axis, and the widths of the segments of it that are divided
# each for itself; None: the axis is one. All ranges are equal, so a machine has heads that stand side by side, and with
# key heads the value heads, or queries, that read them. What is not here, as the norms, every machine has whole.
_RULES: Mapping[str, Rule] = {
    "linear_attn.in_proj_qkv": (ROWS, _mixed),
    "linear_attn.conv1d": (ROWS, _mixed),
    "linear_attn.in_proj_z": (ROWS, None),
    "linear_attn.in_proj_a": (ROWS, None),
    "linear_attn.in_proj_b": (ROWS, None),
    "linear_attn.A_log": (ROWS, None),
    "linear_attn.dt_bias": (ROWS, None),
    "linear_attn.out_proj": (COLUMNS, None),
    "self_attn.q_proj": (ROWS, None),  # of each head the query, then the gate
    "self_attn.k_proj": (ROWS, None),
    "self_attn.v_proj": (ROWS, None),
    "self_attn.o_proj": (COLUMNS, None),
    "mlp.gate_proj": (ROWS, None),
    "mlp.up_proj": (ROWS, None),
    "mlp.down_proj": (COLUMNS, None),
}

_VOCABULARY = (f"{TEXT}embed_tokens", "lm_head")

# What each machine has as much of.
_DIVIDED = (
    "num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads", "intermediate_size",
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """What a machine holds of the text model: some of the layers, a part of each, some rows of the table of tokens.

    layers: of the model. part, parts: of the heads and the MLP's rows of each layer, this is number `part` of `parts`.
    rows: of the vocabulary, in the table and in the head.
    """

    layers: range
    rows: range
    part: int = 0
    parts: int = 1

    @classmethod
    def tensor(cls, config: TextConfig, rank: int, size: int) -> "Share":
        """Every layer, of each the heads and rows number `rank` of `size`, and as much of the vocabulary.

        Where the vocabulary does not divide, each has as many rows as the first, but the last, which has the rest.

        Raises InputError split_unfit where heads or widths do not divide.
        """
        assert 0 <= rank < size
        numbers = _divided(config)
        if odd := [f"{name} {number}" for name, number in numbers.items() if number % size]:
            raise _unfit(
                numbers.values(),
                f"heads of each kind and the width of the MLP must be multiples of the number of machines, which is "
                f"{size}; got {', '.join(odd)}",
            )
        block = -(-config.vocab_size // size)
        rows = [min(edge * block, config.vocab_size) for edge in (rank, rank + 1)]
        return cls(range(config.num_hidden_layers), range(*rows), rank, size)

    @classmethod
    def pipeline(cls, config: TextConfig, layers: range) -> "Share":
        """These layers whole. With the first layer the whole vocabulary; with others no row of it.

        Raises InputError split_unfit for a range that is empty, or not of the model.
        """
        count = config.num_hidden_layers
        if not layers or layers.step != 1 or layers.start < 0 or layers.stop > count:
            raise InputError(
                "split_unfit",
                f"a machine must hold one of the layers 0 to {count - 1} at least, and all of its layers must be side "
                f"by side; got {layers}",
            )
        return cls(layers, range(0 if layers.start else config.vocab_size))

    @classmethod
    def pipelines(cls, config: TextConfig, ranges: Sequence[range]) -> list["Share"]:
        """The shares of all machines, which hold these layers, one range each.

        Raises InputError split_unfit unless the ranges, in their order, are all layers of the model, each once.
        """
        check_machines(config, len(ranges))
        count, shares = config.num_hidden_layers, [cls.pipeline(config, layers) for layers in ranges]
        ends = [0, *(layers.stop for layers in ranges)]
        if [*(layers.start for layers in ranges), count] != ends:
            told = ", ".join(f"{layers[0]} to {layers[-1]}" for layers in ranges) or "none"
            raise InputError(
                "split_unfit", f"the machines must hold the layers 0 to {count - 1} in turn, each once; got {told}"
            )
        return shares

    def of_config(self, config: TextConfig) -> TextConfig:
        """The configuration of what is held: its layers, heads, widths and rows, as of a smaller model."""
        divided: dict[str, Any] = {name: number // self.parts for name, number in _divided(config).items()}
        kinds = config.layer_types[self.layers.start : self.layers.stop]
        return replace(config, layer_types=kinds, vocab_size=len(self.rows), **divided)

    def planned(self, config: TextConfig) -> TextConfig:
        """As `of_config`, for plans of memory. Each machine of a tensor split has the logits of the whole vocabulary.
        The first has the draft head, whose keys and values are of all heads: they count as layers of what is held.
        """
        drafting = 0 if self.layers.start or self.part else config.mtp_num_hidden_layers * self.parts
        rows = config.vocab_size if self.parts > 1 else len(self.rows)
        return replace(self.of_config(config), vocab_size=rows, mtp_num_hidden_layers=drafting)

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """A checkpoint as a smaller model's, whose tensors are cut as they are read. The vision encoder and the draft
        head stay as they are.

        Raises InputError split_unfit where columns would be cut within a group of a quantized matrix.
        """
        config = checkpoint.config
        _check_groups(config.text, checkpoint.entries, self.parts)

        def ranges(name: str, whole: Entry | mx.array) -> tuple[int, list[range]]:
            return self._ranges(config.text, name, whole.shape)

        def entries(whole: Mapping[str, Entry]) -> dict[str, Entry]:
            return {name: cut(entry, *ranges(old, entry)) for name, old, entry in self._held(whole)}

        return replace(
            checkpoint,
            config=replace(config, text=self.of_config(config.text), quantization=self._renamed(config.quantization)),
            entries=entries(checkpoint.entries), fp32_original=entries(checkpoint.fp32_original),
            replaced={
                name: _sliced(array, *ranges(old, array)) for name, old, array in self._held(checkpoint.replaced)
            },
        )  # fmt: skip

    def of_adapter(self, adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
        """The low-rank pairs beside what is held, cut alike: B as the rows are, A as the columns are. Whole tensors are
        left out: `of` cuts them with the checkpoint that they were put into. checkpoint: the whole one.
        """
        config, pairs = checkpoint.config.text, {}
        for name, old, (a, b, scale) in self._held(adapter.pairs):
            axis, ranges = self._ranges(config, old, (b.shape[0], a.shape[1]))
            a, b = (a, _sliced(b, axis, ranges)) if axis == ROWS else (_sliced(a, axis, ranges), b)
            pairs[name] = Pair(a, b, scale)
        return replace(adapter, pairs=pairs, replaced={})

    def _held(self, named: Mapping[str, Value]) -> Iterable[tuple[str, str, Value]]:
        """New and old name, and value, of what is held, of a mapping by Hugging Face names."""
        for name, value in named.items():
            if not name.startswith(_LAYERS):
                yield name, name, value
                continue
            number, dot, rest = name.removeprefix(_LAYERS).partition(".")
            if number.isdecimal() and int(number) in self.layers:
                yield f"{_LAYERS}{int(number) - self.layers.start}{dot}{rest}", name, value

    def _renamed(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """The quantization of a configuration, whose overrides are by the names of modules."""
        own = {name: value for name, value in quantization.items() if isinstance(value, dict)}
        layers = {hugging_face_name(f"{name}."): value for name, value in own.items()}
        rest = {name: value for name, value in quantization.items() if name not in own}
        return rest | {name.removesuffix("."): value for name, _, value in self._held(layers)}

    def _ranges(self, config: TextConfig, name: str, shape: Sequence[int]) -> tuple[int, list[range]]:
        """The axis of a tensor that is cut, and the ranges of it that are held. name, shape: of the whole one."""
        module = _module(name)
        if module in ("embed_tokens", "lm_head"):
            return ROWS, [self.rows]
        if module not in _RULES:
            return ROWS, [range(shape[0])]
        axis, widths = _RULES[module]
        start, ranges = 0, []
        for width in widths(config) if widths else (shape[axis],):
            own = width // self.parts
            ranges.append(range(start + self.part * own, start + (self.part + 1) * own))
            start += width
        return axis, ranges


def check_machines(config: TextConfig, machines: int) -> None:
    """InputError split_unfit where a pipeline has not a layer for each machine."""
    if machines > (count := config.num_hidden_layers):
        raise InputError(
            "split_unfit",
            f"each machine must hold a layer at least; the model has {count}, and there are {machines} machines",
            "Leave some out",
        )


def _module(name: str) -> str:
    """The module that a tensor of the text model belongs to, as mlp.up_proj, without the layer; "" for another part."""
    for suffix in (".weight", ".scales", ".biases"):
        name = name.removesuffix(suffix)
    if name.startswith(_LAYERS):
        return name.removeprefix(_LAYERS).partition(".")[2]
    return name.removeprefix(TEXT) if name in _VOCABULARY else ""


def _check_groups(config: TextConfig, entries: Mapping[str, Entry], parts: int) -> None:
    """InputError where columns would be cut within a group of a quantized matrix."""
    groups = {
        name: entry.shape[COLUMNS]
        for name, entry in entries.items()
        if name.endswith(".scales") and _RULES.get(_module(name), (ROWS, None))[0] == COLUMNS
    }
    if odd := [f"{name} {count}" for name, count in groups.items() if count % parts]:
        raise _unfit(
            [*_divided(config).values(), *groups.values()],
            f"the columns of quantized matrices must be cut between groups, so the number of groups in a row must be "
            f"a multiple of the number of machines, which is {parts}; got {shorten(odd, 2)}",
        )


def _divided(config: TextConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in _DIVIDED}


def _sliced(array: mx.array, axis: int, ranges: Sequence[range]) -> mx.array:
    """These ranges of an axis of an array, in memory of their own; the array itself for all of it."""
    if [*ranges] == [range(array.shape[axis])]:
        return array
    index = (slice(None),) * axis
    parts = [array[(*index, slice(own.start, own.stop))] for own in ranges]
    return mx.contiguous(parts[0] if len(parts) == 1 else mx.concatenate(parts, axis))


def _unfit(numbers: Iterable[int], fault: str) -> InputError:
    """The error of a number of machines that does not divide all of these numbers. It says which do."""
    common = math.gcd(*numbers)
    fit = [str(size) for size in range(2, common + 1) if common % size == 0]
    would = f"{' or '.join(fit)} machines would do" if fit else "No number of machines does"
    return InputError("split_unfit", fault, f"{would}; a split by layers (pipeline) has no such rule")
