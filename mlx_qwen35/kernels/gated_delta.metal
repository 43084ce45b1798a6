// The core of a Gated DeltaNet layer in one launch, for any number of tokens:
//
//     causal conv + silu -> l2 norms of q, k -> gates -> gated delta rule -> RMSNorm gated by silu(z)
//
// gated_delta.py beside this file is the definition, fused_delta.py the launcher. This is the body of the function, MLX
// writes its signature. MLX looks for the names of thread attributes everywhere, in comments too, so none stands here.
//
// Letters: B batch, T tokens, Hk/Hv key/value heads, r = Hv / Hk, Dk/Dv head sizes, C = 2 Hk Dk + Hv Dv, K conv taps.
//
// Inputs
//   projected  (B, T, C + Hv Dv [+ 2 Hv])  Element  tokens: q, k, v, z [, b, a]; Element is float, half or bfloat
//   gates      (B, T, 2 Hv)                any      b, a if GATES_APART, otherwise `projected` again
//   window     (B, K - 1, C)               Element  the tokens before these, not yet convolved
//   conv       (K, C)                      float    tap K - 1 multiplies the newest token
//   A_log      (Hv,)                       float
//   dt_bias    (Hv,)                       float
//   norm       (Dv,)                       float
//   state      (B, Hv, Dv, Dk)             float
//   lengths    (B,)                        int      real tokens of each batch row, 0..T; the others change nothing
//   tokens     ()                          int      T
//   epsilon    ()                          float    of the gated norm
// Outputs, with P = T if SNAPSHOTS (after each token), otherwise 1 (after the last)
//   y           (B, T, Hv Dv)              Element  0 where there is no real token
//   new_window  (B, P, K - 1, C)           Element
//   new_state   (B, P, Hv, Dv, Dk)         float
//
// Who owns what. Grid (N, Hv, B) with N = Dv LANES / ROWS, a multiple of 32; threadgroup (N, 1, 1): one for each value
// head of each batch row. It owns the head's state, v and z, and, if it is the first of the r that share a key head,
// the window of that q and k. LANES neighbouring threads keep ROWS rows of the state, of Dk numbers each, in registers
// from the first token to the last: thread i shares the rows i / LANES + n N / LANES. A row has PARTS parts: of its
// groups of four numbers, part p has p, p + PARTS, p + 2 PARTS ... A lane holds the parts lane, lane + LANES ...
//
// Order. STAGED tokens at a time: each token is convolved, its norms and gates formed, by two simdgroups; barrier; all
// scan the tokens, and the outputs take the place of v, behind a barrier of the simdgroup alone, whose lanes share the
// row; barrier; each token's outputs are normed and gated by one simdgroup. There is no third barrier of all: next that
// simdgroup overwrites what it alone has just read (v), and the others what nobody reads any more (q, k, scalars).
//
// Numeric contract. All arithmetic is float32; y is rounded once; the window is copied. Sums have one order: in a part
// the numbers as they come, the parts by a butterfly; for squares and q.k a lane's groups as they come, the 32 lanes by
// a butterfly. Where a product meets a sum, the text says fma. So the bits of a token depend on none of T, STAGED,
// LANES, ROWS, SNAPSHOTS, GATES_APART, nor on how a text is cut into calls. The rule reads the old state once:
//
//     change = beta (v - g S k)        o = g S q + (q.k) change        S' = g S + change k
//
// with k / |k| and q / (|q| sqrt(Dk)) for k and q; these factors go into scalars and never meet the vectors.

constexpr int KEY = KEY_DIM / 4, VALUE = VALUE_DIM / 4, HEAD = 2 * KEY + VALUE;  // in groups of four channels
constexpr int KEY_STRIDE = KEY_HEADS * KEY_DIM;
constexpr int CHANNELS = 2 * KEY_STRIDE + VALUE_HEADS * VALUE_DIM;
constexpr int GATE_WIDTH = 2 * VALUE_HEADS;
constexpr int ROW_WIDTH = CHANNELS + VALUE_HEADS * VALUE_DIM + (GATES_APART ? 0 : GATE_WIDTH);
constexpr int SPREAD = VALUE_DIM / ROWS;  // distance between the rows of a thread
constexpr int SIMDGROUPS = SPREAD * LANES / 32;
constexpr int MINE = PARTS / LANES;  // parts of a row that a lane holds
constexpr int EACH = KEY / PARTS;    // groups of four in a part
constexpr int PAST = TAPS - 1;
constexpr bool TAPS_STAGED = STAGED > 1;

