"""The faults that mutations.py puts into the kernels: what is changed in which text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`find` stands in the kernel's text `times` times; each is replaced."""

    kernel: str
    fault: str
    find: str
    put: str
    times: int = 1

    def __str__(self) -> str:
        return f"{self.kernel}: {self.fault}"


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"

GATED_DELTA = [
    # barriers: all of them; the first is what the police alone sees
    ("no barrier of the lanes of a row before its output takes the place of v",
     "      simdgroup_barrier(mem_flags::mem_threadgroup);", "     "),
    ("that barrier orders no memory", "simdgroup_barrier(mem_flags::mem_threadgroup);  // a",
     "simdgroup_barrier(mem_flags::mem_none);  // a"),
    ("no barrier behind the staged taps", f"  }}\n  {BARRIER}}}", "  }\n}"),
    ("no barrier between staging and scan", f"  {BARRIER}\n  for (int s = 0;", "  for (int s = 0;"),
    ("no barrier between scan and norm", f"  {BARRIER}\n  for (int s = simd_index;", "  for (int s = simd_index;"),
    ("norms by other lanes than wrote q and k", "for (int s = (simd_index + 1) % SIMDGROUPS; s < count",
     "for (int s = (simd_index + 2) % SIMDGROUPS; s < count"),
    ("v staged by other lanes than read its outputs", ": simd_index; s < count;",
     ": (simd_index + 2) % SIMDGROUPS; s < count;"),
    # heads and places
    ("key head by remainder instead of by quotient", "head / (VALUE_HEADS / KEY_HEADS) * KEY_DIM",
     "head % KEY_HEADS * KEY_DIM"),
    ("decay rate of the first head for all", "A_log[head]", "A_log[0]"),
    ("time step bias of the first head for all", "dt_bias[head]", "dt_bias[0]"),
    ("b and a exchanged", "const float write = 1.0f / (1.0f + exp(-float(gates[at])));\n"
     "      const float x = float(gates[at + VALUE_HEADS])",
     "const float write = 1.0f / (1.0f + exp(-float(gates[at + VALUE_HEADS])));\n"
     "      const float x = float(gates[at])"),
    ("gates apart read as if they were joined", "GATES_APART ? row * GATE_WIDTH :", "false ? row * GATE_WIDTH :"),
    ("q and k exchanged in the scan", "a = q[group];\n        const float4 b = k[i * MINE + m] = q[KEY + group]",
     "a = q[KEY + group];\n        const float4 b = k[i * MINE + m] = q[group]"),
    ("state loaded in another order than it is stored", "= from[i * PARTS + m * LANES + part]",
     "= from[i * PARTS + part * MINE + m]"),
    ("order of a row's sums depends on the lanes", "i * PARTS + m * LANES + part", "i * PARTS + part * MINE + m", 4),
    ("rows of a thread side by side in the state loaded", "VALUE_DIM + n * SPREAD + first_row;\n  const device",
     "VALUE_DIM + n + first_row * ROWS;\n  const device"),
    ("tokens of a later batch row begin after one token", "projected + (size_t(batch) * T + t) * ROW_WIDTH + channel",
     "projected + (size_t(batch) + t) * ROW_WIDTH + channel"),
    ("state of the first batch row for all", "(size_t(batch) * VALUE_HEADS + head) * VALUE_DIM",
     "size_t(head) * VALUE_DIM"),
    # arithmetic
    ("state does not decay", "S[n][i] * decay", "S[n][i]"),
    ("state does not decay before it is read along k", "= decay * k_scale", "= k_scale"),
    ("state does not decay before it is read along q", "decay * along_q", "along_q"),
    ("write strength left out", "write * k_scale", "k_scale"),
    ("token's own k not seen by its q", "fma(change, qk, decay * along_q)", "decay * along_q"),
    ("sign of what is written", "fma(-k_decay, along_k, value)", "fma(k_decay, along_k, value)"),
    ("epsilon of k a tenth", "rsqrt(kk + 1e-6f)", "rsqrt(kk + 1e-7f)"),
    ("epsilon of q a tenth", "rsqrt(qq + 1e-6f)", "rsqrt(qq + 1e-7f)"),
    ("1 / sqrt(Dk) left out", " * rsqrt(float(KEY_DIM))", ""),
    ("no epsilon in the gated norm", "1.0f / VALUE_DIM, epsilon", "1.0f / VALUE_DIM, 0.0f"),
    ("mean over keys' size", "squares, 1.0f / VALUE_DIM", "squares, 1.0f / KEY_DIM"),
    ("no silu behind the conv", "sum / (1.0f + exp(-sum))", "sum"),
    ("sigmoid instead of silu of z", "(z / (1.0f + exp(-z)))", "(1.0f / (1.0f + exp(-z)))"),
    ("softplus without its series", "e < 0.03f ? series : log(1.0f + e)", "log(1.0f + e)"),
    ("half of the lanes left out of the squares of q and k", "other = 16; other > 0; other /= 2) {\n      qq",
     "other = 8; other > 0; other /= 2) {\n      qq"),
    ("half of the lanes left out of the squares of the output", "other = 16; other > 0; other /= 2) {\n      squares",
     "other = 8; other > 0; other /= 2) {\n      squares"),
    ("half of the lanes left out of a row's sum", "other = LANES / 2", "other = LANES / 4"),
    # precision
    ("state kept in half", "fma(k[i], float4(change), S[n][i] * decay)",
     "float4(half4(fma(k[i], float4(change), S[n][i] * decay)))"),
    ("convolved tokens kept in half", "= sum / (1.0f + exp(-sum))", "= float4(half4(sum / (1.0f + exp(-sum))))"),
    ("convolved tokens rounded to the dtype of the projections", "= sum / (1.0f + exp(-sum))",
     "= float4(vec<Element, 4>(sum / (1.0f + exp(-sum))))"),
    # bounds
    ("last tap not convolved", "for (int tap = 0; tap < TAPS; ++tap) {\n          const int t",
     "for (int tap = 0; tap < TAPS - 1; ++tap) {\n          const int t"),
    ("last tap not staged", "for (int tap = 0; tap < TAPS; ++tap) {\n    for",
     "for (int tap = 0; tap < TAPS - 1; ++tap) {\n    for"),
    ("a token too many at the end", "min(STAGED, length - start)", "min(STAGED, length - start + 1)"),
    ("a token too few at the end", "min(STAGED, length - start)", "min(STAGED, length - start - 1)"),
    ("a token skipped between stages", "start += STAGED", "start += STAGED + 1"),
    ("tokens of padding are read", "min(max(int(lengths[batch]), 0), T)", "T"),
    ("length of the first batch row for all", "lengths[batch]", "lengths[0]"),
    ("no output for the first token of padding", "int t = length + simd_index", "int t = length + 1 + simd_index"),
    # memory
    ("conv reads the window one token early", "(t + PAST)) * CHANNELS + channel",
     "(t + PAST - 1)) * CHANNELS + channel"),
    ("conv reads the window one token late", "(t + PAST)) * CHANNELS + channel",
     "min(t + PAST + 1, PAST - 1)) * CHANNELS + channel"),
    ("new window reaches into the padding", ": length;\n  for (int past", ": T;\n  for (int past"),
    ("new window one token early", "const int t = seen + past - PAST;",
     "const int t = seen + past - PAST - 1;"),
    ("last token of the new window left out", "const int t = seen + past - PAST;",
     "const int t = seen + min(past, PAST - 2) - PAST;"),
    ("window written by every value head", "bool owns_keys = head % (VALUE_HEADS / KEY_HEADS) == 0",
     "bool owns_keys = true"),
    ("window written for the first key head only", "bool owns_keys = head % (VALUE_HEADS / KEY_HEADS) == 0",
     "bool owns_keys = head == 0"),
    ("last channel of v left out of the window", "own < 4 * HEAD", "own < 4 * HEAD - 1"),
    ("window after each token that of the token before", "min(p + 1, length)", "min(p, length)"),
    ("state after each token that of the token before",
     "const size_t at = (size_t(batch) * T + start + s) * VALUE_HEADS + head;",
     "const size_t at = (size_t(batch) * T + max(start + s - 1, 0)) * VALUE_HEADS + head;"),
    ("no state after a token that is not the last of those staged", "    if (SNAPSHOTS) {\n",
     "    if (SNAPSHOTS && s + 1 == count) {\n"),
    ("states after each token of all batch rows in the first",
     "const size_t at = (size_t(batch) * T + start + s) * VALUE_HEADS + head;",
     "const size_t at = size_t(start + s) * VALUE_HEADS + head;"),
    ("last window after each token", "SNAPSHOTS ? min(p + 1, length) : length", "length"),
    ("window after a token of padding empty", "min(p + 1, length)", "(p < length ? p + 1 : 0)"),
    ("first state of the padding not written", "SNAPSHOTS ? length : 0", "SNAPSHOTS ? length + 1 : 0"),
    ("padding begins a token early in the states", "SNAPSHOTS ? length : 0", "SNAPSHOTS ? length - 1 : 0"),
]  # fmt: skip

