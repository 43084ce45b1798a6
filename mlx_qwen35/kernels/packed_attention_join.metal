// Attention of a few queries to quantized keys and values, second launch: the blocks of keys of each query are joined.
//
// Letters: R rows, one for each query of each head; D head size.
//
// Inputs, see packed_attention.metal
//   partial   (R, blocks, D)  float
//   tops      (R, blocks)     float
//   sums      (R, blocks)     float
//   blocks    ()              int
// Outputs
//   attended  (R, D)          Element  float, half or bfloat
//
// Grid (D, SPLITS, R): a threadgroup owns a row, thread (d, s) its dim d of the blocks s, s + SPLITS, ... by rising index.
// Numeric contract: float32 until the one rounding. A block of no keys changes no bit, so none depends on S or T.

constexpr float LOWEST = -3.0e38f;

threadgroup float split_tops[SPLITS];
threadgroup float split_sums[SPLITS];
threadgroup float split_values[SPLITS * HEAD_DIM];

const int d = int(thread_position_in_threadgroup.x);
const int split = int(thread_position_in_threadgroup.y);
const size_t row = size_t(thread_position_in_grid.z);

float top = LOWEST, sum = 0.0f, value = 0.0f;
for (int block = split; block < blocks; block += SPLITS) {
  const size_t at = row * blocks + block;
  const float other = tops[at];
  if (other > top) {
    const float fade = exp(top - other);
    top = other;
    sum *= fade;
    value *= fade;
  }
  const float weight = exp(other - top);
  sum = fma(weight, sums[at], sum);
  value = fma(weight, partial[at * HEAD_DIM + d], value);
}
split_values[split * HEAD_DIM + d] = value;
if (d == 0) {
  split_tops[split] = top;
  split_sums[split] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (split == 0) {
  for (int s = 1; s < SPLITS; ++s) {
    top = max(top, split_tops[s]);
  }
  sum = value = 0.0f;
  for (int s = 0; s < SPLITS; ++s) {
    const float weight = exp(split_tops[s] - top);
    sum = fma(weight, split_sums[s], sum);
    value = fma(weight, split_values[s * HEAD_DIM + d], value);
  }
  attended[row * HEAD_DIM + d] = Element(value / sum);
}