threadgroup float4 staged[STAGED * HEAD];  // of each token q, k, v
threadgroup float scalars[STAGED * 5];     // of each token g, g / |k|, beta / |k|, 1 / (|q| sqrt(Dk)), q.k
threadgroup float4 taps[TAPS_STAGED ? TAPS * HEAD : 1];

const int index = int(thread_position_in_threadgroup.x);
const int lane = index % 32;
const int simd_index = index / 32;
const int part = index % LANES;
const int first_row = index / LANES;  // the first row of this thread
const int head = int(threadgroup_position_in_grid.y);
const int batch = int(threadgroup_position_in_grid.z);
const int keys_at = head / (VALUE_HEADS / KEY_HEADS) * KEY_DIM;  // the first channel of q; that of k is KEY_STRIDE further
const int value_at = 2 * KEY_STRIDE + head * VALUE_DIM;
const int T = tokens;
const int length = min(max(int(lengths[batch]), 0), T);

// First of all, so that the memory works while the first tokens are staged: the state.
float4 S[ROWS][MINE * EACH];
#pragma clang loop unroll(full)
for (int n = 0; n < ROWS; ++n) {
  const size_t row = (size_t(batch) * VALUE_HEADS + head) * VALUE_DIM + n * SPREAD + first_row;
  const device float4* from = (const device float4*)(state + row * KEY_DIM);
  #pragma clang loop unroll(full)
  for (int i = 0; i < EACH; ++i) {
    #pragma clang loop unroll(full)
    for (int m = 0; m < MINE; ++m) {
      S[n][i * MINE + m] = from[i * PARTS + m * LANES + part];
    }
  }
}

