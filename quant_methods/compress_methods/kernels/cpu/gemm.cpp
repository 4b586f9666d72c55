// out[tokens, rows] = x[tokens, cols] * W[rows, cols]^T for weights of few bits, and row look-up.
//
// One product for every decoder: a row's lines are decoded to bytes in registers and multiplied with
// up to `kTokens` tokens before the next line is read. Blocks of rows go to torch's own threads; in
// a block, the tokens of a tile stay in the first-level cache while its rows pass by. Zero points
// come in as scale * zero * (sum of the group's activations), so the inner loop never sees them.
//
//   value = scale * (code - zero)
//   out   = sum over groups of scale * (sum of code * x  -  zero * sum of x)

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activations.h"

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

namespace {

constexpr int kTokens = 4;
constexpr int64_t kRows = 16;
constexpr int64_t kMostTokens = 512;  // whose activations are held at a time
constexpr int64_t kWork = 1 << 17;    // multiplications worth a thread

struct Matrix {
  const uint8_t* weights;  // [rows, lines, Decoder::kBytes]
  const void* scales;      // [rows, groups]
  const uint8_t* zeros;    // [rows, groups], or null: every zero is 2^(bits - 1)
  int64_t rows, lines, groups;
  int32_t bits, group;  // columns per group, 0 for the whole row
  Dtype scale_dtype;
};

struct Call {
  const Matrix& matrix;
  const Activations& in;
  const float* bias;
  void* out;
  int64_t first;  // token of `out` that is the first of `in`
  Dtype dtype;
};

// What a row's groups are multiplied by: scales (ones if the row has one, which is `factor` then),
// zeros as the decoder counts codes, and the product of the two.
struct RowTerms {
  std::vector<float> scales, zeros, offsets;
  float factor = 1;

  void load(const Matrix& m, int64_t row) {
    const float shift = m.bits == 8 ? 128.0f : 0.0f;
    const float middle = static_cast<float>(1 << (m.bits - 1)) - shift;
    zeros.assign(m.groups, middle);
    if (m.zeros) {
      const uint8_t* stored = m.zeros + row * m.groups;
      for (int64_t g = 0; g < m.groups; ++g) zeros[g] = static_cast<float>(stored[g]) - shift;
    }
    if (m.group == 0) {
      read_floats(m.scales, row, 1, m.scale_dtype, &factor);
      scales.assign(m.lines, 1.0f);
    } else {
      factor = 1;
      scales.resize(m.groups);
      read_floats(m.scales, row * m.groups, m.groups, m.scale_dtype, scales.data());
    }
    offsets.resize(m.groups);
    for (int64_t g = 0; g < m.groups; ++g) offsets[g] = scales[g] * zeros[g];
  }

