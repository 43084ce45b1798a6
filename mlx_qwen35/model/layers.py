"""What a checkpoint's tensors become: linear maps, the embedding, RMS norms."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.kernels.add_norm import add_norm, rms_norm
from mlx_qwen35.kernels.quantized_linear import quantized_linear, unpacks
from mlx_qwen35.quantization import Quantization


class Linear(nn.Module):
    """y = x W^T, with W (out, in) as it is or packed by MLX, plus a bias in the vision tower."""

    def __init__(self, parts: dict[str, mx.array], packing: Quantization | None = None):
        super().__init__()
        self.weight = parts["weight"]
        if packing:
            self.scales, self.biases = parts["scales"], parts.get("biases")
        self.packing = packing
        self.bias = parts.get("bias")

    def __call__(self, x: mx.array) -> mx.array:
        if self.packing is None:
            y = x @ self.weight.T
        else:
            y = quantized_linear(x, self.weight, self.scales, self.biases, self.packing)
        y = y if self.bias is None else y + self.bias
        return y.astype(x.dtype)  # weights that were kept in float32 give float32


class Joined(nn.Module):
    """Linear maps that read the same input, those packed alike as one product: their rows stand in one matrix.

    Each row of a packed matrix is packed by itself, so joining changes no value. A map packed otherwise is a product of
    its own.
    """

    def __init__(self, products: list[Linear], places: list[tuple[int, slice]]):
        super().__init__()
        self.products = products
        self.places = places  # of each map: which product, and which of its outputs

    def __call__(self, x: mx.array) -> list[mx.array]:
        """x (..., D) -> the output of each map, in the order in which they were named."""
        return self.split(self.whole(x))

    def whole(self, x: mx.array) -> list[mx.array]:
        """The products as they come, each with the outputs of several maps side by side."""
        products: list[mx.array] = []
        for product in self.products:
            if products and product.packing and unpacks(x):  # one after the other, or all matrices are unpacked first
                x = mx.depends(x, products[-1:])
            products.append(product(x))
        return products

    def split(self, products: Sequence[mx.array]) -> list[mx.array]:
        whole = len(self.products) == len(self.places)  # then there is nothing to cut
        return [products[product] if whole else products[product][..., outputs] for product, outputs in self.places]


class Embedding(Linear):
    """A table over the vocabulary: looked up on the way in, and where it is tied, multiplied by on the way out."""

    def __init__(self, parts: dict[str, mx.array], packing: Quantization | None, dtype: mx.Dtype):
        super().__init__(parts, packing)
        self.dtype = dtype

    def look_up(self, tokens: mx.array) -> mx.array:
        """tokens (B, T) integer -> (B, T, D) in the activation dtype."""
        if self.packing is None:
            return self.weight[tokens].astype(self.dtype)
        biases = None if self.biases is None else self.biases[tokens]
        form = {"group_size": self.packing.group_size, "bits": self.packing.bits, "mode": self.packing.mode}
        return mx.dequantize(self.weight[tokens], self.scales[tokens], biases, **form).astype(self.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * gamma, in float32, rounded once to x's dtype.

    `weight` is gamma itself, 1 + w for the zero-centred norms, formed and kept in float32: rounded to bfloat16 the sum
    would keep 8 bits, the largest error of all where weights have 8 bits or more.
    """

    def __init__(self, weight: mx.array, eps: float):
        super().__init__()
        self.weight = weight
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: mx.array, added: mx.array) -> tuple[mx.array, mx.array]:
        """x + added, and its norm."""
        return add_norm(x, added, self.weight, self.eps)
