"""Quantization with less error than mx.quantize's, in the same format and size, so at the same speed.

mx.quantize spreads the codes of a group over all its values. Here several ranges are tried, wider and narrower, and the
scale and bias (affine) or the scale alone (fp modes) of the least squared error are kept, always as they are stored.
mx.quantize's own are among those tried: no group gets worse. Errors are those of exact arithmetic on what is stored,
scale * code + bias, as MLX's Metal kernels do it for few tokens; the rounding of the sum to 16 bits, where MLX
dequantizes first, is not counted.

All is numpy in float32, by blocks. The groups of a block lie side by side, one in each column, so that a sum over a
group is a sum of rows. No operation mixes columns and none fuses a product and a sum: the bytes depend on a group's
own values alone, not on its neighbours and not on the processor.
"""

from dataclasses import dataclass
from math import gcd

import mlx.core as mx
import numpy as np

from mlx_qwen35.quantization import Quantization

BLOCK = 1 << 19  # values; in blocks of 1 << 16 two threads, which pass Python's lock to and fro, were as slow as one
LANES = 64  # the groups of a block are a multiple of this: numpy sums a single column in another order than several

# Ranges tried for an affine group: either end is moved inwards by centre + (-1, 0, 1) * spacing steps between codes,
# and least squares follow. Best values found on Gaussian and Student-t (5 degrees of freedom) groups of 64.
_ENDS = {2: (0.55, 0.25), 3: (0.45, 0.3), 4: (0.3, 0.3), 5: (0.1, 0.4), 6: (-0.2, 0.55), 8: (-0.4, 0.6)}
# Scale codes tried for a group of an fp mode, counted from mx.quantize's own, which comes first: it stays where none is
# better. Larger scales of mxfp4 and other scales of mxfp8 were never better.
OFFSETS = {"mxfp4": (0, -1), "mxfp8": (0,), "nvfp4": (0, -2, -1, 1, 2, 3, 4, 5, 6)}

_HALF = np.float32(0.5)  # twice the largest float32 has none: ranges are taken in halves
_LEAST_SPAN = np.float32(1e-24)  # nothing is searched below; mx.quantize takes ranges below 1e-7 for none
_TINY = np.float32(1e-12)