  float correction(const float* sums) const {
    float part[8] = {};
    const int64_t count = static_cast<int64_t>(offsets.size());
    int64_t g = 0;
    for (; g + 8 <= count; g += 8) {
      for (int i = 0; i < 8; ++i) part[i] += offsets[g + i] * sums[g + i];
    }
    for (; g < count; ++g) part[0] += offsets[g] * sums[g];
    return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
  }
};

template <bool is_signed, int first, int tokens>
inline void multiply_widened(const vec::Bytes& w, const float* x, int64_t stride,
                             vec::Floats* sums) {
  const vec::Floats value = vec::widen<is_signed, first>(w);
  for (int t = 0; t < tokens; ++t) {
    const vec::Floats in = vec::load_floats(x + t * stride + 8 * first);
    sums[t] = vec::multiply_add(value, in, sums[t]);
  }
}

// One row times `tokens` tokens from `token` on: totals before zero points.
template <int bits, int group, bool exact, int tokens>
void row_times_tokens(const Matrix& m, int64_t row, const RowTerms& terms, const Activations& in,
                      int64_t token, float* totals) {
  using Code = Decoder<bits>;
  constexpr int kGroups = kLine / group, kPerGroup = group / 32;
  const int64_t width = in.width();
  const uint8_t* p = m.weights + row * m.lines * Code::kBytes;
  const int8_t* q = exact ? nullptr : in.codes.data() + token * width;
  const float* x = exact ? in.values.data() + token * width : nullptr;
  const float* q_scales = exact ? nullptr : in.scales.data() + token * m.lines;
  vec::Floats sums[tokens];
  for (auto& sum : sums) sum = vec::zero();
  for (int64_t line = 0; line < m.lines; ++line, p += Code::kBytes) {
    vec::Bytes w[kVectors];
    Code::decode(p, w);
    for (int g = 0; g < kGroups; ++g) {
      const float scale = terms.scales[line * kGroups + g];
      const vec::Bytes* mine = w + g * kPerGroup;
      const int64_t column = line * kLine + g * group;
      if constexpr (exact) {
        vec::Floats parts[tokens];
        for (auto& part : parts) part = vec::zero();
        for (int v = 0; v < kPerGroup; ++v) {
          const float* at = x + column + 32 * v;
          multiply_widened<Code::kSigned, 0, tokens>(mine[v], at, width, parts);
          multiply_widened<Code::kSigned, 1, tokens>(mine[v], at, width, parts);
          multiply_widened<Code::kSigned, 2, tokens>(mine[v], at, width, parts);
          multiply_widened<Code::kSigned, 3, tokens>(mine[v], at, width, parts);
        }
        for (int t = 0; t < tokens; ++t) sums[t] = vec::scale_add(parts[t], scale, sums[t]);
      } else {
        for (int t = 0; t < tokens; ++t) {
          const vec::Ints dot = vec::dot<Code::kSigned, kPerGroup>(mine, q + t * width + column);
          sums[t] = vec::scale_add(dot, scale * q_scales[t * m.lines + line], sums[t]);
        }
      }
    }
  }
  for (int t = 0; t < tokens; ++t) totals[t] = vec::total(sums[t]);
}

template <int bits, int group, bool exact>
void rows_times_tokens(const Call& call, int64_t first, int64_t last) {
  using Function = decltype(&row_times_tokens<bits, group, exact, 1>);
  constexpr Function kTile[kTokens] = {
      row_times_tokens<bits, group, exact, 1>, row_times_tokens<bits, group, exact, 2>,
      row_times_tokens<bits, group, exact, 3>, row_times_tokens<bits, group, exact, 4>};
  const Matrix& m = call.matrix;
  const Activations& in = call.in;
  thread_local RowTerms terms[kRows];
  for (int64_t block = first; block < last; block += kRows) {
    const int64_t rows = std::min(kRows, last - block);
    for (int64_t r = 0; r < rows; ++r) terms[r].load(m, block + r);
    for (int64_t token = 0; token < in.tokens; token += kTokens) {
      const int64_t count = std::min<int64_t>(kTokens, in.tokens - token);
      for (int64_t r = 0; r < rows; ++r) {
        float totals[kTokens];
        kTile[count - 1](m, block + r, terms[r], in, token, totals);
        for (int64_t t = 0; t < count; ++t) {
          const float* sums = in.sums.data() + (token + t) * in.groups;
          float value = terms[r].factor * (totals[t] - terms[r].correction(sums));
          if (call.bias) value += call.bias[block + r];
          write_float(call.out, (call.first + token + t) * m.rows + block + r, call.dtype, value);
        }
      }
    }
  }
}

// One row as floats: scale * (code - zero).
template <int bits>
void look_up(const Matrix& m, int64_t row, int64_t cols, float* out) {
  using Code = Decoder<bits>;
  thread_local RowTerms terms;
  terms.load(m, row);
  const uint8_t* p = m.weights + row * m.lines * Code::kBytes;
  const int64_t step = m.group == 0 ? m.lines * kLine : m.group;
  for (int64_t line = 0; line < m.lines; ++line, p += Code::kBytes) {
    vec::Bytes w[kVectors];
    Code::decode(p, w);
    const int64_t count = std::min<int64_t>(kLine, cols - line * kLine);
    for (int64_t i = 0; i < count; ++i) {
      uint8_t byte;
      std::memcpy(&byte, reinterpret_cast<const uint8_t*>(w) + i, 1);
      const float code = Code::kSigned ? static_cast<int8_t>(byte) : byte;
      const int64_t group = (line * kLine + i) / step;
      out[line * kLine + i] = terms.factor * terms.scales[group] * (code - terms.zeros[group]);
    }
  }
}

using Body = void (*)(const Call&, int64_t, int64_t);

template <int bits, bool exact>
Body body_of(int group) {
  if (group == 32) return rows_times_tokens<bits, 32, exact>;
  if (group == 64) return rows_times_tokens<bits, 64, exact>;
  return rows_times_tokens<bits, kLine, exact>;
}

template <bool exact>
Body body_of(int bits, int group) {
  if (bits == 2) return body_of<2, exact>(group);
  if (bits == 3) return body_of<3, exact>(group);
  if (bits == 4) return body_of<4, exact>(group);
  return body_of<8, exact>(group);
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
void vc_linear(const uint8_t* weights, const void* scales, const uint8_t* zeros, int64_t rows,
               int64_t lines, int64_t groups, int32_t bits, int32_t group, int32_t scale_dtype,
               const void* x, int32_t x_dtype, int64_t tokens, int64_t cols, int64_t x_stride,
               const float* bias, void* out, int32_t mode) {
  const Matrix m{weights, scales, zeros, rows, lines,
                 groups,  bits,   group, static_cast<Dtype>(scale_dtype)};
  const Dtype dtype = static_cast<Dtype>(x_dtype);
  const Mode how = static_cast<Mode>(mode);
  const bool exact = how == Mode::kExact;
  const Body body = exact ? body_of<true>(bits, group) : body_of<false>(bits, group);
  const int64_t blocks = (rows + kRows - 1) / kRows, width = lines * kLine;
  static thread_local Activations scratch;
  Activations& in = scratch;
  for (int64_t first = 0; first < tokens; first += kMostTokens) {
    const int64_t count = std::min(kMostTokens, tokens - first);
    in.resize(count, lines, groups, group, exact);
    parallel(count, std::max<int64_t>(1, kWork / 16 / width), [&](int64_t a, int64_t b) {
      for (int64_t t = a; t < b; ++t) in.fill(t, x, (first + t) * x_stride, cols, dtype, how);
    });
    const Call call{m, in, bias, out, first, dtype};
    parallel(blocks, std::max<int64_t>(1, kWork / (kRows * width * count)),
             [&](int64_t a, int64_t b) { body(call, a * kRows, std::min(b * kRows, rows)); });
  }
}

// out [count, cols] float32: rows `ids` of the matrix.
void vc_embed(const uint8_t* weights, const void* scales, const uint8_t* zeros, int64_t rows,
              int64_t lines, int64_t groups, int32_t bits, int32_t group, int32_t scale_dtype,
              const int64_t* ids, int64_t count, int64_t cols, float* out) {
  const Matrix m{weights, scales, zeros, rows, lines,
                 groups,  bits,   group, static_cast<Dtype>(scale_dtype)};
  const auto body = bits == 2   ? look_up<2>
                    : bits == 3 ? look_up<3>
                    : bits == 4 ? look_up<4>
                                : look_up<8>;
  parallel(count, std::max<int64_t>(1, kWork / 16 / (lines * kLine)), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) body(m, ids[i], cols, out + i * cols);
  });
}
}
