// Attention of a few queries to quantized keys and values: what each block of keys contributes. The second launch,
// packed_attention_join.metal, joins the blocks.
//
// packed_attention.py beside this file has the definition and the launcher. This is the body of the function, MLX writes
// its signature.
//
// Letters: N key heads of all batch rows, ROWS query heads of a key head, T queries, D head size, C columns of the cache,
// of which the first S are in use. The queries are the last T of S positions. G = D / 64 groups share a scale and a bias.
//
// Inputs
//   queries       (N, ROWS, T, D)          Element  float, half or bfloat
//   key_words     (N, C, D KEY_BITS / 32)  uint     the lowest bits of a word are the first dim
//   key_scales    (N, C, G)                Element
//   key_biases    (N, C, G)                Element  a number is word scale + bias
//   value_words, value_scales, value_biases         the same of VALUE_BITS
//   columns       ()                       int      C
//   length        ()                       int      S
//   tokens        ()                       int      T
//   score_scale   ()                       float    of a query's product with a key
// Outputs, float
//   partial       (N, ROWS, T, blocks, D)  sum of exp(score - top) value over the block's keys
//   tops          (N, ROWS, T, blocks)     the largest score
//   sums          (N, ROWS, T, blocks)     sum of exp(score - top)
//
// Who owns what. Grid (32 SIMDGROUPS blocks, T, N); a threadgroup is a block of keys of a few of the queries, which share
// nothing. A lane holds eight dims of a key and of its ROWS queries, so a key takes D / 8 lanes; the lanes that hold one
// key are a stream, and the streams take the keys of a block in turn. At the end the streams of a query are joined.
//
// Numeric contract. All arithmetic is float32, keys and values are not rounded once unpacked. A block is BLOCK keys from
// a multiple of BLOCK on, whatever S and T are: the bits of a query depend on no other, and on no key behind it. A block
// that has no key for a query gives 0, with a top that no score falls below.

constexpr int LANES = HEAD_DIM / 8;           // of a stream
constexpr int KEYS = 32 / LANES;              // streams of a simdgroup
constexpr int STREAMS = KEYS * SIMDGROUPS;    // of a query
constexpr int GROUPS = HEAD_DIM / 64;
constexpr int IN_KEY_WORD = 32 / KEY_BITS;    // dims
constexpr int IN_VALUE_WORD = 32 / VALUE_BITS;
constexpr float LOWEST = -3.0e38f;

threadgroup float parts[QUERIES * STREAMS * HEAD_DIM];
threadgroup float part_tops[QUERIES * STREAMS];
threadgroup float part_sums[QUERIES * STREAMS];

const int thread_index = int(thread_position_in_threadgroup.x);
const int lane = thread_index % 32;
const int part = lane % LANES;
const int stream = thread_index / LANES;
const int block = int(threadgroup_position_in_grid.x);
const int t = int(thread_position_in_grid.y);
const int head = int(thread_position_in_grid.z);
const int T = tokens;
const int blocks = (length + BLOCK - 1) / BLOCK;
const int end = min((block + 1) * BLOCK, length - T + t + 1);

float q[ROWS][8], out[ROWS][8], top[ROWS], sum[ROWS];
#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; ++r) {
  top[r] = LOWEST;
  sum[r] = 0.0f;
  #pragma clang loop unroll(full)
  for (int j = 0; j < 8; ++j) {
    q[r][j] = score_scale * float(queries[((size_t(head) * ROWS + r) * T + t) * HEAD_DIM + part * 8 + j]);
    out[r][j] = 0.0f;
  }
}

for (int some = block * BLOCK + thread_index / 32 * KEYS; some < end; some += STREAMS) {
  const int key = some + lane / LANES;
  const size_t column = size_t(head) * columns + min(key, end - 1);
  const size_t group = column * GROUPS + part / 8;
  float k[8], v[8];
  const float key_scale = float(key_scales[group]);
  const float key_bias = float(key_biases[group]);
  #pragma clang loop unroll(full)
  for (int w = 0; w < 8 / IN_KEY_WORD; ++w) {
    const uint word = key_words[(column * LANES + part) * (8 / IN_KEY_WORD) + w];
    #pragma clang loop unroll(full)
    for (int j = 0; j < IN_KEY_WORD; ++j) {
      const uint number = word >> (j * KEY_BITS) & ((1u << KEY_BITS) - 1);
      k[w * IN_KEY_WORD + j] = fma(float(number), key_scale, key_bias);
    }
  }
  const float value_scale = float(value_scales[group]);
  const float value_bias = float(value_biases[group]);
  #pragma clang loop unroll(full)
  for (int w = 0; w < 8 / IN_VALUE_WORD; ++w) {
    const uint word = value_words[(column * LANES + part) * (8 / IN_VALUE_WORD) + w];
    #pragma clang loop unroll(full)
    for (int j = 0; j < IN_VALUE_WORD; ++j) {
      const uint number = word >> (j * VALUE_BITS) & ((1u << VALUE_BITS) - 1);
      v[w * IN_VALUE_WORD + j] = fma(float(number), value_scale, value_bias);
    }
  }
  #pragma clang loop unroll(full)
  for (int r = 0; r < ROWS; ++r) {
    float score = 0.0f;
    #pragma clang loop unroll(full)
    for (int j = 0; j < 8; ++j) {
      score = fma(q[r][j], k[j], score);
    }
    #pragma clang loop unroll(full)
    for (ushort other = LANES / 2; other > 0; other /= 2) {
      score += simd_shuffle_xor(score, other);
    }
    if (key < end) {
      if (score > top[r]) {
        const float fade = exp(top[r] - score);
        top[r] = score;
        sum[r] *= fade;
        #pragma clang loop unroll(full)
        for (int j = 0; j < 8; ++j) {
          out[r][j] *= fade;
        }
      }
      const float weight = exp(score - top[r]);
      sum[r] += weight;
      #pragma clang loop unroll(full)
      for (int j = 0; j < 8; ++j) {
        out[r][j] = fma(weight, v[j], out[r][j]);
      }
    }
  }
}

const int first = int(thread_position_in_threadgroup.y) * STREAMS;  // stream of the query in the threadgroup
#pragma clang loop unroll(full)
for (int r = 0; r < ROWS; ++r) {
  const size_t at = ((size_t(head) * ROWS + r) * T + t) * blocks + block;
  #pragma clang loop unroll(full)
  for (int j = 0; j < 8; ++j) {
    parts[(first + stream) * HEAD_DIM + part * 8 + j] = out[r][j];
  }
  if (part == 0) {
    part_tops[first + stream] = top[r];
    part_sums[first + stream] = sum[r];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float joined = LOWEST;
  for (int s = 0; s < STREAMS; ++s) {
    joined = max(joined, part_tops[first + s]);
  }
  for (int d = thread_index; d < HEAD_DIM; d += 32 * SIMDGROUPS) {
    float total = 0.0f;
    for (int s = 0; s < STREAMS; ++s) {
      total = fma(exp(part_tops[first + s] - joined), parts[(first + s) * HEAD_DIM + d], total);
    }
    partial[at * HEAD_DIM + d] = total;
  }
  if (thread_index == 0) {
    float total = 0.0f;
    for (int s = 0; s < STREAMS; ++s) {
      total = fma(exp(part_tops[first + s] - joined), part_sums[first + s], total);
    }
    tops[at] = joined;
    sums[at] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
