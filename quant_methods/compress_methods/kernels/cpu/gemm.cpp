// out[tokens, rows] = x[tokens, cols] * W[rows, cols]^T for weights of few bits, and row look-up.
//
// One product for every decoder: a row's lines are decoded to bytes in registers and multiplied
// with up to `kTokens` tokens before the next line is read. Blocks of rows go to torch's own
// threads; in a block, the tokens of a tile stay in the first-level cache while its rows pass by.
// Zero points come in as scale * zero * (sum of the group's activations), so the inner loop never
// sees them. Sparse lines take longer to decode; where tokens fill more than a tile, a block's rows
// are decoded once, to dense lines in the second-level cache. Many tokens go another way
// (`panel.h`) where there is AVX-512.
//
//   value = scale * (code - zero)
//   out   = sum over groups of scale * (sum of code * x  -  zero * sum of x)

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "matrix.h"
#ifdef VC_PANELS
#include "blocks.h"
#endif

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

namespace {

constexpr int kTokens = vec::kTokens;
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

// One row, whose lines of `bytes` begin at `p`, times `tokens` tokens from `token` on: totals
// before zero points.
template <class Code, int group, bool exact, int tokens>
void row_times_tokens(const uint8_t* p, int64_t bytes, const RowTerms& terms, const Activations& in,
                      int64_t token, float* totals) {
  // A vector of 64 columns may hold two groups of 32.
  constexpr int kWide = group < vec::kBytes ? vec::kBytes : group;
  constexpr int kParts = kLine / kWide, kPerPart = kWide / vec::kBytes, kSplit = kWide / group;
  const int64_t width = in.width();
  const int8_t* q = exact ? nullptr : in.codes.data() + token * width;
  const float* x = exact ? in.values.data() + token * width : nullptr;
  const float* q_scales = exact ? nullptr : in.scales.data() + token * in.lines;
  vec::Floats sums[tokens];
  for (auto& sum : sums) sum = vec::zero();
  for (int64_t at = 0; at < in.lines; ++at, p += bytes) {
    typename Code::Line line;
    Code::decode(p, bytes, line);
    fetch_ahead(p, bytes);
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
#ifdef VC_PANELS
  panel::Decode int8, uint8, bfloat16, float32;
  bool is_signed;
#endif
};

template <class Code, bool exact>
Body body_of(int group) {
  if (group == 32) return rows_times_tokens<Code, 32, exact>;
  if (group == 64) return rows_times_tokens<Code, 64, exact>;
  return rows_times_tokens<Code, kLine, exact>;
}

template <class Code>
Functions functions(const Matrix& m) {
  return {
      body_of<Code, true>(m.group),
      body_of<Code, false>(m.group),
      look_up<Code>,
#ifdef VC_PANELS
      panel::decode<Code, panel::Int8>,
      panel::decode<Code, panel::Uint8>,
      panel::decode<Code, panel::Bfloat16>,
      panel::decode<Code, panel::Float32>,
      Code::kSigned,
#endif
  };
}

template <bool is_bfloat16>
Functions functions_of_floats() {
  using Code = SparseFloats<is_bfloat16>;
  const Body exact = rows_times_tokens<Code, kLine, true>;
  return {
      exact,
      exact,
      look_up<Code>,
#ifdef VC_PANELS
      nullptr,
      nullptr,
      is_bfloat16 ? panel::decode<Code, panel::Bfloat16> : nullptr,
      panel::decode<Code, panel::Float32>,
      true,
#endif
  };
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

// What `vc_linear` is asked for.
struct Request {
  const Matrix& m;
  const void* x;
  Dtype dtype;
  int64_t tokens, cols, stride;
  const float* bias;
  void* out;
  Mode how;
};

void few_tokens(const Request& r, const Functions& run) {
  const Matrix& m = r.m;
  const bool exact = r.how == Mode::kExact;
  const Body body = exact ? run.exact : run.quantized;
  const int64_t blocks = (m.rows + kRows - 1) / kRows, width = m.lines * kLine;
  const int offset = m.bits == 8 || m.sparse ? vec::kSignedOffset : 0;
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

#ifdef VC_PANELS
void many_tokens(const Request& r, const Functions& run) {
  using namespace panel;
  const Matrix& m = r.m;
  const bool exact = r.how == Mode::kExact;
  const bool bfloat16 = r.dtype == Dtype::kBfloat16 && run.bfloat16;
  const int parts = m.group == 0 || m.group > kLine ? 1 : kLine / m.group;
  const Product product = parts == 1   ? product_of<1>(m, exact, bfloat16)
                          : parts == 2 ? product_of<2>(m, exact, bfloat16)
                                       : product_of<4>(m, exact, bfloat16);
  const Decode decode = product.size == 4   ? run.float32
                        : product.size == 2 ? run.bfloat16
                        : product.start     ? run.int8
                                            : run.uint8;
  // Zeros of unsigned codes; signed ones of 8 bits count from 128.
  const int zero = run.is_signed ? 128 : 1 << (m.bits - 1);
  const float more = run.is_signed && !product.start ? 128.0f : 0.0f;
  const Filling filling{r.how == Mode::kInt8PerToken, m.zeros != nullptr, zero};
  static thread_local Panel scratch;
  Panel& in = scratch;
  for (int64_t first = 0; first < r.tokens; first += kMostTokens) {
    in.resize(std::min(kMostTokens, r.tokens - first), m.lines, parts, product.size, m.zeros);
    const Input input{r.x, r.stride, r.cols, first, r.dtype};
    parallel(in.tiles, 1, [&](int64_t a, int64_t b) {
      for (int64_t tile = a; tile < b; ++tile) {
        if (!exact) {
          fill_int8(in, tile, input, filling);
        } else if (product.size == 2) {
          fill_exact<Bfloat16>(in, tile, input);
        } else {
          fill_exact<Float32>(in, tile, input);
        }
      }
    });
    const Output to{r.bias, r.out, first, m.rows, r.dtype};
    parallel((m.rows + kBlockRows - 1) / kBlockRows, 1, [&](int64_t a, int64_t b) {
      multiply_rows(m, in, decode, product, more, to, a * kBlockRows,
                    std::min(b * kBlockRows, m.rows));
    });
  }
}
#endif

}  // namespace

extern "C" {

// x [tokens, cols] with rows `x_stride` apart, out [tokens, rows] contiguous, bias [rows] or null.
void vc_linear(const Matrix* matrix, const void* x, int32_t x_dtype, int64_t tokens, int64_t cols,
               int64_t x_stride, const float* bias, void* out, int32_t mode) {
  const Functions run = functions_of(*matrix);
  const bool floats = run.exact == run.quantized;  // which activations are not quantized for
  const Mode how = floats ? Mode::kExact : static_cast<Mode>(mode);
  const Request request{*matrix, x,  static_cast<Dtype>(x_dtype), tokens, cols, x_stride, bias,
                        out,     how};
#ifdef VC_PANELS
  if (tokens >= panel::fewest_tokens(how == Mode::kExact, matrix->sparse)) {
    return many_tokens(request, run);
  }
#endif
  few_tokens(request, run);
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
