// Row by row, where vectors are narrower than AVX-512's.
//
// A row's lines are decoded to bytes in registers and multiplied with up to `kTokens` tokens before
// the next line is read. In a block of rows, the tokens of a tile stay in the first-level cache
// while its rows pass by. Zero points come in as scale * zero * (sum of the group's activations),
// so the inner loop never sees them. Sparse lines, tables and trellises take longer to decode; where
// tokens fill more than a tile, a block's rows are decoded once, to lines of 8 bits (or floats) in
// the second-level cache.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "call.h"
#include "rows/activations.h"

constexpr int kTokens = vec::kTokens;
constexpr int64_t kRows = 16;
constexpr int64_t kMostTokens = 512;  // whose activations are held at a time

constexpr int kMask = kLine / 8;  // bytes that say which columns of a sparse line are kept

// Kept values in `bytes` - kMask bytes, then the mask. Vectors may be read up to the end of the
// mask.
template <int bits>
struct Sparse;

template <>
struct Sparse<8> {
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
  static VC_INLINE void decode(const uint8_t* p, int64_t bytes, Codes& line) {
    const uint8_t* mask = p + bytes - kMask;
    for (int i = 0; i < kVectors; ++i) line.v[i] = vec::expand(p, mask + vec::kBytes / 8 * i);
  }
};

template <>
struct Sparse<4> {  // codes less 8 by then
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
  static VC_INLINE void decode(const uint8_t* p, int64_t bytes, Codes& line) {
    vec::spread_nibbles(p, bytes - kMask, line.v);
  }
};

template <bool is_bfloat16>
struct SparseFloats {
  using Line = Values;
  using Dense = Floats;
  static VC_INLINE void decode(const uint8_t* p, int64_t bytes, Values& line) {
    const uint8_t* mask = p + bytes - kMask;
    for (auto& value : line.v) {
      value = vec::expand_floats<is_bfloat16>(p, mask);
      mask += vec::kFloats / 8;
    }
  }
};

// As `read_floats`, but E4M3 in vectors: there are many.
inline void read_scales(const Matrix& m, int64_t first, int64_t count, float* to) {
  int64_t i = 0;
  if (m.scale_dtype == Dtype::kE4m3) {
    const uint8_t* p = static_cast<const uint8_t*>(m.scales) + first;
    for (; i + vec::kFloats <= count; i += vec::kFloats) {
      vec::store_floats(vec::widen_e4m3(p + i), to + i);
    }
    for (int64_t k = 0; k < i; ++k) to[k] *= kE4m3Unit;
  }
  read_floats(m.scales, first + i, count - i, m.scale_dtype, to + i);
}

// What a row's groups are multiplied by: scales (ones if the row has one, which `factor` has then),
// zeros as the decoder counts codes, and the product of the two.
struct RowTerms {
  std::vector<float> scales, zeros, offsets;
  float factor = 1;
  Key key = {};

  void load(const Matrix& m, int64_t row) {
    key = m.key_of(row);
    const float shift = m.bits == 8 ? 128.0f : m.bits == 6 ? 32.0f : 0.0f;
    const int64_t at = row / m.scale_rows;
    const bool centred = m.sparse || m.tables || m.floats || m.window;
    const float middle = centred ? 0.0f : static_cast<float>(m.middle()) - shift;
    zeros.assign(m.groups, middle);
    if (m.zeros) {
      const uint8_t* stored = m.zeros + row * m.groups;
      for (int64_t g = 0; g < m.groups; ++g) zeros[g] = static_cast<float>(stored[g]) - shift;
    }
    factor = 1;
    if (m.group == 0) {
      if (m.scales) read_floats(m.scales, at, 1, m.scale_dtype, &factor);
      scales.assign(m.lines, 1.0f);
    } else {
      scales.resize(m.groups);
      read_scales(m, at * m.groups, m.groups, scales.data());
    }
    factor *= m.factor_of(row);
    offsets.resize(centred ? 0 : m.groups);
    for (size_t g = 0; g < offsets.size(); ++g) offsets[g] = scales[g] * zeros[g];
    if (m.group > kLine) {  // from here on one for each line
      const int64_t lines = m.group / kLine;
      scales.resize(m.lines);
      for (int64_t g = m.groups; g-- > 0;) {
        const float scale = scales[g];
        for (int64_t l = std::min((g + 1) * lines, m.lines); l-- > g * lines;) scales[l] = scale;
      }
    }
  }

