// Activations for blocks of rows: int8, bfloat16 or float32, with what scales and zero points need
// once per step of columns.
//
// A step is the columns whose products are summed before they are scaled: a weight group, at most
// the line that shares a scale of activations, or a whole chunk where only rows and tokens have
// scales. Chunks of columns are kept apart so that tokens are a constant distance from each other.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "matrix.h"

namespace block {

constexpr int64_t kChunk = 512, kStride = kChunk + 64;  // bytes, and from a token to the next
constexpr int64_t kTileTokens = 16;                     // of AMX
constexpr int64_t kMostBytes = 1 << 20;                 // held at a time in the second-level cache

// Memory that only grows, on cache lines.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* of(int64_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64 / sizeof(T);
      data_ = static_cast<T*>(std::aligned_alloc(64, size_ * sizeof(T)));
      if (!data_) std::abort();
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

struct Inputs {
  int64_t tokens = 0, padded = 0;  // to whole tiles
  int64_t lines = 0, size = 1;     // bytes of a value
  int64_t step = kLine;            // columns
  Buffer<uint8_t> data;            // [chunks, padded, kStride]
  Buffer<float> scales;            // [steps, padded], of int8
  Buffer<int32_t> sums;            // the same: see `pair_of`, or bits of a float

  int64_t chunk() const { return kChunk / size; }  // columns
  int64_t chunks() const { return (lines * kLine + chunk() - 1) / chunk(); }
  int64_t steps() const { return (lines * kLine + step - 1) / step; }
  uint8_t* line_of(int64_t token, int64_t line) const {
    const int64_t column = line * kLine;
    return data.data() + (column / chunk() * padded + token) * kStride + column % chunk() * size;
  }

  void resize(int64_t tokens_, int64_t lines_, int64_t step_, int64_t size_) {
    tokens = tokens_, lines = lines_, step = step_, size = size_;
    padded = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
    data.of(chunks() * padded * kStride);
    scales.of(steps() * padded);
    sums.of(steps() * padded);
  }

  // Tokens that only fill tiles are zeros, as what lay there before may be slow to add.
  void clear_padding() {
    const int64_t count = padded - tokens;
    for (int64_t i = 0; i < chunks(); ++i) {
      std::memset(data.data() + (i * padded + tokens) * kStride, 0, count * kStride);
    }
    for (int64_t i = 0; i < steps(); ++i) {
      std::fill_n(scales.data() + i * padded + tokens, count, 0.0f);
      std::fill_n(sums.data() + i * padded + tokens, count, 0);
    }
  }
};

// Two halves whose sum is -`sum`: together they fit 16 bits each up to 512 columns of int8.
inline int32_t pair_of(int32_t sum) {
  const int32_t low = std::clamp(-sum, -32768, 32767), high = -sum - low;
  return static_cast<int32_t>(static_cast<uint32_t>(high) << 16 | (low & 0xffff));
}

inline __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

// 16 values from `at` on as floats; beyond `count` of them zeros.
inline __m512 read_16(const void* row, int64_t at, int64_t count, Dtype dtype) {
  const __mmask16 mask = first(count);
  if (dtype == Dtype::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + at);
  }
  if (dtype == Dtype::kE8m0 || dtype == Dtype::kE4m3) {
    const __m128i codes = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(row) + at);
    if (dtype == Dtype::kE4m3) {
      return _mm512_mul_ps(vec::halves_of_e4m3(codes), _mm512_set1_ps(kE4m3Unit));
    }
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(codes), 23);
    return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x400000)));
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + at);
  if (dtype == Dtype::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// One token's values, the first of them x[at].
struct Row {
  const void* x;
  int64_t at, cols;
  Dtype dtype;

  void read_line(int64_t line, __m512* to) const {
    for (int i = 0; i < 8; ++i) {
      const int64_t column = line * kLine + 16 * i;
      to[i] = read_16(x, at + column, cols - column, dtype);
    }
  }
};

// Greatest magnitude's bits of a line.
inline uint32_t most_bits(const __m512* x) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude));
  }
  return _mm512_reduce_max_epu32(most);
}

// Whether 16 columns from `column` on are the last of a step, and of which.
struct End {
  bool here;
  int64_t place;  // in [steps, padded]
};
inline End end_of(const Inputs& in, int64_t token, int64_t column) {
  const int64_t next = column + 16;
  return {next % in.step == 0 || next == in.lines * kLine, column / in.step * in.padded + token};
}

// Columns whose products are summed before they are scaled.
inline int64_t columns_of_step(const Matrix& m, Mode how, int64_t size) {
  if (m.group == 0) return how == Mode::kInt8PerLine ? kLine : kChunk / size;
  return std::min<int64_t>(m.group, kLine);
}

inline void fill_int8(Inputs& in, int64_t token, const Row& row, bool per_token) {
  __m512 x[8];
  uint32_t row_most = 0;
  for (int64_t at = 0; per_token && at < in.lines; ++at) {
    row.read_line(at, x);
    row_most = std::max(row_most, most_bits(x));
  }
  __m512i sum = _mm512_setzero_si512();
  for (int64_t at = 0; at < in.lines; ++at) {
    uint8_t* out = in.line_of(token, at);
    row.read_line(at, x);
    const Step step = step_of(from_bits(per_token ? row_most : most_bits(x)));
    const __mmask16 known = step.inverse == 0.0f ? 0 : 0xffff;
    for (int i = 0; i < 8; ++i) {
      const __m512 scaled = _mm512_mul_ps(x[i], _mm512_set1_ps(step.inverse));
      const __m512i code = _mm512_maskz_cvtps_epi32(known, scaled);
      _mm_store_si128(reinterpret_cast<__m128i*>(out + 16 * i), _mm512_cvtepi32_epi8(code));
      sum = _mm512_add_epi32(sum, code);
      const End end = end_of(in, token, at * kLine + 16 * i);
      if (!end.here) continue;
      in.scales.data()[end.place] = step.scale;
      in.sums.data()[end.place] = pair_of(_mm512_reduce_add_epi32(sum));
      sum = _mm512_setzero_si512();
    }
  }
}

// Values as they are: float32, or bfloat16 where they are that.
inline void fill_exact(Inputs& in, int64_t token, const Row& row) {
  __m512 x[8], sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < in.lines; ++at) {
    uint8_t* out = in.line_of(token, at);
    row.read_line(at, x);
    for (int i = 0; i < 8; ++i) {
      if (in.size == 4) {
        _mm512_store_ps(out + 64 * i, x[i]);
      } else {
        const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(x[i]), 16);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + 32 * i), _mm512_cvtepi32_epi16(upper));
      }
      sum = _mm512_add_ps(sum, x[i]);
      const End end = end_of(in, token, at * kLine + 16 * i);
      if (!end.here) continue;
      in.sums.data()[end.place] = static_cast<int32_t>(to_bits(_mm512_reduce_add_ps(sum)));
      sum = _mm512_setzero_ps();
    }
  }
}

}  // namespace block
