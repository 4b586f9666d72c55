// Blocks of rows: decoded, multiplied with all tiles of a panel, written.
#pragma once

#include "tiles.h"

namespace panel {

// `rows` rows from `row` on, `lines` lines from `line` on, into `block`.
using Decode = void (*)(const Matrix& m, const RowTerms* terms, int64_t row, int64_t rows,
                        int64_t line, int64_t lines, Block& block);

template <class Code>
VC_INLINE __m512 values_of(const typename Code::Line& line, int i) {
  if constexpr (std::is_same_v<typename Code::Line, Values>) {
    return line.v[i].v;
  } else {
    const vec::Bytes bytes = line.v[i / 4];
    switch (i % 4) {
      case 0:
        return vec::widen<Code::kSigned, 0>(bytes).v;
      case 1:
        return vec::widen<Code::kSigned, 1>(bytes).v;
      case 2:
        return vec::widen<Code::kSigned, 2>(bytes).v;
      default:
        return vec::widen<Code::kSigned, 3>(bytes).v;
    }
  }
}

// Where the upper halves of 16 and 16 dwords are: what bfloat16 keeps of floats.
struct Halves {
  uint16_t v[32];
};
alignas(64) inline constexpr Halves kUpperHalves = [] {
  Halves out = {};
  for (int i = 0; i < 32; ++i) out.v[i] = static_cast<uint16_t>(2 * i + 1);
  return out;
}();

template <class Code, class Kind>
VC_INLINE void store_line(const typename Code::Line& line, const float* zeros, int64_t step,
                          uint8_t* out) {
  if constexpr (Kind::kIsInt8) {
    for (int i = 0; i < kVectors; ++i, out += 64) {
      __m512i codes = line.v[i].v;
      if constexpr (Kind::kIsSigned && !Code::kSigned) {
        __m512i zero = _mm512_set1_epi8(static_cast<char>(zeros[64 * i / step]));
        if (step == 32) {
          const char second = static_cast<char>(zeros[2 * i + 1]);
          zero = _mm512_mask_set1_epi8(zero, 0xffffffff00000000, second);
        }
        codes = _mm512_sub_epi8(codes, zero);
      } else if constexpr (Code::kSigned && !Kind::kIsSigned) {
        codes = _mm512_xor_si512(codes, _mm512_set1_epi8(static_cast<char>(128)));
      }
      _mm512_store_si512(out, codes);
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2, out += 32 * Kind::kSize) {
      const __m512 first =
          _mm512_sub_ps(values_of<Code>(line, i), _mm512_set1_ps(zeros[16 * i / step]));
      const __m512 second =
          _mm512_sub_ps(values_of<Code>(line, i + 1), _mm512_set1_ps(zeros[16 * (i + 1) / step]));
      if constexpr (Kind::kSize == 4) {
        _mm512_store_ps(out, first);
        _mm512_store_ps(out + 64, second);
      } else {
        const __m512i upper = _mm512_load_si512(kUpperHalves.v);
        _mm512_store_si512(out, _mm512_permutex2var_epi16(_mm512_castps_si512(first), upper,
                                                          _mm512_castps_si512(second)));
      }
    }
  }
}

template <class Code, class Kind>
void decode(const Matrix& m, const RowTerms* terms, int64_t row, int64_t rows, int64_t line,
            int64_t lines, Block& block) {
  constexpr int64_t kLineBytes = kLine * Kind::kSize;
  const int64_t step = m.group == 0 || m.group > kLine ? kLine : m.group;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* p = m.weights + ((row + r) * m.lines + line) * m.bytes;
    uint8_t* out = block.weights.data() + r * kLineBytes;
    for (int64_t at = 0; at < lines; ++at, p += m.bytes) {
      fetch_ahead(p, m.bytes);
      typename Code::Line decoded;
      Code::decode(p, m.bytes, decoded);
      const float* zeros = terms[r].zeros.data() + RowTerms::group_of(m, line + at);
      store_line<Code, Kind>(decoded, zeros, step, out + at * kBlockRows * kLineBytes);
    }
  }
}

// Rows' scales, and what they make of zeros where asked; `more` is what codes became greater by.
inline void lay_out_terms(const Matrix& m, const RowTerms* terms, int64_t rows, int64_t stride,
                          float more, bool zeros, Block& block) {
  float* scales = block.scales.of(kBlockRows * stride);
  float* offsets = block.offsets.of(kBlockRows * stride);
  const int64_t parts = stride / m.lines;
  for (int64_t r = 0; r < rows; ++r, scales += stride, offsets += stride) {
    for (int64_t i = 0; i < stride; ++i) scales[i] = terms[r].factor * terms[r].scales[i];
    for (int64_t i = 0; zeros && i < stride; ++i) {
      const int64_t group = RowTerms::group_of(m, i / parts) + i % parts;
      offsets[i] = scales[i] * (terms[r].zeros[group] + more);
    }
  }
}

