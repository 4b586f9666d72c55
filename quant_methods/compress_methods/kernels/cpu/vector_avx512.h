// Vectors of 64 bytes, 16 int32 and 16 floats for AVX-512 with VNNI and VBMI2.
//
// VNNI multiplies unsigned bytes with signed ones. Codes are unsigned; where they are signed,
// activations are offset by 128 to be the unsigned operand, and the sum starts at -128 times the
// codes, so the result is exact all the same.
#pragma once

// GCC takes the intrinsics' own "undefined" vectors for variables of ours.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace vec {

struct Bytes {
  __m512i v;
};
struct Ints {
  __m512i v;
};
struct Floats {
  __m512 v;
};
constexpr int kBytes = 64, kFloats = 16;
constexpr int kSignedOffset = 128;
constexpr int kTokens = 8;  // that registers hold the sums of

// GCC drops calls of functions that do nothing but fetch by the intrinsic.
VC_INLINE void prefetch(const uint8_t* p) { asm volatile("prefetcht0 %0" : : "m"(*p)); }
VC_INLINE void prefetch_far(const uint8_t* p) {  // into the second-level cache
  asm volatile("prefetcht1 %0" : : "m"(*p));
}
inline Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(Bytes a, uint8_t* p) { _mm512_storeu_si512(p, a.v); }
inline __m512i quarters(int a, int b, int c, int d) {
  const __m512i low =
      _mm512_castsi256_si512(_mm256_setr_m128i(_mm_set1_epi32(a), _mm_set1_epi32(b)));
  return _mm512_inserti64x4(low, _mm256_setr_m128i(_mm_set1_epi32(c), _mm_set1_epi32(d)), 1);
}

// 128 fields of `bits` bits: byte i of 16 * bits keeps columns i, i + 16 * bits, ... from the
// lowest.
template <int bits>
VC_INLINE void planes(const uint8_t* p, Bytes* out) {
  const __m512i low_bits = _mm512_set1_epi8((1 << bits) - 1);
  if constexpr (bits == 8) {
    out[0] = load(p), out[1] = load(p + 64);
  } else if constexpr (bits == 4) {
    const __m512i all = _mm512_loadu_si512(p);
    out[0] = {_mm512_and_si512(all, low_bits)};
    out[1] = {_mm512_and_si512(_mm512_srli_epi16(all, 4), low_bits)};
  } else {
    const __m512i twice =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    out[0] = {_mm512_and_si512(_mm512_srlv_epi32(twice, quarters(0, 0, 2, 2)), low_bits)};
    out[1] = {_mm512_and_si512(_mm512_srlv_epi32(twice, quarters(4, 4, 6, 6)), low_bits)};
  }
}
// Adds 4 where the bit of a column is set in a plane of one bit.
inline void add_third_bits(const uint8_t* p, Bytes* out) {
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i four = _mm512_set1_epi8(4);
  const __m512i low = _mm512_rolv_epi32(all, quarters(2, 1, 0, 31));
  const __m512i high = _mm512_rolv_epi32(all, quarters(30, 29, 28, 27));
  constexpr int kOrAnd = 0xf8;  // a | (b & c)
  out[0] = {_mm512_ternarylogic_epi32(out[0].v, low, four, kOrAnd)};
  out[1] = {_mm512_ternarylogic_epi32(out[1].v, high, four, kOrAnd)};
}