ADD_NORM = [
    ("no barrier", BARRIER, ""),
    ("the norm reads the sum before it is rounded", "float(sum);",
     "float(stream[first + at]) + float(added[first + at]);"),
    ("gamma rounded", "gamma[at]", "float(Element(gamma[at]))"),
    ("norm rounded before gamma, too", "Element(values[i] * scale * gamma[at])",
     "Element(float(Element(values[i] * scale)) * gamma[at])"),
    ("squares summed in the dtype of the stream", "squares = fma(value, value, squares);",
     "squares = float(Element(fma(value, value, squares)));"),
    ("no gamma", " * gamma[at]", ""),
    ("no epsilon", "sum / WIDTH + epsilon", "sum / WIDTH"),
    ("epsilon behind the root", "rsqrt(sum / WIDTH + epsilon)", "rsqrt(sum / WIDTH) + epsilon"),
    ("mean over the threads", "sum / WIDTH", "sum / THREADS"),
    ("half of the lanes left out of the sum", "step = 16", "step = 8"),
    ("last simdgroup left out of the sum", "i < THREADS / 32", "i < THREADS / 32 - 1"),
    ("all simdgroups write the same partial sum", "partial[simdgroup_index_in_threadgroup]", "partial[0]"),
    ("one element too many", "at < uint(WIDTH)", "at <= uint(WIDTH)", 2),
    ("last element left out of the norm", "if (at < uint(WIDTH)) {\n    normed",
     "if (at < uint(WIDTH) - 1) {\n    normed"),
    ("elements beyond whole threadgroups left out", "(WIDTH + THREADS - 1) / THREADS; ++i", "WIDTH / THREADS; ++i", 2),
    ("first row for all", "size_t(row) * WIDTH", "size_t(row * 0) * WIDTH"),
]  # fmt: skip

