// Vectors of 32 bytes, 8 int32 and 8 floats for AVX2 with FMA, and for VNNI of either encoding.
//
// VNNI multiplies unsigned bytes with signed ones and adds four products to an int32, exactly.
// AVX2 multiplies bytes only as unsigned times signed, into saturating int16 pairs. Codes up to 15
// cannot saturate: 4 products of pairs sum to at most 4 * 2 * 15 * 127. Signed bytes move their
// sign to the activation, which is why activations stop at -127: 2 * 128 * 127 is below 2^15.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vector/places.h"

namespace vec {

// Tests put an emulation here, to run this path on processors without VNNI.
#if !defined(VC_DOT_BYTES) && defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VC_DOT_BYTES _mm256_dpbusd_epi32
#elif !defined(VC_DOT_BYTES) && defined(__AVXVNNI__)
#define VC_DOT_BYTES _mm256_dpbusd_avx_epi32
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
constexpr int kBytes = 32, kFloats = 8;
constexpr int kSignedOffset = 0;
constexpr int kTokens = 4;  // that registers hold the sums of

// GCC drops calls of functions that do nothing but fetch by the intrinsic.
VC_INLINE void prefetch(const uint8_t* p) { asm volatile("prefetcht0 %0" : : "m"(*p)); }
VC_INLINE void prefetch_far(const uint8_t* p) {  // into the second-level cache
  asm volatile("prefetcht1 %0" : : "m"(*p));
}
inline Bytes load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline void store(Bytes a, uint8_t* p) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline Bytes twice(Bytes a) { return {_mm256_add_epi8(a.v, a.v)}; }
inline Bytes mask(Bytes a, uint8_t bits) {
  return {_mm256_and_si256(a.v, _mm256_set1_epi8(static_cast<char>(bits)))};
}

// 128 fields of `bits` bits: byte i of 16 * bits keeps columns i, i + 16 * bits, ... from the
// lowest.
template <int bits>
VC_INLINE void planes(const uint8_t* p, Bytes* out) {
  constexpr int kSize = 16 * bits;
  for (int i = 0; i < 4; ++i) {
    const __m256i stored = load(p + 32 * i % kSize).v;
    out[i] = mask({_mm256_srli_epi16(stored, 32 * i / kSize * bits)}, (1 << bits) - 1);
  }
}
// 32 bytes from 16: `value` where bit `low` (first 16) or `low + 1` (last 16) is set, else 0.
inline __m256i spread_bits(const uint8_t* p, int low, uint8_t value) {
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i bit = _mm256_setr_m128i(_mm_set1_epi8(static_cast<char>(1 << low)),
                                        _mm_set1_epi8(static_cast<char>(2 << low)));
  return mask({_mm256_cmpeq_epi8(_mm256_and_si256(twice, bit), bit)}, value).v;
}
// Adds a value where the bit of a column is set in a plane of one bit.
inline void add_bits(const uint8_t* p, uint8_t value, Bytes* out) {
  for (int i = 0; i < 4; ++i) out[i] = {_mm256_or_si256(out[i].v, spread_bits(p, 2 * i, value))};
}
inline void add_third_bits(const uint8_t* p, Bytes* out) { add_bits(p, 4, out); }
inline void add_fifth_bits(const uint8_t* p, Bytes* out) { add_bits(p, 16, out); }
// Codes of 6 bits, less 32, of the lower four and the upper two.
inline Bytes with_upper(Bytes lower, Bytes upper) {
  const __m256i all = _mm256_or_si256(lower.v, _mm256_slli_epi16(upper.v, 4));
  return {_mm256_sub_epi8(all, _mm256_set1_epi8(32))};
}

// The 16 bytes that codes stand for.
template <int bits, bool>
struct Table {
  __m256i v;
  VC_INLINE explicit Table(const uint8_t* p)
      : v(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))) {}
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    planes<bits == 3 ? 2 : bits>(p, out);
    if constexpr (bits == 3) add_third_bits(p + 32, out);
    for (int i = 0; i < 4; ++i) out[i] = {_mm256_shuffle_epi8(v, out[i].v)};
  }
};

// The 16 floats that codes of 4 bits stand for.
struct FloatTable {
  __m256 low, high;
  VC_INLINE explicit FloatTable(const float* p)
      : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  VC_INLINE void read(const uint8_t* p, Floats* out) const {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * i));
      const __m256i all = _mm256_cvtepu8_epi32(eight);
      out[i] = values(all), out[8 + i] = values(_mm256_srli_epi32(all, 4));
    }
  }
  // Three bits of an index find an entry of either half, the fourth which of the two.
  VC_INLINE Floats values(__m256i codes) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes),
                             _mm256_permutevar8x32_ps(high, codes), upper)};
  }
};