  // Index of the group that a line begins with.
  static int64_t group_of(const Matrix& m, int64_t line) {
    return m.group == 0 ? 0 : line * kLine / m.group;
  }

  float correction(const float* sums) const {
    float part[8] = {};
    const int64_t count = static_cast<int64_t>(offsets.size());
    int64_t g = 0;
    for (; g + 8 <= count; g += 8) {
      for (int i = 0; i < 8; ++i) part[i] += offsets[g + i] * sums[g + i];
    }
    for (; g < count; ++g) part[0] += offsets[g] * sums[g];
    return ((part[0] + part[4]) + (part[1] + part[5])) +
           ((part[2] + part[6]) + (part[3] + part[7]));
  }
};

struct Call {
  const Matrix& matrix;
  const Activations& in;
  const float* bias;
  void* out;
  int64_t first;  // token of `out` that is the first of `in`
  Dtype dtype;
};

template <class Code, int part>
inline vec::Floats floats(const Codes& line, int vector) {
  return vec::widen<Code::kSigned, part>(line.v[vector]);
}
template <class Code, int part>
inline vec::Floats floats(const Values& line, int vector) {
  return line.v[4 * vector + part];
}

template <class Code, int quarter, int tokens>
VC_INLINE void multiply_floats(const typename Code::Line& line, int vector, const float* x,
                               int64_t stride, vec::Floats* sums) {
  const vec::Floats value = floats<Code, quarter>(line, vector);
  for (int t = 0; t < tokens; ++t) {
    const vec::Floats in = vec::load_floats(x + t * stride + vec::kFloats * quarter);
    sums[t] = vec::multiply_add(value, in, sums[t]);
  }
}

// All quarters of a vector, or those of one half.
template <class Code, int count, int tokens>
VC_INLINE void multiply_quarters(const typename Code::Line& line, int vector, int half,
                                 const float* x, int64_t stride, vec::Floats* sums) {
  if (count == 4 || half == 0) {
    multiply_floats<Code, 0, tokens>(line, vector, x, stride, sums);
    multiply_floats<Code, 1, tokens>(line, vector, x, stride, sums);
  }
  if (count == 4 || half == 1) {
    multiply_floats<Code, 2, tokens>(line, vector, x, stride, sums);
    multiply_floats<Code, 3, tokens>(line, vector, x, stride, sums);
  }
}

template <int split, class Vector>
inline Vector add_scaled(Vector a, const float* scales, Vector sum) {
  if constexpr (split == 2) {
    return scale_add_halves(a, scales, sum);
  } else {
    return vec::scale_add(a, *scales, sum);
  }
}

template <class Code, class = void>
constexpr bool takes_decoding = false;
template <class Code>
constexpr bool takes_decoding<Code, std::void_t<typename Code::Dense>> = true;

template <class Code>
float value_of(const typename Code::Line& line, int64_t column) {
  if constexpr (std::is_same_v<typename Code::Line, Values>) {
    float value;
    std::memcpy(&value, reinterpret_cast<const char*>(&line) + column * sizeof value, sizeof value);
    return value;
  } else {
    uint8_t code;
    std::memcpy(&code, reinterpret_cast<const uint8_t*>(&line) + column, 1);
    return Code::kSigned ? static_cast<int8_t>(code) : code;
  }
}