// What sums of signed codes start at, where activations are offset.
template <bool is_signed, int count>
VC_INLINE Ints start(const Bytes* w) {
  __m512i sum = _mm512_setzero_si512();
  if constexpr (is_signed) {
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(kSignedOffset));
    for (int i = 0; i < count; ++i) sum = _mm512_dpbusd_epi32(sum, offset, w[i].v);
    sum = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
  }
  return {sum};
}
// Adds the products of `count` vectors of weight and activation bytes, in 16 lanes.
template <bool is_signed, int count>
VC_INLINE Ints dot(const Bytes* w, const int8_t* x, Ints sum) {
  for (int i = 0; i < count; ++i) {
    const __m512i a = _mm512_loadu_si512(x + 64 * i);
    sum.v =
        is_signed ? _mm512_dpbusd_epi32(sum.v, a, w[i].v) : _mm512_dpbusd_epi32(sum.v, w[i].v, a);
  }
  return sum;
}

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
  return {_mm512_fmadd_ps(a.v, b.v, sum.v)};
}
inline Floats scale_add(Floats a, float factor, Floats sum) {
  return {_mm512_fmadd_ps(a.v, _mm512_set1_ps(factor), sum.v)};
}
inline Floats scale(Ints a, float factor) {
  return {_mm512_mul_ps(_mm512_cvtepi32_ps(a.v), _mm512_set1_ps(factor))};
}
// The lower and the upper half each by a factor of its own.
inline Floats scale_add_halves(Floats a, const float* factors, Floats sum) {
  const __m512 low = _mm512_set1_ps(factors[0]);
  const __m512 both = _mm512_mask_mov_ps(low, 0xff00, _mm512_set1_ps(factors[1]));
  return {_mm512_fmadd_ps(a.v, both, sum.v)};
}

// Bytes 16 * part to 16 * part + 15 as floats.
template <bool is_signed, int part>
inline Floats widen(Bytes a) {
  const __m128i bytes = _mm512_extracti32x4_epi32(a.v, part);
  return {
      _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes))};
}

// The next bytes of `from`, in order, where a bit of 64 is set, else 0. Reads no others.
VC_INLINE Bytes expand(const uint8_t*& from, const uint8_t* mask) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask, sizeof bits);
  const __m512i bytes = _mm512_maskz_expandloadu_epi8(bits, from);
  from += __builtin_popcountll(bits);
  return {bytes};
}
// The same for 16 numbers of 16 bits, widened.
template <bool is_bfloat16>
VC_INLINE Floats expand_floats(const uint8_t*& from, const uint8_t* mask) {
  uint16_t bits;
  __builtin_memcpy(&bits, mask, sizeof bits);
  const __m256i spread = _mm256_maskz_expandloadu_epi16(bits, from);
  from += 2 * __builtin_popcount(bits);
  if constexpr (is_bfloat16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(spread), 16))};
  } else {
    return {_mm512_cvtph_ps(spread)};
  }
}
// 64 codes of 4 bits less 8: from each 16 bytes the low halves, then the high ones.
inline __m512i nibbles(const uint8_t* p) {
  const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i index = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
  const __m512i doubled = _mm512_permutexvar_epi64(index, _mm512_castsi256_si512(stored));
  const __m512i shifted = _mm512_srlv_epi32(doubled, quarters(0, 4, 0, 4));
  const __m512i codes = _mm512_and_si512(shifted, _mm512_set1_epi8(15));
  return _mm512_sub_epi8(codes, _mm512_set1_epi8(8));
}
// 128 columns from `stored` bytes of nibbles and, after them, the mask of columns they are for.
VC_INLINE void spread_nibbles(const uint8_t* p, int64_t stored, Bytes* out) {
  uint64_t mask[2];
  __builtin_memcpy(mask, p + stored, sizeof mask);
  alignas(64) static constexpr auto kCount = [] {
    struct {
      uint8_t v[64];
    } count = {};
    for (int i = 0; i < 64; ++i) count.v[i] = i;
    return count;
  }();
  const __m512i first = nibbles(p), rest = stored > 32 ? nibbles(p + 32) : first;
  const __m512i used = _mm512_set1_epi8(static_cast<char>(__builtin_popcountll(mask[0])));
  const __m512i index = _mm512_add_epi8(_mm512_load_si512(kCount.v), used);
  out[0] = {_mm512_maskz_expand_epi8(mask[0], first)};
  out[1] = {_mm512_maskz_expand_epi8(mask[1], _mm512_permutex2var_epi8(first, index, rest))};
}

inline float total(Floats a) { return _mm512_reduce_add_ps(a.v); }

}  // namespace vec
