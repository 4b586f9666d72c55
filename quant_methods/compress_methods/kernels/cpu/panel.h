// Many tokens: 16 of them side by side in a vector, rows of weights broadcast or in AMX tiles.
//
// Activations are brought into a panel once per call: for every tile of 16 tokens and every line of
// 128 columns, dwords of consecutive columns (4 bytes, 2 bfloat16 or 1 float), token after token,
// which is at once what VNNI and FMA multiply with a broadcast dword of a row and what AMX takes as
// its right-hand tile. Weights are decoded a block of rows and `kBlockLines` lines at a time, to
// stay in the second-level cache while all tokens pass by.
//
// VNNI takes unsigned codes: int32 sums start at -zero * (sum of activations) where all zeros are
// the same, other zeros come in as floats when sums are scaled. The rest takes codes less zeros:
// signed bytes, where 8 bits with zeros other than 128 again need them later, or up to 9 bits with
// the sign, which bfloat16 holds exactly.
#pragma once

#include <cstdlib>
#include <utility>

#include "matrix.h"

namespace panel {

constexpr int kTile = 16;           // tokens
constexpr int64_t kBlockRows = 32;  // decoded at a time
constexpr int64_t kBlockLines = 32;
constexpr int kChunk = 64 * kTile;  // bytes of a dword of columns times 16, of 16 tokens

// What is multiplied: bytes a column takes, and chunks of a line.
struct Int8 {
  static constexpr int kSize = 1, kChunks = 2;
  static constexpr bool kIsInt8 = true, kIsSigned = true;
};
struct Uint8 : Int8 {
  static constexpr bool kIsSigned = false;
};
struct Bfloat16 {
  static constexpr int kSize = 2, kChunks = 4;
  static constexpr bool kIsInt8 = false;
};
struct Float32 {
  static constexpr int kSize = 4, kChunks = 8;
  static constexpr bool kIsInt8 = false;
};

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

struct Panel {
  int64_t tokens = 0, tiles = 0, lines = 0, line_bytes = 0;
  int64_t parts = 1;       // groups of a line
  Buffer<uint8_t> data;    // [tiles, lines, line_bytes]
  Buffer<float> scales;    // [tiles, lines, 16], int8 only
  Buffer<int32_t> starts;  // [tiles, lines * parts, 16], int8 only
  Buffer<float> sums;      // the same, where zeros differ

  void resize(int64_t tokens_, int64_t lines_, int64_t parts_, int size, bool zeros_differ) {
    tokens = tokens_, tiles = (tokens + kTile - 1) / kTile, lines = lines_, parts = parts_;
    line_bytes = kLine * kTile * size;
    data.of(tiles * lines * line_bytes);
    if (size > 1) return;
    scales.of(tiles * lines * kTile);
    starts.of(tiles * lines * parts * kTile);
    if (zeros_differ) sums.of(tiles * lines * parts * kTile);
  }
};

// Rows x columns of 16 dwords each, exchanged.
inline void transpose(__m512i* v) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline __mmask16 first(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1 << count) - 1);
}

// 16 values from column `at` on as floats; beyond `cols` zeros.
inline __m512 read_16(const void* row, int64_t at, int64_t cols, Dtype dtype) {
  const __mmask16 mask = first(cols - at);
  if (dtype == Dtype::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + at);
  }
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + at);
  if (dtype == Dtype::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Activations of which those from token `first` on fill a panel.
struct Input {
  const void* x;
  int64_t stride, cols, first;
  Dtype dtype;

  const void* row(int64_t token) const {
    const int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
    return static_cast<const uint8_t*>(x) + (first + token) * stride * size;
  }
};

// One tile of floats or bfloat16, as they are.
template <class Kind>
void fill_exact(Panel& panel, int64_t tile, const Input& in) {
  const int64_t count = std::min<int64_t>(kTile, panel.tokens - tile * kTile);
  for (int64_t at = 0; at < panel.lines; ++at) {
    uint8_t* out = panel.data.data() + (tile * panel.lines + at) * panel.line_bytes;
    for (int chunk = 0; chunk < Kind::kChunks; ++chunk, out += kChunk) {
      const int64_t column = at * kLine + chunk * (64 / Kind::kSize);
      __m512i rows[kTile];
      for (int64_t t = 0; t < kTile; ++t) {
        rows[t] = _mm512_setzero_si512();
        if (t >= count) continue;
        const void* row = in.row(tile * kTile + t);
        if constexpr (Kind::kSize == 4) {
          rows[t] = _mm512_castps_si512(read_16(row, column, in.cols, in.dtype));
        } else {
          const int64_t left = in.cols - column;
          const __mmask32 mask = left >= 32 ? ~0u : left <= 0 ? 0 : (1u << left) - 1;
          rows[t] = _mm512_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + column);
        }
      }
      transpose(rows);
      for (int i = 0; i < kTile; ++i) _mm512_store_si512(out + 64 * i, rows[i]);
    }
  }
}