NORM_ROTARY = [
    ("turned the other way", "fma(a, c, -(b * s))", "fma(a, c, b * s)"),
    ("one half turned the other way", "fma(b, c, a * s)", "fma(b, c, -(a * s))"),
    ("pairs side by side", "first[n] = j < HALF ? float(from[j]) : 0.0f;\n"
     "  second[n] = j < HALF ? float(from[j + HALF]) : 0.0f;",
     "first[n] = j < HALF ? float(from[2 * j]) : 0.0f;\n  second[n] = j < HALF ? float(from[2 * j + 1]) : 0.0f;"),
    ("pairs half a head apart", "from[j + HALF]", "from[j + HEAD_DIM / 2]"),
    ("gamma of the first half for both", "gamma[j + HALF]", "gamma[j]"),
    ("gamma of q for k", "is_query ? q_norm : k_norm", "q_norm"),
    ("gamma rounded", "gamma[j + HALF]", "float(Element(gamma[j + HALF]))"),
    ("not rounded behind the norm", "float(Element(first[n] * scale * gamma[j]))", "first[n] * scale * gamma[j]"),
    ("one half not rounded behind the norm", "float(Element(second[n] * scale * gamma[j + HALF]))",
     "second[n] * scale * gamma[j + HALF]"),
    ("gate read for the query of the next head", "is_query ? 2 * head :", "is_query ? head :"),
    ("v read for k", "QUERY_HEADS + head) * HEAD_DIM;", "QUERY_HEADS + KEY_HEADS + head) * HEAD_DIM;"),
    ("no epsilon", "1.0f / HEAD_DIM, epsilon", "1.0f / HEAD_DIM, 0.0f"),
    ("mean over the dims that turn", "1.0f / HEAD_DIM", "1.0f / DIMS"),
    ("half of the lanes left out of the sum", "other = 16", "other = 8"),
    ("dims that do not turn left out of the sum", "rest[n], rest[n], squares", "rest[n], 0.0f, squares"),
    ("dims that do not turn are not normed", "Element(rest[n] * scale * gamma[j])", "Element(rest[n])"),
    ("pairs beyond whole simdgroups left out", "(HALF + 31) / 32", "HALF / 32"),
    ("one pair too many", "  if (j < HALF) {", "  if (j <= HALF) {"),
    ("last pair left out", "  if (j < HALF) {", "  if (j < HALF - 1) {"),
    ("last dim left out", "if (j < HEAD_DIM) {", "if (j < HEAD_DIM - 1) {"),
    ("positions of the first batch row for all", "tables == 1 ? 0 : batch", "0"),
    ("positions of each batch row where there is one table", "tables == 1 ? 0 : batch", "batch"),
    ("position of the first token for all", "row - batch * T", "0"),
    ("position of the next token", "* T + t) * HALF", "* T + min(t + 1, T - 1)) * HALF"),
    ("heads and tokens exchanged in the output", "((size_t(batch) * QUERY_HEADS + own) * T + t)",
     "((size_t(batch) * T + t) * QUERY_HEADS + own)"),
]  # fmt: skip