def quantize(matrix: mx.array, quantization: Quantization, weights: np.ndarray | None = None) -> list[mx.array]:
    """The parts that mx.quantize gives, in its dtypes and layouts, with less squared error.

    matrix: (rows, columns) float32, bfloat16 or float16, finite. weights: (columns,) float32, finite, not negative:
    what a squared error in each input column counts, such as its mean square activation; None: all alike. Returns
    packed codes (rows, columns * bits / 32) uint32 and scales (rows, columns / group_size): in affine mode in the
    matrix's dtype, with biases alike; in the fp modes uint8. Each row is packed by itself.
    """
    size, affine = quantization.group_size, quantization.mode == "affine"
    groups = np.asarray(matrix.astype(mx.float32, stream=mx.cpu)).reshape(-1, size)
    across = matrix.shape[1] // size  # groups of a row
    width = min(BLOCK // size, -(-len(groups) // LANES) * LANES)  # groups of a block
    shares = None if weights is None else _shares(weights, size, width)
    search = _Affine(quantization, width, matrix.dtype) if affine else _Floating(quantization, width)
    packed = np.empty((len(groups), size * quantization.bits // 32), np.uint32)
    stored = np.empty((2 if affine else 1, len(groups)), np.float32)
    values = np.zeros((size, width), np.float32)
    with np.errstate(all="ignore"):  # what overflows or divides by zero is never the best
        for start in range(0, len(groups), width):
            count = min(width, len(groups) - start)
            values[:, :count] = groups[start : start + count].T
            first = start % across
            codes, found = search(values, None if shares is None else shares[:, first : first + width])
            packed[start : start + count] = _pack(codes, quantization.bits)[:, :count].T
            stored[:, start : start + count] = found[:, :count]
    rows, dtype = len(matrix), matrix.dtype if affine else mx.uint8
    parts = [mx.array(packed.reshape(rows, -1))]
    parts += [mx.array(part.reshape(rows, -1)).astype(dtype, stream=mx.cpu) for part in stored]
    mx.eval(parts)
    return parts


def _shares(weights: np.ndarray, group_size: int, width: int) -> np.ndarray:
    """(group_size, at least groups of a row + width): a group's weights in each column, made to add up to 1."""
    shares = weights.astype(np.float32).reshape(-1, group_size).T
    largest = shares.max(axis=0)
    shares = np.where(largest > 0, shares / np.where(largest > 0, largest, 1), 1)
    return np.tile(shares / shares.sum(axis=0), 1 + -(-width // shares.shape[1]))


def _mean(values: np.ndarray, shares: np.ndarray | None, work: np.ndarray) -> np.ndarray:
    """(group_size, width) -> (width,): the weighted mean of each column. `work` is overwritten."""
    if shares is None:
        return np.add.reduce(values, axis=0) * np.float32(1 / len(values))
    return np.add.reduce(np.multiply(values, shares, out=work), axis=0)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """(group_size, width) of whole numbers -> (words of a group, width) uint32, the first code in the lowest bits."""
    period = 32 // gcd(bits, 32)  # codes that fill whole words
    codes = codes.astype(np.uint32).reshape(-1, period, codes.shape[1])
    words = np.zeros((len(codes), period * bits // 32, codes.shape[2]), np.uint32)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= codes[:, i] << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= codes[:, i] >> np.uint32(32 - shift)
    return words.reshape(-1, codes.shape[2])


# --- affine ----------------------------------------------------------------------------------------------------------


class _Affine:
    """The search over a block of affine groups, with its working arrays.

    A group's values are seen as positions: 0 is its least value, `top` its greatest. A code c with a scale and a bias
    of positions stands for the position scale * c + bias; `step` and `least` lead from there to what is stored.
    """

    def __init__(self, quantization: Quantization, width: int, dtype: mx.Dtype):
        self.top, self.dtype = np.float32(2**quantization.bits - 1), dtype
        centre, spacing = _ENDS[quantization.bits]
        ends = (centre - spacing, centre, centre + spacing)
        ranges = [((self.top - low - high) / self.top, low) for low in ends for high in ends]
        self.scales, self.biases = np.array(ranges, np.float32).T[..., None]
        self.codes, self.rest, self.work = np.empty((3, quantization.group_size, width), np.float32)

    def __call__(self, values: np.ndarray, shares: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """values (overwritten), shares: (group_size, width) float32. Returns codes alike, and (scales, biases)."""
        low, high = values.min(axis=0), values.max(axis=0)
        least, span = low * _HALF, high * _HALF - low * _HALF
        step = np.where(span > _LEAST_SPAN, span / self.top, 1)
        self.positions = np.multiply(values, _HALF, out=values)
        self.positions -= least
        self.positions *= 1 / step
        mean, scale, code = self._search(shares)
        # The other way round the bias is the other end of the range: where that is smaller, it is stored more finely.
        scales = _as_stored(np.stack([scale, -scale]) * step * 2, self.dtype)
        biases = mean - scales * _HALF / step * np.stack([code, self.top - code])
        biases = _as_stored((least + biases * step) * 2, self.dtype)
        own = _as_stored(_own(low, high, self.top), self.dtype)
        choices = np.stack([np.vstack([own[:1], scales]), np.vstack([own[1:], biases])])
        return self.codes, self._choose(choices, least, step, shares)

    def _search(self, shares: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each group the mean position, the best scale, and the mean code that goes with it: the bias follows."""
        mean = _mean(self.positions, shares, self.work)
        squares = np.multiply(self.positions, self.positions, out=self.rest)
        whole = mean, _mean(squares, shares, self.work) - mean * mean
        ranges = zip(self.scales, self.biases, strict=True)
        moments = np.stack([self._moments(scale, bias, shares) for scale, bias in ranges], axis=1)
        error, scale, code = _least_squares(moments, self.scales, self.biases, *whole)
        best = np.argmin(error, axis=0), np.arange(len(mean))
        scale, bias = scale[best], mean - scale[best] * code[best]
        _, scale, code = _least_squares(self._moments(scale, bias, shares), scale, bias, *whole)
        return mean, scale, code

    def _choose(
        self, choices: np.ndarray, least: np.ndarray, step: np.ndarray, shares: np.ndarray | None
    ) -> np.ndarray:
        """choices: (2, any number, width), scales and biases as stored. Returns the best, (2, width), and sets `codes`.

        The first choice wins where several are equal or none gives finite values.
        """
        scales, biases = choices[0] * _HALF / step, (choices[1] * _HALF - least) / step
        errors = np.stack([self._error(*pair, shares) for pair in zip(scales, biases, strict=True)])
        errors[~np.isfinite(errors)] = np.inf  # as of a scale that is stored as zero
        best = np.argmin(errors, axis=0), np.arange(len(step))
        self._round(scales[best], biases[best])
        return choices[:, *best]

    def _round(self, scale: np.ndarray, bias: np.ndarray) -> None:
        """Set `codes` to those nearest to the positions, and `rest` to what they miss, in codes."""
        np.subtract(self.positions, bias, out=self.rest)
        np.multiply(self.rest, 1 / scale, out=self.rest)
        np.rint(self.rest, out=self.codes)
        np.clip(self.codes, 0, self.top, out=self.codes)
        np.subtract(self.rest, self.codes, out=self.rest)

    def _error(self, scale: np.ndarray, bias: np.ndarray, shares: np.ndarray | None) -> np.ndarray:
        """(width,): the mean squared error of positions."""
        self._round(scale, bias)
        return _mean(np.multiply(self.rest, self.rest, out=self.rest), shares, self.work) * (scale * scale)

    def _moments(self, scale: np.ndarray, bias: np.ndarray, shares: np.ndarray | None) -> np.ndarray:
        """(3, width): the means of rest, rest * code and rest * rest."""
        self._round(scale, bias)
        rest, share = self.rest, np.float32(1 / len(self.rest))
        if shares is not None:
            rest, share = np.multiply(self.rest, shares, out=self.work), np.float32(1)
        first = np.add.reduce(rest, axis=0)
        product = np.add.reduce(np.multiply(rest, self.codes, out=self.codes), axis=0)
        square = np.add.reduce(np.multiply(rest, self.rest, out=self.rest), axis=0)
        return np.stack([first, product, square]) * share


def _least_squares(
    moments: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error, scale and mean code of the best fit of the positions to the codes that a scale and a bias gave.

    What the codes miss is fitted, not the positions: for that float32 has digits enough at 8 bits too.
    """
    rest, product, square = moments
    code = (mean - bias) / scale - rest
    common, spread = product - rest * code, square - rest * rest
    slope = common / np.maximum(variance / (scale * scale) - 2 * common - spread, _TINY)
    return (spread - slope * common) * (scale * scale), scale * (1 + slope), code


def _own(low: np.ndarray, high: np.ndarray, top: np.float32) -> np.ndarray:
    """(2, width): mx.quantize's scale and bias, not yet rounded: the end farther from zero is exact, and zero is."""
    from_low = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale, end = np.where(from_low, scale, -scale), np.where(from_low, low, high)
    code = np.rint(end / scale)
    return np.where(code != 0, [end / code, end], [scale, np.zeros_like(end)])


def _as_stored(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """float32 values rounded to what the dtype holds, those too large to the largest that it holds."""
    greatest = np.float32(mx.finfo(dtype).max)
    values = np.clip(values, -greatest, greatest)
    if dtype == mx.float32:
        return values
    if dtype == mx.float16:
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


# --- fp modes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Format:
    """A small floating-point format: bits of the mantissa, exponent of the least normal value, greatest value."""

    mantissa: int
    exponent: int
    top: float

    def round(self, values: np.ndarray, out: np.ndarray) -> None:
        """Set `out` to the nearest values of the format, to the even one halfway. |values| <= top; overwritten."""
        powers = out.view(np.uint32)
        np.bitwise_and(values.view(np.uint32), np.uint32(0x7F800000), out=powers)  # of two, not above the values
        np.maximum(powers, np.float32(2.0**self.exponent).view(np.uint32), out=powers)
        out *= np.float32(1.5 * 2 ** (23 - self.mantissa))  # sums with this have the format's spacing
        np.add(values, out, out=values)
        np.subtract(values, out, out=out)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """The codes of values >= 0 that the format has: uint32."""
        first = np.uint32((self.exponent + 126) << self.mantissa)
        normal = (values.view(np.uint32) >> np.uint32(23 - self.mantissa)) - first
        small = values * np.float32(2.0 ** (self.mantissa - self.exponent))
        return np.where(values < np.float32(2.0**self.exponent), small.astype(np.uint32), normal)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The values >= 0 of codes: float32."""
        whole, part = codes >> self.mantissa, codes & ((1 << self.mantissa) - 1)
        part = part + ((whole > 0) << self.mantissa)
        return np.ldexp(part.astype(np.float32), np.maximum(whole, 1) - 1 + self.exponent - self.mantissa)


_E2M1, _E4M3 = _Format(1, 0, 6), _Format(3, -6, 448)


class _Floating:
    """The search over a block of groups of an fp mode, with its working arrays."""

    def __init__(self, quantization: Quantization, width: int):
        self.format, self.sign = (_E4M3, 7) if quantization.bits == 8 else (_E2M1, 3)
        self.mode, self.offsets = quantization.mode, np.array(OFFSETS[quantization.mode])[:, None]
        self.scaled, self.rounded, self.work = np.empty((3, quantization.group_size, width), np.float32)

    def __call__(self, values: np.ndarray, shares: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """values, shares: (group_size, width) float32. Returns codes of that shape, and (1, width), codes of scales."""
        own = self._own(np.maximum(values.max(axis=0), -values.min(axis=0)))
        codes = np.clip(own + self.offsets, 1, 126 if self.mode == "nvfp4" else 254)
        scales = _E4M3.decode(codes) if self.mode == "nvfp4" else np.ldexp(np.float32(1), codes - 127)
        errors = np.stack([self._error(values, scale, shares) for scale in scales]) * (scales / scales[0]) ** 2
        errors[~np.isfinite(errors)] = np.inf
        best = np.argmin(errors, axis=0), np.arange(len(own))
        self._round(values, scales[best])
        found = self.format.encode(np.abs(self.rounded, out=self.rounded))
        signed = np.signbit(values)
        if self.format is _E2M1:
            signed &= found != 0  # MLX writes -0 in 8 bits and not in 4
        return found | signed.astype(np.uint32) << np.uint32(self.sign), codes[best][None]

    def _own(self, greatest: np.ndarray) -> np.ndarray:
        """The codes of mx.quantize's scales, from the greatest magnitudes."""
        ratio = greatest / np.float32(self.format.top)
        if self.mode == "nvfp4":
            rounded = np.empty_like(ratio)
            _E4M3.round(np.minimum(ratio, np.float32(_E4M3.top)), rounded)
            return _E4M3.encode(rounded).astype(np.int64)
        part, exponent = np.frexp(ratio)  # the power of two not below the ratio; 1 for a group of zeros
        return np.where(ratio > 0, exponent - (part == 0.5), 0) + 127

    def _round(self, values: np.ndarray, scale: np.ndarray) -> None:
        """Set `scaled` to values / scale, and `rounded` to the nearest values of the format."""
        np.divide(values, scale, out=self.scaled)
        np.clip(self.scaled, -self.format.top, self.format.top, out=self.work)
        self.format.round(self.work, self.rounded)

    def _error(self, values: np.ndarray, scale: np.ndarray, shares: np.ndarray | None) -> np.ndarray:
        """(width,): the mean squared error of values / scale."""
        self._round(values, scale)
        rest = np.subtract(self.scaled, self.rounded, out=self.rounded)
        return _mean(np.multiply(rest, rest, out=rest), shares, self.work)
