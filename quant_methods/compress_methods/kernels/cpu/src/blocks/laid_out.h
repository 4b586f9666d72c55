// Scales and zero points as products of blocks take them, and 16 results as they are written.
#pragma once

#include "blocks/inputs.h"

namespace block {

// Scales of a group in the 16 rows of a block, which may share one.
inline __m512 scales_of(const Matrix& m, int64_t block, int64_t group) {
  if (!m.scales) return _mm512_set1_ps(1.0f);
  if (m.scale_rows == 1) {
    return read_16(m.scales, (block * m.groups + group) * kBlock, kBlock, m.scale_dtype);
  }
  float scale;
  const int64_t at = block * kBlock / m.scale_rows * m.groups + group;
  read_floats(m.scales, at, 1, m.scale_dtype, &scale);
  return _mm512_set1_ps(scale);
}

// Scales of one of `blocks` blocks, for `count` steps from one on: as products take them.
inline void lay_out_scales(const Matrix& m, int64_t block, const Inputs& in, int64_t step,
                           int64_t count, int64_t blocks, float* out) {
  __m512 factor = _mm512_set1_ps(m.unit());
  if (m.row_scales) {
    factor = _mm512_mul_ps(factor, _mm512_loadu_ps(m.row_scales + block * kBlock));
  }
  for (const int64_t end = step + count; step < end; ++step, out += blocks * kBlock) {
    const int64_t group = m.group == 0 ? 0 : step * in.step / m.group;
    _mm512_store_ps(out, _mm512_mul_ps(scales_of(m, block, group), factor));
  }
}

// Zero points likewise: only of the first step where the matrix has none.
inline void lay_out_zeros(const Matrix& m, int64_t block, const Inputs& in, int64_t step,
                          int64_t count, int64_t blocks, int32_t* out) {
  const int32_t middle = m.sparse && in.size > 1 ? 0 : m.middle();
  __m512i zero = _mm512_set1_epi32(middle);
  for (const int64_t end = step + (m.zeros ? count : 1); step < end; ++step) {
    const int64_t group = m.group == 0 ? 0 : step * in.step / m.group;
    if (m.zeros) {
      const uint8_t* at = m.zeros + (block * m.groups + group) * kBlock;
      zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    const __m512i laid = in.size == 1 ? _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16))
                                      : _mm512_castps_si512(_mm512_cvtepi32_ps(zero));
    _mm512_store_si512(out, laid);
    out += blocks * kBlock;
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

}  // namespace block