PACKED_ATTENTION = [
    ("no barrier before the streams are joined", f"  {BARRIER}  float joined", "  float joined"),
    ("no barrier before the next row takes the place of this one", f"  }}\n  {BARRIER}}}", "  }\n}"),
    # heads and places
    ("columns in use taken for all columns", "size_t(head) * columns", "size_t(head) * length"),
    ("rows and queries exchanged in the input", "((size_t(head) * ROWS + r) * T + t) * HEAD_DIM",
     "((size_t(head) * T + t) * ROWS + r) * HEAD_DIM"),
    ("rows and queries exchanged in the output", "((size_t(head) * ROWS + r) * T + t) * blocks",
     "((size_t(head) * T + t) * ROWS + r) * blocks"),
    ("scale and bias of the first group for all", "column * GROUPS + part / 8", "column * GROUPS"),
    ("scale of keys for values", "float(value_scales[group])", "float(key_scales[group])"),
    ("bias of keys for values", "float(value_biases[group])", "float(key_biases[group])"),
    ("words of keys for values", "= value_words[", "= key_words["),
    ("dims of a key's word in reverse", "(j * KEY_BITS)", "((IN_KEY_WORD - 1 - j) * KEY_BITS)"),
    ("dims of a value's word in reverse", "(j * VALUE_BITS)", "((IN_VALUE_WORD - 1 - j) * VALUE_BITS)"),
    ("words of a lane's key in reverse", "(8 / IN_KEY_WORD) + w]", "(8 / IN_KEY_WORD) + 8 / IN_KEY_WORD - 1 - w]"),
    ("highest bit of a key lost", "(1u << KEY_BITS) - 1", "(1u << KEY_BITS - 1) - 1"),
    ("highest bit of a value lost", "(1u << VALUE_BITS) - 1", "(1u << VALUE_BITS - 1) - 1"),
    ("simdgroups read the same keys", "thread_index / 32 * KEYS; some", "0; some"),
    ("streams of a simdgroup read the same key", "some + lane / LANES", "some"),
    ("streams of the first query for all", "int(thread_position_in_threadgroup.y) * STREAMS", "0"),
    # bounds
    ("all queries see the last key", "length - T + t + 1)", "length)"),
    ("a query does not see its own key", "length - T + t + 1)", "length - T + t)"),
    ("last key of a block left out", "min((block + 1) * BLOCK,", "min((block + 1) * BLOCK - 1,"),
    ("first key of the next block read, too", "min((block + 1) * BLOCK,", "min((block + 1) * BLOCK + 1,"),
    ("a key behind the last counts", "if (key < end)", "if (key <= end)"),
    ("keys behind the last are read", "min(key, end - 1)", "key"),
    ("keys left out between steps", "some += STREAMS", "some += STREAMS + 1"),
    ("one block too few", "(length + BLOCK - 1) / BLOCK", "(length + BLOCK - 2) / BLOCK"),
    # arithmetic
    ("no scale of scores", "score_scale * float", "float"),
    ("no bias of keys", "key_scale, key_bias)", "key_scale, 0.0f)"),
    ("no bias of values", "value_scale, value_bias)", "value_scale, 0.0f)"),
    ("half of the lanes left out of a score", "other = LANES / 2", "other = LANES / 4"),
    ("lanes of all streams in a score", "other = LANES / 2", "other = 16"),
    ("sum does not fade", "sum[r] *= fade;", ""),
    ("output does not fade", "out[r][j] *= fade;", ""),
    ("top is not kept", "        top[r] = score;\n", ""),
    ("weights without the top", "exp(score - top[r])", "exp(score)"),
    ("top begins at a score that is met", "LOWEST = -3.0e38f", "LOWEST = -1.0f"),
    ("streams joined by the top of the last", "joined = max(joined, part_tops[first + s])",
     "joined = part_tops[first + s]"),
    ("streams joined without their tops", "exp(part_tops[first + s] - joined), parts", "1.0f, parts"),
    ("sums of streams joined without their tops", "exp(part_tops[first + s] - joined), part_sums", "1.0f, part_sums"),
    ("last stream left out of the output", "s < STREAMS; ++s) {\n      total = fma(exp(part_tops[first + s] - joined), "
     "parts", "s < STREAMS - 1; ++s) {\n      total = fma(exp(part_tops[first + s] - joined), parts"),
    ("last stream left out of the sum", "s < STREAMS; ++s) {\n      total = fma(exp(part_tops[first + s] - joined), "
     "part_sums", "s < STREAMS - 1; ++s) {\n      total = fma(exp(part_tops[first + s] - joined), part_sums"),
    ("dims beyond the threads left out", "d < HEAD_DIM; d += 32 * SIMDGROUPS", "d < 32; d += 32 * SIMDGROUPS"),
    ("top of the first stream told for the block", "tops[at] = joined", "tops[at] = part_tops[first]"),
    # precision
    ("keys kept in half", "fma(float(number), key_scale, key_bias)",
     "float(half(fma(float(number), key_scale, key_bias)))"),
    ("values kept in half", "fma(float(number), value_scale, value_bias)",
     "float(half(fma(float(number), value_scale, value_bias)))"),
    ("weights kept in half", "= exp(score - top[r])", "= float(half(exp(score - top[r])))"),
]  # fmt: skip