inline void write_16(void* out, int64_t index, __mmask16 mask, __m512 value, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    _mm512_mask_storeu_ps(static_cast<float*>(out) + index, mask, value);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + index;
  if (dtype == Dtype::kFloat16) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

struct Output {
  const float* bias;
  void* out;
  int64_t first;  // token
  int64_t rows;
  Dtype dtype;
};

inline void write_block(const Panel& in, const Block& block, const Output& to, int64_t row,
                        int64_t rows) {
  for (int64_t tile = 0; tile < in.tiles; ++tile) {
    const int64_t count = std::min<int64_t>(kTile, in.tokens - tile * kTile);
    for (int64_t r = 0; r < rows; r += 16) {
      const float* sums = block.sums.data() + (tile * kBlockRows + r) * kTile;
      const __mmask16 mask = first(rows - r);
      __m512i v[16];
      for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(sums + i * kTile);
      transpose(v);
      __m512 bias = _mm512_setzero_ps();
      if (to.bias) bias = _mm512_maskz_loadu_ps(mask, to.bias + row + r);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t index = (to.first + tile * kTile + t) * to.rows + row + r;
        write_16(to.out, index, mask, _mm512_add_ps(_mm512_castsi512_ps(v[t]), bias), to.dtype);
      }
    }
  }
}

// How `rows` rows of a block meet two tiles, or one; elements of `size` bytes. `zeros`: offsets are
// needed; `start`: what a thread does before, if anything.
struct Product {
  void (*two)(const Place&);
  void (*one)(const Place&);
  int64_t rows;
  int size;
  bool zeros;
  void (*start)();
};

#ifdef __AMX_INT8__
template <class Kind, bool zeros, int parts>
constexpr Product kAmx = {amx<Kind, zeros, parts, 2>,
                          amx<Kind, zeros, parts, 1>,
                          kAmxRows,
                          Kind::kSize,
                          zeros,
                          configure_amx<kTileBytes<Kind, parts>>};
#endif

template <int parts>
Product product_of(const Matrix& m, bool exact, bool bfloat16) {
#ifdef __AMX_INT8__
  if (kAmxAllowed && exact && bfloat16) return kAmx<Bfloat16, false, parts>;
  if (kAmxAllowed && !exact) {
    return m.zeros && m.bits == 8 ? kAmx<Int8, true, parts> : kAmx<Int8, false, parts>;
  }
#endif
  (void)bfloat16;
  if (exact) return {fma<parts, 2>, fma<parts, 1>, kRowsAtOnce, 4, false, nullptr};
  if (m.zeros) return {vnni<true, parts, 2>, vnni<true, parts, 1>, kRowsAtOnce, 1, true, nullptr};
  return {vnni<false, parts, 2>, vnni<false, parts, 1>, kRowsAtOnce, 1, false, nullptr};
}

// Tokens from which on this is faster than going row by row, measured on 11008 x 4096.
inline int64_t fewest_tokens(bool exact, bool sparse) {
#ifdef __AMX_INT8__
  if (kAmxAllowed) return exact ? 3 : 7;
#endif
  return sparse ? 9 : exact ? 7 : 12;
}

inline void multiply_rows(const Matrix& m, const Panel& in, Decode decode, const Product& product,
                          float more, const Output& to, int64_t first_row, int64_t last_row) {
  static thread_local Block block;
  static thread_local RowTerms terms[kBlockRows];
  block.weights.of(kBlockLines * kBlockRows * kLine * product.size);
  const int64_t stride = in.lines * in.parts;
  const int64_t sums = in.tiles * kBlockRows * kTile;
  if (product.start) product.start();
  for (int64_t row = first_row; row < last_row; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, last_row - row);
    std::memset(block.sums.of(sums), 0, sums * sizeof(float));
    for (int64_t r = 0; r < rows; ++r) terms[r].load(m, row + r);
    lay_out_terms(m, terms, rows, stride, more, product.zeros, block);
    for (int64_t line = 0; line < in.lines; line += kBlockLines) {
      const int64_t lines = std::min(kBlockLines, in.lines - line);
      decode(m, terms, row, rows, line, lines, block);
      for (int64_t tile = 0; tile < in.tiles; tile += 2) {
        const auto multiply = tile + 1 < in.tiles ? product.two : product.one;
        const int64_t at = tile * in.lines + line;
        for (int64_t r = 0; r < rows; r += product.rows) {
          const int64_t term = r * stride + line * in.parts;
          multiply({block.weights.data() + r * kLine * product.size, block.scales.data() + term,
                    block.offsets.data() + term, in.data.data() + at * in.line_bytes,
                    in.scales.data() + at * kTile, in.sums.data() + at * in.parts * kTile,
                    in.starts.data() + at * in.parts * kTile,
                    block.sums.data() + (tile * kBlockRows + r) * kTile, lines, in.lines, stride});
        }
      }
    }
    write_block(in, block, to, row, rows);
  }
#ifdef __AMX_INT8__
  if (product.start) _tile_release();
#endif
}

}  // namespace panel