if (TAPS_STAGED) {
  for (int tap = 0; tap < TAPS; ++tap) {
    for (int group = index; group < HEAD; group += SIMDGROUPS * 32) {
      const int vector = min(group / KEY, 2);
      const int channel = (vector < 2 ? keys_at + vector * KEY_STRIDE : value_at) + 4 * (group - vector * KEY);
      taps[tap * HEAD + group] = *(const device float4*)(conv + tap * CHANNELS + channel);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

for (int start = 0; start < length; start += STAGED) {
  const int count = min(STAGED, length - start);

  // Conv and silu. v of token s is the affair of simdgroup s, q and k that of its left neighbour.
  for (int vector = 0; vector < 3; ++vector) {
    const int groups = vector < 2 ? KEY : VALUE;
    for (int s = vector < 2 ? (simd_index + 1) % SIMDGROUPS : simd_index; s < count; s += SIMDGROUPS) {
      for (int group = lane; group < groups; group += 32) {
        const int channel = (vector < 2 ? keys_at + vector * KEY_STRIDE : value_at) + 4 * group;
        float4 sum = float4(0.0f);
        #pragma clang loop unroll(full)
        for (int tap = 0; tap < TAPS; ++tap) {
          const int t = start + s + tap - PAST;
          const device Element* from = t < 0 ? window + (size_t(batch) * PAST + (t + PAST)) * CHANNELS + channel
                                             : projected + (size_t(batch) * T + t) * ROW_WIDTH + channel;
          const float4 x = ALIGNED ? float4(*(const device vec<Element, 4>*)from)
                                   : float4(float(from[0]), float(from[1]), float(from[2]), float(from[3]));
          const float4 weight = TAPS_STAGED ? float4(taps[tap * HEAD + vector * KEY + group])
                                            : float4(*(const device float4*)(conv + tap * CHANNELS + channel));
          sum = fma(x, weight, sum);
        }
        staged[s * HEAD + vector * KEY + group] = sum / (1.0f + exp(-sum));
      }
    }
  }

  // Norms, q.k and gates, by the lanes that have just written q and k.
  for (int s = (simd_index + 1) % SIMDGROUPS; s < count; s += SIMDGROUPS) {
    float qq = 0.0f, kk = 0.0f, qk = 0.0f;
    for (int group = lane; group < KEY; group += 32) {
      const float4 q = staged[s * HEAD + group];
      const float4 k = staged[s * HEAD + KEY + group];
      qq = fma(q.w, q.w, fma(q.z, q.z, fma(q.y, q.y, fma(q.x, q.x, qq))));
      kk = fma(k.w, k.w, fma(k.z, k.z, fma(k.y, k.y, fma(k.x, k.x, kk))));
      qk = fma(q.w, k.w, fma(q.z, k.z, fma(q.y, k.y, fma(q.x, k.x, qk))));
    }
    for (ushort other = 16; other > 0; other /= 2) {
      qq += simd_shuffle_xor(qq, other);
      kk += simd_shuffle_xor(kk, other);
      qk += simd_shuffle_xor(qk, other);
    }
    if (lane == 0) {
      const size_t row = size_t(batch) * T + start + s;
      const size_t at = (GATES_APART ? row * GATE_WIDTH : row * ROW_WIDTH + (ROW_WIDTH - GATE_WIDTH)) + head;
      const float write = 1.0f / (1.0f + exp(-float(gates[at])));
      const float x = float(gates[at + VALUE_HEADS]) + dt_bias[head];
      // max(x, 0) + log(1 + e) with e = exp(-|x|); the sum 1 + e would keep few digits of a small e.
      const float e = exp(-fabs(x));
      const float series = e * fma(e, fma(e, fma(e, fma(e, 0.2f, -0.25f), 1.0f / 3.0f), -0.5f), 1.0f);
      const float softplus = max(x, 0.0f) + (e < 0.03f ? series : log(1.0f + e));
      const float decay = exp(-exp(A_log[head]) * softplus);
      const float k_scale = rsqrt(kk + 1e-6f);
      scalars[s * 5] = decay;
      scalars[s * 5 + 1] = decay * k_scale;
      scalars[s * 5 + 2] = write * k_scale;
      scalars[s * 5 + 3] = rsqrt(qq + 1e-6f) * rsqrt(float(KEY_DIM));
      scalars[s * 5 + 4] = qk;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int s = 0; s < count; ++s) {
    const threadgroup float4* q = staged + s * HEAD;
    threadgroup float* v = (threadgroup float*)(staged + s * HEAD + 2 * KEY);
    float4 k[MINE * EACH];
    float Sk[ROWS][MINE], Sq[ROWS][MINE];
    #pragma clang loop unroll(full)
    for (int n = 0; n < ROWS; ++n) {
      #pragma clang loop unroll(full)
      for (int m = 0; m < MINE; ++m) {
        Sk[n][m] = Sq[n][m] = 0.0f;
      }
    }
    #pragma clang loop unroll(full)
    for (int i = 0; i < EACH; ++i) {
      #pragma clang loop unroll(full)
      for (int m = 0; m < MINE; ++m) {
        const int group = i * PARTS + m * LANES + part;
        const float4 a = q[group];
        const float4 b = k[i * MINE + m] = q[KEY + group];
        #pragma clang loop unroll(full)
        for (int n = 0; n < ROWS; ++n) {
          const float4 x = S[n][i * MINE + m];
          Sk[n][m] = fma(x.w, b.w, fma(x.z, b.z, fma(x.y, b.y, fma(x.x, b.x, Sk[n][m]))));
          Sq[n][m] = fma(x.w, a.w, fma(x.z, a.z, fma(x.y, a.y, fma(x.x, a.x, Sq[n][m]))));
        }
      }
    }
    const float decay = scalars[s * 5];
    const float k_decay = scalars[s * 5 + 1];
    const float k_write = scalars[s * 5 + 2];
    const float q_scale = scalars[s * 5 + 3];
    const float qk = scalars[s * 5 + 4];
    #pragma clang loop unroll(full)
    for (int n = 0; n < ROWS; ++n) {
      const int row = n * SPREAD + first_row;
      const float value = v[row];
      // The butterfly over PARTS: its wide steps pair parts of one lane, the others parts of two lanes.
      #pragma clang loop unroll(full)
      for (int half_way = MINE / 2; half_way > 0; half_way /= 2) {
        #pragma clang loop unroll(full)
        for (int m = 0; m < half_way; ++m) {
          Sk[n][m] += Sk[n][m + half_way];
          Sq[n][m] += Sq[n][m + half_way];
        }
      }
      float along_k = Sk[n][0], along_q = Sq[n][0];
      for (ushort other = LANES / 2; other > 0; other /= 2) {
        along_k += simd_shuffle_xor(along_k, other);
        along_q += simd_shuffle_xor(along_q, other);
      }
      const float change = k_write * fma(-k_decay, along_k, value);
      #pragma clang loop unroll(full)
      for (int i = 0; i < MINE * EACH; ++i) {
        S[n][i] = fma(k[i], float4(change), S[n][i] * decay);
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);  // a shuffle orders no memory, and others read v[row] above
      if (part == 0) {
        v[row] = q_scale * fma(change, qk, decay * along_q);
      }
    }
    if (SNAPSHOTS) {
      #pragma clang loop unroll(full)
      for (int n = 0; n < ROWS; ++n) {
        const size_t at = (size_t(batch) * T + start + s) * VALUE_HEADS + head;
        const size_t row = at * VALUE_DIM + n * SPREAD + first_row;
        device float4* to = (device float4*)(new_state + row * KEY_DIM);
        #pragma clang loop unroll(full)
        for (int i = 0; i < EACH; ++i) {
          #pragma clang loop unroll(full)
          for (int m = 0; m < MINE; ++m) {
            to[i * PARTS + m * LANES + part] = S[n][i * MINE + m];
          }
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  for (int s = simd_index; s < count; s += SIMDGROUPS) {
    const threadgroup float4* out = staged + s * HEAD + 2 * KEY;
    float squares = 0.0f;
    for (int group = lane; group < VALUE; group += 32) {
      const float4 o = out[group];
      squares = fma(o.w, o.w, fma(o.z, o.z, fma(o.y, o.y, fma(o.x, o.x, squares))));
    }
    for (ushort other = 16; other > 0; other /= 2) {
      squares += simd_shuffle_xor(squares, other);
    }
    const float scale = rsqrt(fma(squares, 1.0f / VALUE_DIM, epsilon));
    const size_t row = size_t(batch) * T + start + s;
    for (int group = lane; group < VALUE; group += 32) {
      const int channel = head * VALUE_DIM + 4 * group;
      const device Element* from = projected + row * ROW_WIDTH + CHANNELS + channel;
      const float4 z = ALIGNED ? float4(*(const device vec<Element, 4>*)from)
                               : float4(float(from[0]), float(from[1]), float(from[2]), float(from[3]));
      const float4 weight = *(const device float4*)(norm + 4 * group);
      const float4 result = out[group] * scale * weight * (z / (1.0f + exp(-z)));
      *(device vec<Element, 4>*)(y + row * VALUE_HEADS * VALUE_DIM + channel) = vec<Element, 4>(result);
    }
  }
}

// What is left to write: y of the padding, the state where no token has written it, the windows.
for (int t = length + simd_index; t < T; t += SIMDGROUPS) {
  for (int group = lane; group < VALUE; group += 32) {
    const size_t at = (size_t(batch) * T + t) * VALUE_HEADS * VALUE_DIM + head * VALUE_DIM + 4 * group;
    *(device vec<Element, 4>*)(y + at) = vec<Element, 4>(float4(0.0f));
  }
}
const int positions = SNAPSHOTS ? T : 1;
for (int p = SNAPSHOTS ? length : 0; p < positions; ++p) {
  #pragma clang loop unroll(full)
  for (int n = 0; n < ROWS; ++n) {
    const size_t at = (size_t(batch) * positions + p) * VALUE_HEADS + head;
    const size_t row = at * VALUE_DIM + n * SPREAD + first_row;
    device float4* to = (device float4*)(new_state + row * KEY_DIM);
    #pragma clang loop unroll(full)
    for (int i = 0; i < EACH; ++i) {
      #pragma clang loop unroll(full)
      for (int m = 0; m < MINE; ++m) {
        to[i * PARTS + m * LANES + part] = S[n][i * MINE + m];
      }
    }
  }
}
const bool owns_keys = head % (VALUE_HEADS / KEY_HEADS) == 0;
for (int p = 0; p < positions; ++p) {
  const int seen = SNAPSHOTS ? min(p + 1, length) : length;
  for (int past = 0; past < PAST; ++past) {
    const int t = seen + past - PAST;
    const device Element* from = t < 0 ? window + (size_t(batch) * PAST + (t + PAST)) * CHANNELS
                                       : projected + (size_t(batch) * T + t) * ROW_WIDTH;
    device Element* to = new_window + ((size_t(batch) * positions + p) * PAST + past) * CHANNELS;
    for (int own = index + (owns_keys ? 0 : 2 * KEY_DIM); own < 4 * HEAD; own += SIMDGROUPS * 32) {
      const int vector = min(own / KEY_DIM, 2);
      const int channel = (vector < 2 ? keys_at + vector * KEY_STRIDE : value_at) + own - vector * KEY_DIM;
      to[channel] = from[channel];
    }
  }
}
