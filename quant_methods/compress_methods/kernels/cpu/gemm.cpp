// out[tokens, rows] = x[tokens, cols] * W[rows, cols]^T for weights of few bits, and row look-up.
//
// One product for every decoder: a row's lines are decoded to bytes in registers and multiplied with
// up to `kTokens` tokens before the next line is read. Blocks of rows go to torch's own threads; in
// a block, the tokens of a tile stay in the first-level cache while its rows pass by. Zero points
// come in as scale * zero * (sum of the group's activations), so the inner loop never sees them.
// Sparse lines take longer to decode; where tokens fill more than a tile, a block's rows are decoded
// once, to dense lines in the second-level cache.
//
//   value = scale * (code - zero)
//   out   = sum over groups of scale * (sum of code * x  -  zero * sum of x)

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "matrix.h"

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

namespace {

constexpr int kTokens = 4;
constexpr int64_t kRows = 16;
constexpr int64_t kMostTokens = 512;  // whose activations are held at a time
constexpr int64_t kWork = 1 << 17;    // multiplications worth a thread

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

template <class Code, int part, int tokens>
inline void multiply_floats(const typename Code::Line& line, int vector, const float* x,
                            int64_t stride, vec::Floats* sums) {
  const vec::Floats value = floats<Code, part>(line, vector);
  for (int t = 0; t < tokens; ++t) {
    const vec::Floats in = vec::load_floats(x + t * stride + 8 * part);
    sums[t] = vec::multiply_add(value, in, sums[t]);
  }
}

template <class Code, class = void>
constexpr bool is_sparse = false;
template <class Code>
constexpr bool is_sparse<Code, std::void_t<typename Code::Dense>> = true;

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

// One row, whose lines of `bytes` begin at `p`, times `tokens` tokens from `token` on: totals before
// zero points.
template <class Code, int group, bool exact, int tokens>
void row_times_tokens(const uint8_t* p, int64_t bytes, const RowTerms& terms, const Activations& in,
                      int64_t token, float* totals) {
  constexpr int kGroups = kLine / group, kPerGroup = group / 32;
  const int64_t width = in.width();
  const int8_t* q = exact ? nullptr : in.codes.data() + token * width;
  const float* x = exact ? in.values.data() + token * width : nullptr;
  const float* q_scales = exact ? nullptr : in.scales.data() + token * in.lines;
  vec::Floats sums[tokens];
  for (auto& sum : sums) sum = vec::zero();
  for (int64_t at = 0; at < in.lines; ++at, p += bytes) {
    typename Code::Line line;
    Code::decode(p, bytes, line);
    for (int g = 0; g < kGroups; ++g) {
      const float scale = terms.scales[at * kGroups + g];
      const int64_t column = at * kLine + g * group;
      if constexpr (exact) {
        vec::Floats parts[tokens];
        for (auto& part : parts) part = vec::zero();
        for (int v = 0; v < kPerGroup; ++v) {
          const float* from = x + column + 32 * v;
          multiply_floats<Code, 0, tokens>(line, g * kPerGroup + v, from, width, parts);
          multiply_floats<Code, 1, tokens>(line, g * kPerGroup + v, from, width, parts);
          multiply_floats<Code, 2, tokens>(line, g * kPerGroup + v, from, width, parts);
          multiply_floats<Code, 3, tokens>(line, g * kPerGroup + v, from, width, parts);
        }
        for (int t = 0; t < tokens; ++t) sums[t] = vec::scale_add(parts[t], scale, sums[t]);
      } else {
        for (int t = 0; t < tokens; ++t) {
          const vec::Ints dot = vec::dot<Code::kSigned, kPerGroup>(line.v + g * kPerGroup,
                                                                   q + t * width + column);
          sums[t] = vec::scale_add(dot, scale * q_scales[t * in.lines + at], sums[t]);
        }
      }
    }
  }
  for (int t = 0; t < tokens; ++t) totals[t] = vec::total(sums[t]);
}

// Rows of a block, the first of them `row`, times all tokens.
template <class Code, int group, bool exact>
void block_times_tokens(const Call& call, const uint8_t* p, int64_t bytes, int64_t row,
                        int64_t rows, const RowTerms* terms) {
  using Function = decltype(&row_times_tokens<Code, group, exact, 1>);
  constexpr Function kTile[kTokens] = {
      row_times_tokens<Code, group, exact, 1>, row_times_tokens<Code, group, exact, 2>,
      row_times_tokens<Code, group, exact, 3>, row_times_tokens<Code, group, exact, 4>};
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
    if constexpr (!is_sparse<Code>) {
      block_times_tokens<Code, group, exact>(call, p, m.bytes, block, rows, terms);
    } else if (call.in.tokens <= kTokens) {
      block_times_tokens<Code, group, exact>(call, p, m.bytes, block, rows, terms);
    } else {
      constexpr int64_t kBytes = sizeof(typename Code::Line);
      decoded.resize(kRows * m.lines * kBytes);
      for (int64_t at = 0; at < rows * m.lines; ++at) {
        typename Code::Line line;
        Code::decode(p + at * m.bytes, m.bytes, line);
        std::memcpy(decoded.data() + at * kBytes, &line, kBytes);
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
  const int64_t step = m.group == 0 ? m.lines * kLine : m.group;
  for (int64_t at = 0; at < m.lines; ++at, p += m.bytes) {
    typename Code::Line line;
    Code::decode(p, m.bytes, line);
    const int64_t count = std::min<int64_t>(kLine, cols - at * kLine);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t group = (at * kLine + i) / step;
      const float scale = terms.factor * terms.scales[step > kLine ? at : group];
      out[at * kLine + i] = scale * (value_of<Code>(line, i) - terms.zeros[group]);
    }
  }
}

using Body = void (*)(const Call&, int64_t, int64_t);
using LookUp = void (*)(const Matrix&, int64_t, int64_t, float*);

struct Functions {
  Body exact, quantized;
  LookUp look_up;
};

template <class Code, bool exact>
Body body_of(int group) {
  if (group == 32) return rows_times_tokens<Code, 32, exact>;
  if (group == 64) return rows_times_tokens<Code, 64, exact>;
  return rows_times_tokens<Code, kLine, exact>;
}

template <class Code>
Functions functions(const Matrix& m) {
  return {body_of<Code, true>(m.group), body_of<Code, false>(m.group), look_up<Code>};
}

template <bool is_bfloat16>
Functions functions_of_floats() {
  using Code = SparseFloats<is_bfloat16>;
  const Body exact = rows_times_tokens<Code, kLine, true>;
  return {exact, exact, look_up<Code>};
}

Functions functions_of(const Matrix& m) {
  if (m.sparse && m.bits == 16) {
    return m.scale_dtype == Dtype::kBfloat16 ? functions_of_floats<true>()
                                             : functions_of_floats<false>();
  }
  if (m.sparse) return m.bits == 4 ? functions<Sparse<4>>(m) : functions<Sparse<8>>(m);
  if (m.bits == 2) return functions<Decoder<2>>(m);
  if (m.bits == 3) return functions<Decoder<3>>(m);
  if (m.bits == 4) return functions<Decoder<4>>(m);
  return functions<Decoder<8>>(m);
}

template <class F>
void parallel(int64_t end, int64_t grain, const F& f) {
  auto body = [](int64_t from, int64_t to, void* context) {
    (*static_cast<const F*>(context))(from, to);
  };
  torch_parallel_for(0, end, grain, body, const_cast<F*>(&f));
}

}  // namespace

extern "C" {

const char* vc_instruction_set() { return vec::kName; }

// x [tokens, cols] with rows `x_stride` apart, out [tokens, rows] contiguous, bias [rows] or null.
void vc_linear(const Matrix* matrix, const void* x, int32_t x_dtype, int64_t tokens, int64_t cols,
               int64_t x_stride, const float* bias, void* out, int32_t mode) {
  const Matrix& m = *matrix;
  const Dtype dtype = static_cast<Dtype>(x_dtype);
  const Mode how = static_cast<Mode>(mode);
  const bool exact = how == Mode::kExact;
  const Functions run = functions_of(m);
  const Body body = exact ? run.exact : run.quantized;
  const int64_t blocks = (m.rows + kRows - 1) / kRows, width = m.lines * kLine;
  static thread_local Activations scratch;
  Activations& in = scratch;
  for (int64_t first = 0; first < tokens; first += kMostTokens) {
    const int64_t count = std::min(kMostTokens, tokens - first);
    in.resize(count, m.lines, m.groups, m.group, exact);
    parallel(count, std::max<int64_t>(1, kWork / 16 / width), [&](int64_t a, int64_t b) {
      for (int64_t t = a; t < b; ++t) in.fill(t, x, (first + t) * x_stride, cols, dtype, how);
    });
    const Call call{m, in, bias, out, first, dtype};
    parallel(blocks, std::max<int64_t>(1, kWork / (kRows * width * count)),
             [&](int64_t a, int64_t b) { body(call, a * kRows, std::min(b * kRows, m.rows)); });
  }
}

// out [count, cols] float32: rows `ids` of the matrix.
void vc_embed(const Matrix* matrix, const int64_t* ids, int64_t count, int64_t cols, float* out) {
  const Matrix& m = *matrix;
  const LookUp body = functions_of(m).look_up;
  parallel(count, std::max<int64_t>(1, kWork / 16 / (m.lines * kLine)), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) body(m, ids[i], cols, out + i * cols);
  });
}
}
