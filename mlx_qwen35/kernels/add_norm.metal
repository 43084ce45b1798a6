// The sum of the residual stream and what a layer adds to it, and its RMS norm, in one launch.
//
//     total = round(stream + added)      normed = round(total * rsqrt(mean(total^2) + epsilon) * gamma)
//
// Inputs: stream, added (R, WIDTH) Element; gamma (WIDTH) float32; epsilon. Outputs: total, normed (R, WIDTH) Element.
//
// Grid: THREADS threads in x, R in y; one threadgroup owns a row, thread i its elements i, i + THREADS, ...
// Numeric contract: the sum is rounded to Element before it is squared, as two separate operations round it. Squares are
// summed in float32: in a thread by rising index, then in a butterfly over its simdgroup, then over the simdgroups by
// rising index. gamma is multiplied in float32, before the one rounding.

threadgroup float partial[32];
const uint thread_index = thread_position_in_threadgroup.x;
const uint row = thread_position_in_grid.y;
const size_t first = size_t(row) * WIDTH;

float values[(WIDTH + THREADS - 1) / THREADS];
float squares = 0.0f;
#pragma clang loop unroll(full)
for (int i = 0; i < (WIDTH + THREADS - 1) / THREADS; ++i) {
  const uint at = thread_index + uint(i) * THREADS;
  values[i] = 0.0f;
  if (at < uint(WIDTH)) {
    const Element sum = Element(float(stream[first + at]) + float(added[first + at]));
    total[first + at] = sum;
    const float value = float(sum);
    values[i] = value;
    squares = fma(value, value, squares);
  }
}
#pragma clang loop unroll(full)
for (ushort step = 16; step > 0; step /= 2) {
  squares += simd_shuffle_xor(squares, step);
}
if (thread_index_in_simdgroup == 0) {
  partial[simdgroup_index_in_threadgroup] = squares;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float sum = 0.0f;
#pragma clang loop unroll(full)
for (int i = 0; i < THREADS / 32; ++i) {
  sum += partial[i];
}
const float scale = rsqrt(sum / WIDTH + epsilon);
#pragma clang loop unroll(full)
for (int i = 0; i < (WIDTH + THREADS - 1) / THREADS; ++i) {
  const uint at = thread_index + uint(i) * THREADS;
  if (at < uint(WIDTH)) {
    normed[first + at] = Element(values[i] * scale * gamma[at]);
  }
}