// One row, whose lines of `bytes` begin at `p`, times `tokens` tokens from `token` on: totals
// before zero points.
template <class Code, int group, bool exact, int tokens>
void row_times_tokens(const uint8_t* p, int64_t bytes, const RowTerms& terms, const Activations& in,
                      int64_t token, float* totals) {
  // A vector of 32 columns may hold two groups.
  constexpr int kWide = group < vec::kBytes ? vec::kBytes : group;
  constexpr int kParts = kLine / kWide, kPerPart = kWide / vec::kBytes, kSplit = kWide / group;
  const int64_t width = in.width();
  const int8_t* q = exact ? nullptr : in.codes.data() + token * width;
  const float* x = exact ? in.values.data() + token * width : nullptr;
  const float* q_scales = exact ? nullptr : in.scales.data() + token * in.lines;
  vec::Floats sums[tokens];
  for (auto& sum : sums) sum = vec::zero();
  const Reader<Code> reader(terms.key);
  for (int64_t at = 0; at < in.lines; ++at, p += bytes) {
    typename Code::Line line;
    reader.read(p, bytes, line);
    fetch_ahead(p);
    if (bytes > 64) fetch_ahead(p + 64);
    for (int g = 0; g < kParts; ++g) {
      const float* scales = terms.scales.data() + (at * kParts + g) * kSplit;
      const int64_t column = at * kLine + g * kWide;
      if constexpr (exact) {
        constexpr int kPieces = 4 / kSplit;  // quarters of a vector that share a scale
        for (int half = 0; half < kSplit; ++half) {
          vec::Floats parts[tokens];
          for (auto& part : parts) part = vec::zero();
          for (int v = 0; v < kPerPart; ++v) {
            multiply_quarters<Code, kPieces, tokens>(line, g * kPerPart + v, half,
                                                     x + column + vec::kBytes * v, width, parts);
          }
          for (int t = 0; t < tokens; ++t) {
            sums[t] = vec::scale_add(parts[t], scales[half], sums[t]);
          }
        }
      } else {
        const vec::Bytes* codes = line.v + g * kPerPart;
        const vec::Ints start = vec::start<Code::kSigned, kPerPart>(codes);
        for (int t = 0; t < tokens; ++t) {
          const vec::Ints dot =
              vec::dot<Code::kSigned, kPerPart>(codes, q + t * width + column, start);
          const vec::Floats scaled = vec::scale(dot, q_scales[t * in.lines + at]);
          sums[t] = add_scaled<kSplit>(scaled, scales, sums[t]);
        }
      }
    }
  }
  for (int t = 0; t < tokens; ++t) totals[t] = vec::total(sums[t]);
}

template <class Code, int group, bool exact, int... less>
constexpr auto tiles_of(std::integer_sequence<int, less...>) {
  return std::array{row_times_tokens<Code, group, exact, less + 1>...};
}

// Rows of a block, the first of them `row`, times all tokens.
template <class Code, int group, bool exact>
void block_times_tokens(const Call& call, const uint8_t* p, int64_t bytes, int64_t row,
                        int64_t rows, const RowTerms* terms) {
  constexpr auto kTile = tiles_of<Code, group, exact>(std::make_integer_sequence<int, kTokens>());
  const Activations& in = call.in;
  for (int64_t token = 0; token < in.tokens; token += kTokens) {
    const int64_t count = std::min<int64_t>(kTokens, in.tokens - token);
    for (int64_t r = 0; r < rows; ++r) {
      float totals[kTokens];
      kTile[count - 1](p + r * in.lines * bytes, bytes, terms[r], in, token, totals);
      for (int64_t t = 0; t < count; ++t) {
        const float* sums = in.sums.data() + (token + t) * in.groups;
        float value = terms[r].factor * (totals[t] - terms[r].correction(sums));
        if (call.bias) value += call.bias[row + r];
        write_float(call.out, (call.first + token + t) * call.matrix.rows + row + r, call.dtype,
                    value);
      }
    }
  }
}

