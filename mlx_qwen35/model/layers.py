"""Layers made of a checkpoint's tensors: linear maps, the embedding, RMS norms."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.kernels.add_norm import add_norm, rms_norm
from mlx_qwen35.kernels.low_rank import ActiveAdapters, Maps
from mlx_qwen35.kernels.quantized_linear import dequantize, dequantizes, quantized_linear
from mlx_qwen35.quantization import Quantization


class Linear(nn.Module):
    """y = x W^T, W (out, in) as stored or quantized by MLX; plus a bias in the vision encoder.

    maps: the weights whose rows stand in W. Adapters know their low-rank parts by them.
    """

    def __init__(self, parts: dict[str, mx.array], quantization: Quantization | None = None, maps: Maps = ()):
        super().__init__()
        self.weight = parts["weight"]
        self.maps = maps
        if quantization:
            self.scales, self.biases = parts["scales"], parts.get("biases")
        self.quantization = quantization
        self.bias = parts.get("bias")

    @property
    def beside(self) -> list[Maps]:
        """The maps of each product beside which adapters may have low-rank parts."""
        return [self.maps]

    def __call__(self, x: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        if self.quantization is None:
            y = x @ self.weight.T
        else:
            y = quantized_linear(x, self.weight, self.scales, self.biases, self.quantization)
        y = y if self.bias is None else y + self.bias
        y = y.astype(x.dtype)  # float32 weights give float32
        return y if adapters is None else adapters.add(self.maps, x, y)


class Joined(nn.Module):
    """Linear maps of one input, as few products as their quantizations allow: their rows stand in one matrix.

    MLX quantizes each row by itself, so joining changes no value.
    """

    def __init__(self, products: list[Linear], slices: list[tuple[int, slice]]):
        super().__init__()
        self.products = products
        self.slices = slices  # for each map, the index of its product, and its outputs there

    def __call__(self, x: mx.array, adapters: ActiveAdapters | None = None) -> list[mx.array]:
        """x (..., D) -> the output of each map, in the order of their names."""
        return self.split(self.whole(x, adapters))

    def whole(self, x: mx.array, adapters: ActiveAdapters | None = None) -> list[mx.array]:
        """x (..., D) -> the products, each with the outputs of several maps side by side."""
        products: list[mx.array] = []
        for product in self.products:
            if products and product.quantization and dequantizes(x):  # in sequence: else MLX dequantizes all at once
                x = mx.depends(x, products[-1:])
            products.append(product(x, adapters))
        return products

    def split(self, products: Sequence[mx.array]) -> list[mx.array]:
        """The products -> the output of each map."""
        separate = len(self.products) == len(self.slices)
        return [products[product] if separate else products[product][..., outputs] for product, outputs in self.slices]


class Embedding(Linear):
    """A table over the vocabulary, read by row. Where it is tied it is the LM head too.

    rows: as `maps`, of the table. maps: of the head, since an adapter of the one is none of the other (PEFT).
    """

    def __init__(
        self, parts: dict[str, mx.array], quantization: Quantization | None, dtype: mx.Dtype, rows: Maps = (),
        maps: Maps = (),
    ):  # fmt: skip
        super().__init__(parts, quantization, maps)
        self.dtype, self.rows = dtype, rows

    @property
    def beside(self) -> list[Maps]:
        return [self.rows, self.maps]

    def look_up(self, tokens: mx.array, adapters: ActiveAdapters | None = None) -> mx.array:
        """tokens (B, T) integer -> (B, T, D) in the activation dtype."""
        rows = self.weight[tokens]
        if self.quantization is not None:
            biases = None if self.biases is None else self.biases[tokens]
            rows = dequantize(rows, self.scales[tokens], biases, self.quantization)
        rows = rows.astype(self.dtype)
        return rows if adapters is None else adapters.add_rows(self.rows, tokens, rows)


class RMSNorm(nn.Module):
    """x / rms(x) * gamma, in float32, rounded once to x's dtype.

    `weight` is gamma itself, float32. Zero-centred norms store gamma - 1; the sum 1 + w in bfloat16 would have 8 bits,
    the largest error of all where weights have 8 bits or more.
    """

    def __init__(self, weight: mx.array, eps: float):
        super().__init__()
        self.weight = weight
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: mx.array, added: mx.array | None) -> tuple[mx.array, mx.array]:
        """x + added, and the norm of that sum. None adds nothing."""
        return (x, self(x)) if added is None else add_norm(x, added, self.weight, self.eps)