PACKED_ATTENTION_JOIN = [
    ("no barrier", BARRIER, ""),
    ("blocks by the top of the last", "top = max(top, split_tops[s])", "top = split_tops[s]"),
    ("sum does not fade", "    sum *= fade;\n", ""),
    ("output does not fade", "    value *= fade;\n", ""),
    ("top is not kept", "    top = other;\n", ""),
    ("blocks joined without their tops", "exp(other - top)", "1.0f"),
    ("splits joined without their tops", "exp(split_tops[s] - top)", "1.0f"),
    ("top begins at a score that is met", "LOWEST = -3.0e38f", "LOWEST = -1.0f"),
    ("all blocks in each split", "block = split;", "block = 0;"),
    ("last block left out", "block < blocks;", "block < blocks - 1;"),
    ("last split left out", "s < SPLITS; ++s) {\n    const", "s < SPLITS - 1; ++s) {\n    const"),
    ("first split counted twice", "sum = value = 0.0f;", ""),
    ("not divided by the sum", "value / sum", "value"),
    ("rounded before it is divided", "Element(value / sum)", "Element(float(Element(value)) / sum)"),
    ("blocks of the first row for all", "row * blocks + block", "block"),
    ("all splits write", "if (split == 0) {", "if (true) {"),
]  # fmt: skip

MUTANTS = [
    Mutant(kernel, *fault)
    for kernel, faults in (
        ("gated_delta", GATED_DELTA),
        ("add_norm", ADD_NORM),
        ("norm_rotary", NORM_ROTARY),
        ("packed_attention", PACKED_ATTENTION),
        ("packed_attention_join", PACKED_ATTENTION_JOIN),
    )
    for fault in faults
]