// Windows of a trellis from `at` bits on, of 16 lanes that hold 16 bits in each part.
template <int at>
VC_INLINE __m256i trellis_values(const __m256i* parts, __m256i mask) {
  constexpr int kPart = at / 16, kShift = at % 16;
  __m256i window = parts[kPart];
  if constexpr (kShift) {
    window = _mm256_or_si256(_mm256_srli_epi16(window, kShift),
                             _mm256_slli_epi16(parts[kPart + 1], 16 - kShift));
  }
  const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>(kTrellisFactor));
  const __m256i addend = _mm256_set1_epi16(static_cast<int16_t>(kTrellisAddend));
  const __m256i digit = _mm256_set1_epi8(15);
  const __m256i weights = _mm256_set1_epi16(kTrellisUpper << 8 | kTrellisLower);
  const __m256i hash =
      _mm256_add_epi16(_mm256_mullo_epi16(_mm256_and_si256(window, mask), factor), addend);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(hash, 4), digit);
  const __m256i sums = _mm256_add_epi8(_mm256_and_si256(hash, digit), high);
  return _mm256_maddubs_epi16(sums, weights);
}
// 4 columns of a row's 8 tiles.
template <int bits, int quarter>
VC_INLINE __m256i trellis_columns(const __m256i* parts, __m256i mask) {
  const __m256i odd =
      _mm256_slli_epi16(trellis_values<(2 * quarter + 1) * bits>(parts, mask), 8);
  const __m256i both = _mm256_or_si256(trellis_values<2 * quarter * bits>(parts, mask), odd);
  return _mm256_sub_epi8(both, _mm256_set1_epi8(kTrellisMiddle));
}
// 128 columns of a row at `p`, into which the windows of the row before reach, as this one's reach
// into that at `next`. Tiles lie in the order 0, 2, 4, 6, 1, 3, 5, 7.
template <int bits>
VC_INLINE void trellis(const uint8_t* p, const uint8_t* next, uint16_t window, Bytes* out) {
  const __m256i mask = _mm256_set1_epi16(static_cast<int16_t>(window));
  const __m256i own = load(p).v;
  const __m256i after =
      _mm256_or_si256(_mm256_srli_epi32(own, 16), _mm256_slli_epi32(load(next).v, 16));
  __m256i parts[3] = {own, after, after};
  if constexpr (bits == 3) {
    const __m128i rest = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 32));
    parts[1] = _mm256_or_si256(_mm256_cvtepu8_epi16(rest), _mm256_slli_epi16(after, 8));
    parts[2] = _mm256_srli_epi16(after, 8);
  } else if constexpr (bits == 4) {
    parts[1] = load(p + 32).v;
  }
  const __m256i a = trellis_columns<bits, 0>(parts, mask);
  const __m256i b = trellis_columns<bits, 1>(parts, mask);
  const __m256i c = trellis_columns<bits, 2>(parts, mask);
  const __m256i d = trellis_columns<bits, 3>(parts, mask);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  out[0] = {_mm256_unpacklo_epi64(ab, cd)}, out[1] = {_mm256_unpackhi_epi64(ab, cd)};
  out[2] = {_mm256_unpacklo_epi64(ab_high, cd_high)};
  out[3] = {_mm256_unpackhi_epi64(ab_high, cd_high)};
}

template <bool is_signed, int count>
VC_INLINE Ints start(const Bytes*) {
  return {_mm256_setzero_si256()};
}
// Adds the products of `count` vectors of weight and activation bytes, in 8 lanes.
template <bool is_signed, int count>
VC_INLINE Ints dot(const Bytes* w, const int8_t* x, Ints start) {
  __m256i sum = start.v;
#ifdef VC_DOT_BYTES
  for (int i = 0; i < count; ++i) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i));
    if constexpr (is_signed) a = _mm256_sign_epi8(a, w[i].v);
    sum = VC_DOT_BYTES(sum, is_signed ? _mm256_abs_epi8(w[i].v) : w[i].v, a);
  }
  return {sum};
#else
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i pairs = _mm256_setzero_si256();
  for (int i = 0; i < count; ++i) {
    __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32 * i));
    if constexpr (is_signed) {
      a = _mm256_sign_epi8(a, w[i].v);
      pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w[i].v), a);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    } else {
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w[i].v, a));
    }
  }
  return {is_signed ? sum : _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones))};
#endif
}