// Greatest magnitude's bits of a line, eight vectors of 16.
inline uint32_t most_bits(const __m512* x) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int i = 0; i < 8; ++i) {
    most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_castps_si512(x[i]), magnitude));
  }
  return _mm512_reduce_max_epu32(most);
}

// One scale for each token or for each of its lines; `zero` is that of all weights, unless they
// differ.
struct Filling {
  bool per_token, zeros_differ;
  int zero;
};

// One tile of int8.
inline void fill_int8(Panel& panel, int64_t tile, const Input& in, const Filling& how) {
  const int64_t count = std::min<int64_t>(kTile, panel.tokens - tile * kTile);
  uint32_t row_most[kTile] = {};
  alignas(64) int32_t totals[4][kTile];
  __m512 x[8];
  for (int64_t t = 0; how.per_token && t < count; ++t) {
    const void* row = in.row(tile * kTile + t);
    for (int64_t at = 0; at < panel.lines; ++at) {
      for (int i = 0; i < 8; ++i) x[i] = read_16(row, at * kLine + 16 * i, in.cols, in.dtype);
      row_most[t] = std::max(row_most[t], most_bits(x));
    }
  }
  for (int64_t at = 0; at < panel.lines; ++at) {
    __m512i low[kTile], high[kTile];
    float* scales = panel.scales.data() + (tile * panel.lines + at) * kTile;
    for (int64_t t = 0; t < kTile; ++t) {
      low[t] = high[t] = _mm512_setzero_si512();
      scales[t] = 0;
      for (auto& total : totals) total[t] = 0;
      if (t >= count) continue;
      const void* row = in.row(tile * kTile + t);
      for (int i = 0; i < 8; ++i) x[i] = read_16(row, at * kLine + 16 * i, in.cols, in.dtype);
      const Step step = step_of(from_bits(how.per_token ? row_most[t] : most_bits(x)));
      scales[t] = step.scale;
      if (step.inverse == 0.0f) continue;
      __m128i codes[8];
      __m512i quarters[4];
      for (int i = 0; i < 8; ++i) {
        const __m512 scaled = _mm512_mul_ps(x[i], _mm512_set1_ps(step.inverse));
        const __m512i code = _mm512_cvtps_epi32(scaled);
        codes[i] = _mm512_cvtepi32_epi8(code);
        quarters[i / 2] = i % 2 ? _mm512_add_epi32(quarters[i / 2], code) : code;
      }
      for (int i = 0; i < 4; ++i) totals[i][t] = _mm512_reduce_add_epi32(quarters[i]);
      for (int i = 0; i < 4; ++i) {
        low[t] = i ? _mm512_mask_broadcast_i32x4(low[t], 0xf << 4 * i, codes[i])
                   : _mm512_castsi128_si512(codes[0]);
        high[t] = i ? _mm512_mask_broadcast_i32x4(high[t], 0xf << 4 * i, codes[4 + i])
                    : _mm512_castsi128_si512(codes[4]);
      }
    }
    uint8_t* out = panel.data.data() + (tile * panel.lines + at) * panel.line_bytes;
    transpose(low), transpose(high);
    for (int i = 0; i < kTile; ++i) {
      _mm512_store_si512(out + 64 * i, low[i]);
      _mm512_store_si512(out + kChunk + 64 * i, high[i]);
    }
    const int64_t merged = 4 / panel.parts;
    for (int64_t part = 0; part < panel.parts; ++part) {
      __m512i sum = _mm512_load_si512(totals[part * merged]);
      for (int64_t i = 1; i < merged; ++i) {
        sum = _mm512_add_epi32(sum, _mm512_load_si512(totals[part * merged + i]));
      }
      const int64_t place = ((tile * panel.lines + at) * panel.parts + part) * kTile;
      if (how.zeros_differ) {
        const __m512 factors = _mm512_load_ps(scales);
        _mm512_store_ps(panel.sums.data() + place, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factors));
        sum = _mm512_setzero_si512();
      }
      const __m512i start = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-how.zero));
      _mm512_store_si512(panel.starts.data() + place, start);
    }
  }
}

// Decoded rows of a block, and what their sums are multiplied by.
struct Block {
  Buffer<uint8_t> weights;        // [kBlockLines, kBlockRows, bytes of a line]
  Buffer<float> scales, offsets;  // [kBlockRows, lines * parts]
  Buffer<float> sums;             // [tiles, kBlockRows, 16]
};

}  // namespace panel