template <class Code, int group, bool exact>
void rows_times_tokens(const Call& call, int64_t first, int64_t last) {
  const Matrix& m = call.matrix;
  const int64_t row_bytes = m.lines * m.bytes;
  thread_local RowTerms terms[kRows];
  thread_local std::vector<uint8_t> decoded;
  for (int64_t block = first; block < last; block += kRows) {
    const int64_t rows = std::min(kRows, last - block);
    for (int64_t r = 0; r < rows; ++r) terms[r].load(m, block + r);
    const uint8_t* p = m.weights + block * row_bytes;
    if constexpr (!takes_decoding<Code>) {
      block_times_tokens<Code, group, exact>(call, p, m.bytes, block, rows, terms);
    } else if (call.in.tokens <= kTokens) {
      block_times_tokens<Code, group, exact>(call, p, m.bytes, block, rows, terms);
    } else {
      constexpr int64_t kBytes = sizeof(typename Code::Line);
      decoded.resize(kRows * m.lines * kBytes);
      uint8_t* out = decoded.data();
      const uint8_t* from = p;
      for (int64_t r = 0; r < rows; ++r) {
        const Reader<Code> reader(terms[r].key);
        for (int64_t at = 0; at < m.lines; ++at, from += m.bytes, out += kBytes) {
          typename Code::Line line;
          reader.read(from, m.bytes, line);
          std::memcpy(out, &line, kBytes);
        }
      }
      block_times_tokens<typename Code::Dense, group, exact>(call, decoded.data(), kBytes, block,
                                                             rows, terms);
    }
  }
}

// One row as floats: scale * (code - zero).
template <class Code>
void look_up(const Matrix& m, int64_t row, int64_t cols, float* out) {
  thread_local RowTerms terms;
  terms.load(m, row);
  const uint8_t* p = m.weights + row * m.lines * m.bytes;
  const Reader<Code> reader(terms.key);
  const int64_t step = m.group == 0 ? m.lines * kLine : m.group;
  for (int64_t at = 0; at < m.lines; ++at, p += m.bytes) {
    typename Code::Line line;
    reader.read(p, m.bytes, line);
    const int64_t count = std::min<int64_t>(kLine, cols - at * kLine);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t group = (at * kLine + i) / step;
      const float scale = terms.factor * terms.scales[step > kLine ? at : group];
      out[at * kLine + i] = scale * (value_of<Code>(line, i) - terms.zeros[group]);
    }
  }
}

using Body = void (*)(const Call&, int64_t, int64_t);

struct Functions {
  Body exact, quantized;
  RowLookUp look_up;
};

template <class Code, bool exact>
Body body_of(int group) {
  if (group == 16) return rows_times_tokens<Code, 16, exact>;
  if (group == 32) return rows_times_tokens<Code, 32, exact>;
  if (group == 64) return rows_times_tokens<Code, 64, exact>;
  return rows_times_tokens<Code, kLine, exact>;
}

template <class Code>
Functions functions(const Matrix& m) {
  if constexpr (std::is_same_v<typename Code::Line, Values>) {
    const Body exact = body_of<Code, true>(m.group);
    return {exact, exact, look_up<Code>};
  } else {
    return {body_of<Code, true>(m.group), body_of<Code, false>(m.group), look_up<Code>};
  }
}

inline void multiply(const Request& r, const Functions& run) {
  const Matrix& m = r.m;
  const bool exact = r.how == Mode::kExact;
  const Body body = exact ? run.exact : run.quantized;
  const int64_t blocks = (m.rows + kRows - 1) / kRows, width = m.lines * kLine;
  const int offset = m.bits == 8 || m.sparse || m.tables || m.window ? vec::kSignedOffset : 0;
  static thread_local Activations scratch;
  Activations& in = scratch;
  for (int64_t first = 0; first < r.tokens; first += kMostTokens) {
    const int64_t count = std::min(kMostTokens, r.tokens - first);
    in.resize(count, m.lines, m.groups, m.group, offset, exact);
    parallel(count, std::max<int64_t>(1, kWork / 16 / width), [&](int64_t a, int64_t b) {
      for (int64_t t = a; t < b; ++t) {
        in.fill(t, r.x, (first + t) * r.stride, r.cols, r.dtype, r.how);
      }
    });
    const Call call{m, in, r.bias, r.out, first, r.dtype};
    parallel(blocks, std::max<int64_t>(1, kWork / (kRows * width * count)),
             [&](int64_t a, int64_t b) { body(call, a * kRows, std::min(b * kRows, m.rows)); });
  }
}