inline Floats zero() { return {_mm256_setzero_ps()}; }
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store_floats(Floats a, float* p) { _mm256_storeu_ps(p, a.v); }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
// Sums and differences of each lane with its `partner`, differences where `lanes` has a bit.
template <int lanes>
VC_INLINE __m256 pairs(__m256 a, __m256 partner) {
  return _mm256_blend_ps(_mm256_add_ps(a, partner), _mm256_sub_ps(partner, a), lanes);
}
// The Walsh-Hadamard transform of a vector, but for the factor.
VC_INLINE Floats butterflies(Floats x) {
  __m256 a = x.v;
  a = pairs<0xaa>(a, _mm256_permute_ps(a, 0xb1));
  a = pairs<0xcc>(a, _mm256_permute_ps(a, 0x4e));
  return {pairs<0xf0>(a, _mm256_permute2f128_ps(a, a, 1))};
}
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
  return {_mm256_fmadd_ps(a.v, b.v, sum.v)};
}
inline Floats scale_add(Floats a, float factor, Floats sum) {
  return {_mm256_fmadd_ps(a.v, _mm256_set1_ps(factor), sum.v)};
}
// The same with a factor of its own for each half of the lanes.
inline Floats scale_add_halves(Floats a, const float* factors, Floats sum) {
  const __m256 both = _mm256_set_m128(_mm_set1_ps(factors[1]), _mm_set1_ps(factors[0]));
  return {_mm256_fmadd_ps(a.v, both, sum.v)};
}
inline Floats scale(Ints a, float factor) {
  return {_mm256_mul_ps(_mm256_cvtepi32_ps(a.v), _mm256_set1_ps(factor))};
}

// Bytes 8 * part to 8 * part + 7 as floats.
template <bool is_signed, int part>
inline Floats widen(Bytes a) {
  __m128i half = part < 2 ? _mm256_castsi256_si128(a.v) : _mm256_extracti128_si256(a.v, 1);
  if constexpr (part % 2 == 1) half = _mm_srli_si128(half, 8);
  return {_mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(half) : _mm256_cvtepu8_epi32(half))};
}

// 8 E4M3 numbers as float16 takes them, see `numbers.h`.
inline Floats widen_e4m3(const uint8_t* p) {
  const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7);
  const __m128i sign_and_rest = _mm_set1_epi16(static_cast<short>(0xbf80));
  return {_mm256_cvtph_ps(_mm_and_si128(shifted, sign_and_rest))};
}

inline __m128i two_halves(const uint8_t* low, const uint8_t* high) {
  const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(low));
  return _mm_castps_si128(
      _mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<const __m64*>(high)));
}
inline __m128i expand_16(const uint8_t*& from, const uint8_t* mask) {
  const uint32_t low = mask[0], high = mask[1];
  const uint8_t* second = from + __builtin_popcount(low);
  const __m128i bytes = two_halves(from, second);
  from = second + __builtin_popcount(high);
  return _mm_shuffle_epi8(bytes, two_halves(kPlaces.low[low], kPlaces.high[high]));
}
// The next bytes of `from`, in order, where a bit of 32 is set, else 0. Reads 8 bytes at a time.
VC_INLINE Bytes expand(const uint8_t*& from, const uint8_t* mask) {
  const __m128i low = expand_16(from, mask);
  return {_mm256_inserti128_si256(_mm256_castsi128_si256(low), expand_16(from, mask + 2), 1)};
}
// The same for 8 numbers of 16 bits, widened. Reads 16 bytes.
template <bool is_bfloat16>
VC_INLINE Floats expand_floats(const uint8_t*& from, const uint8_t* which) {
  const uint8_t mask = *which;
  const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i* shuffle = reinterpret_cast<const __m128i*>(kPlaces.pairs[mask]);
  const __m128i bits = _mm_shuffle_epi8(stored, _mm_load_si128(shuffle));
  from += 2 * __builtin_popcount(mask);
  if constexpr (is_bfloat16) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  } else {
    return {_mm256_cvtph_ps(bits)};
  }
}

// 32 codes of 4 bits less 8: the low halves of 16 bytes, then the high ones.
inline Bytes nibbles(const uint8_t* p) {
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i shifted = _mm256_srlv_epi32(twice, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  return {_mm256_sub_epi8(mask({shifted}, 15).v, _mm256_set1_epi8(8))};
}
// 128 columns from `stored` bytes of nibbles and, after them, the mask of columns they are for.
VC_INLINE void spread_nibbles(const uint8_t* p, int64_t stored, Bytes* out) {
  uint8_t codes[128 + 8];  // 8 are read at a time
  for (int64_t at = 0; at < stored; at += 16) store(nibbles(p + at), codes + 2 * at);
  const uint8_t* from = codes;
  for (int i = 0; i < 4; ++i) out[i] = expand(from, p + stored + 4 * i);
}

inline float total(Floats a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace vec
