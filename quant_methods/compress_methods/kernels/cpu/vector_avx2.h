// Vectors of 32 bytes, 8 int32 and 8 floats for AVX2 with FMA, and for VNNI of either encoding.
//
// VNNI multiplies unsigned bytes with signed ones and adds four products to an int32, exactly.
// AVX2 multiplies bytes only as unsigned times signed, into saturating int16 pairs. Codes up to 15
// cannot saturate: 4 products of pairs sum to at most 4 * 2 * 15 * 127. Signed bytes move their sign
// to the activation, which is why activations stop at -127: 2 * 128 * 127 is below 2^15.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace vec {

// Tests put an emulation here, to run this path on processors without VNNI.
#if !defined(VC_DOT_BYTES) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VC_DOT_BYTES _mm256_dpbusd_epi32
#elif !defined(VC_DOT_BYTES) && defined(__AVXVNNI__)
#define VC_DOT_BYTES _mm256_dpbusd_avx_epi32
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
constexpr const char* kName = "avx512_vnni";
#elif defined(__AVXVNNI__)
constexpr const char* kName = "avx_vnni";
#else
constexpr const char* kName = "avx2";
#endif

struct Bytes {
  __m256i v;
};
struct Ints {
  __m256i v;
};
struct Floats {
  __m256 v;
};
constexpr int kFloats = 8;

inline Bytes load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Bytes mask(Bytes a, uint8_t bits) {
  return {_mm256_and_si256(a.v, _mm256_set1_epi8(static_cast<char>(bits)))};
}
// Bits `shift` and above of every byte, masked by `bits` (which drops what came from neighbours).
template <int shift>
inline Bytes shift_mask(Bytes a, uint8_t bits) {
  return mask({_mm256_srli_epi16(a.v, shift)}, bits);
}
inline Bytes either(Bytes a, Bytes b) { return {_mm256_or_si256(a.v, b.v)}; }

// 32 bytes from 16: `value` where bit `low` (first 16) or `low + 1` (last 16) is set, else 0.
template <int low>
inline Bytes spread_bits(const uint8_t* p, uint8_t value) {
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i bit = _mm256_setr_m128i(_mm_set1_epi8(static_cast<char>(1 << low)),
                                        _mm_set1_epi8(static_cast<char>(1 << (low + 1))));
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(twice, bit), bit);
  return mask({set}, value);
}

// Sum over `count` vectors of weight byte times activation byte, in 8 lanes.
template <bool is_signed, int count>
inline Ints dot(const Bytes* w, const int8_t* x) {
  __m256i sum = _mm256_setzero_si256();
#ifdef VC_DOT_BYTES
  for (int i = 0; i < count; ++i) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i));
    if constexpr (is_signed) a = _mm256_sign_epi8(a, w[i].v);
    sum = VC_DOT_BYTES(sum, is_signed ? _mm256_abs_epi8(w[i].v) : w[i].v, a);
  }
  return {sum};
#else
  const __m256i ones = _mm256_set1_epi16(1);
  for (int i = 0; i < count; ++i) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i));
    if constexpr (is_signed) {
      a = _mm256_sign_epi8(a, w[i].v);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[i].v), a);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    } else {
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[i].v, a));
    }
  }
  return {is_signed ? sum : _mm256_madd_epi16(sum, ones)};
#endif
}

inline Floats zero() { return {_mm256_setzero_ps()}; }
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
  return {_mm256_fmadd_ps(a.v, b.v, sum.v)};
}
inline Floats scale_add(Floats a, float factor, Floats sum) {
  return {_mm256_fmadd_ps(a.v, _mm256_set1_ps(factor), sum.v)};
}
inline Floats scale_add(Ints a, float factor, Floats sum) {
  return scale_add(Floats{_mm256_cvtepi32_ps(a.v)}, factor, sum);
}

// Bytes 8 * part to 8 * part + 7 as floats.
template <bool is_signed, int part>
inline Floats widen(Bytes a) {
  __m128i half = part < 2 ? _mm256_castsi256_si128(a.v) : _mm256_extracti128_si256(a.v, 1);
  if constexpr (part % 2 == 1) half = _mm_srli_si128(half, 8);
  return {_mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(half) : _mm256_cvtepu8_epi32(half))};
}

inline float total(Floats a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace vec
