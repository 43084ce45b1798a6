// Queries and keys of an attention layer in one launch: RMSNorm of each head, then rotary embedding of its first dims.
//
// plain_norm_rotary in norm_rotary.py beside this file is the definition, norm_rotary there the launcher. This is the
// body of the function, MLX writes its signature. MLX looks for the names of thread attributes everywhere, in comments
// too, so none stands here.
//
// Letters: B batch, T tokens, H/Hk query/key heads, D head size, R dims that turn (even, up to D).
//
// Inputs
//   projected  (B, T, 2 H D + 2 Hk D)  Element  for each head its query, then its gate; all k; all v. Gates and v are
//                                               not read. Element is float, half or bfloat
//   cosines    (B or 1, 1, T, R / 2)   float    of the angle by which dim j turns with dim j + R / 2
//   sines      (B or 1, 1, T, R / 2)   float
//   q_norm     (D,)                    float    gamma itself
//   k_norm     (D,)                    float
//   tokens     ()                      int      T
//   tables     ()                      int      batch rows of cosines and sines: B, or 1 for all
//   epsilon    ()                      float
// Outputs
//   queries    (B, H, T, D)            Element
//   keys       (B, Hk, T, D)           Element
//
// Who owns what. Grid (32, H + Hk, B T): a simdgroup for each head of each token, queries first; a threadgroup is a few
// of them, which share nothing. Lane i holds the pairs (j, j + R / 2) for j = i, i + 32 ... and of the dims that do not
// turn the i-th, the (i + 32)-th ...: so both halves of a pair are in one thread, and each number is read once.
//
// Numeric contract. All arithmetic is float32. A number is rounded to Element twice, where the operations round: behind
// the norm, and behind the rotation. The sum of squares has one order: a lane's pairs, then its rest, as they come, the
// 32 lanes by a butterfly. Where a product meets a sum, the text says fma. The bits of a token do not depend on T or B.

constexpr int HALF = DIMS / 2;
constexpr int PAIRS = (HALF + 31) / 32;           // that a lane holds, the last perhaps not
constexpr int REST = (HEAD_DIM - DIMS + 31) / 32;  // dims that a lane holds, the last perhaps not
constexpr int ROW_WIDTH = 2 * (QUERY_HEADS + KEY_HEADS) * HEAD_DIM;

const int lane = int(thread_position_in_grid.x);
const int head = int(thread_position_in_grid.y);  // of queries and keys together
const int row = int(thread_position_in_grid.z);   // of the B T tokens
const int T = tokens;
const int batch = row / T;
const int t = row - batch * T;
const bool is_query = head < QUERY_HEADS;
const int own = is_query ? head : head - QUERY_HEADS;

const device Element* from =
    projected + size_t(row) * ROW_WIDTH + (is_query ? 2 * head : QUERY_HEADS + head) * HEAD_DIM;
const device float* gamma = is_query ? q_norm : k_norm;
device Element* to = is_query ? queries + ((size_t(batch) * QUERY_HEADS + own) * T + t) * HEAD_DIM
                              : keys + ((size_t(batch) * KEY_HEADS + own) * T + t) * HEAD_DIM;
const size_t angles = (size_t(tables == 1 ? 0 : batch) * T + t) * HALF;

float first[PAIRS], second[PAIRS], rest[REST > 0 ? REST : 1];
float squares = 0.0f;
#pragma clang loop unroll(full)
for (int n = 0; n < PAIRS; ++n) {
  const int j = lane + 32 * n;
  first[n] = j < HALF ? float(from[j]) : 0.0f;
  second[n] = j < HALF ? float(from[j + HALF]) : 0.0f;
  squares = fma(second[n], second[n], fma(first[n], first[n], squares));
}
#pragma clang loop unroll(full)
for (int n = 0; n < REST; ++n) {
  const int j = DIMS + lane + 32 * n;
  rest[n] = j < HEAD_DIM ? float(from[j]) : 0.0f;
  squares = fma(rest[n], rest[n], squares);
}
for (ushort other = 16; other > 0; other /= 2) {
  squares += simd_shuffle_xor(squares, other);
}
const float scale = rsqrt(fma(squares, 1.0f / HEAD_DIM, epsilon));

#pragma clang loop unroll(full)
for (int n = 0; n < PAIRS; ++n) {
  const int j = lane + 32 * n;
  if (j < HALF) {
    const float a = float(Element(first[n] * scale * gamma[j]));
    const float b = float(Element(second[n] * scale * gamma[j + HALF]));
    const float c = cosines[angles + j];
    const float s = sines[angles + j];
    to[j] = Element(fma(a, c, -(b * s)));
    to[j + HALF] = Element(fma(b, c, a * s));
  }
}
#pragma clang loop unroll(full)
for (int n = 0; n < REST; ++n) {
  const int j = DIMS + lane + 32 * n;
  if (j < HEAD_DIM) {
    to[j] = Element(rest[n] * scale * gamma[j]);
  }
}
