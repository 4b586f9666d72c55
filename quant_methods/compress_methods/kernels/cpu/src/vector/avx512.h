// Vectors of 64 bytes and 16 floats for AVX-512 with VNNI and VBMI2.
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
struct Floats {
  __m512 v;
};
constexpr int kBytes = 64, kFloats = 16;

// GCC drops calls of functions that do nothing but fetch by the intrinsic.
VC_INLINE void prefetch(const uint8_t* p) { asm volatile("prefetcht0 %0" : : "m"(*p)); }
VC_INLINE void prefetch_far(const uint8_t* p) {  // into the second-level cache
  asm volatile("prefetcht1 %0" : : "m"(*p));
}
inline Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(Bytes a, uint8_t* p) { _mm512_storeu_si512(p, a.v); }
inline Bytes twice(Bytes a) { return {_mm512_add_epi8(a.v, a.v)}; }
// Keeps a constant in a register: GCC 12 would make it anew wherever it is used, from integers.
VC_INLINE __m512i held(__m512i constant) {
  asm("" : "+v"(constant));
  return constant;
}
VC_INLINE __m512i quarters(int a, int b, int c, int d) {
  return held(_mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d));
}
VC_INLINE __m512i bytes_of(int value) { return held(_mm512_set1_epi8(static_cast<char>(value))); }

// Fields of 2 bits: byte i of 32 keeps columns i, i + 32, ... from the lowest.
struct Pairs2 {
  __m512i first = quarters(0, 0, 2, 2), second = quarters(4, 4, 6, 6);

  // The fields at the low ends of bytes; what lies above them is not cleared.
  VC_INLINE void read(const uint8_t* p, __m512i& low, __m512i& high) const {
    const __m512i twice =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    low = _mm512_srlv_epi32(twice, first), high = _mm512_srlv_epi32(twice, second);
  }
};

// Bits, byte i of 16 keeping those of columns i, i + 16, ...: put in the same place of all bytes.
template <int place>
struct Bits {
  static constexpr int at(int column) { return (place - column) & 31; }
  __m512i first = quarters(at(0), at(1), at(2), at(3));
  __m512i second = quarters(at(4), at(5), at(6), at(7));

  // What lies beside them is not cleared.
  VC_INLINE void read(const uint8_t* p, __m512i& low, __m512i& high) const {
    const __m512i all =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low = _mm512_rolv_epi32(all, first), high = _mm512_rolv_epi32(all, second);
  }
};

// 128 fields of `bits` bits: byte i of 16 * bits keeps columns i, i + 16 * bits, ... from the
// lowest. Those of 3, 5 and 6 bits are fields of 2 or 4, and the rest of them behind.
template <int bits>
struct Planes;

template <>
struct Planes<2> {
  Pairs2 pairs;
  __m512i mask = bytes_of(3);
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    pairs.read(p, out[0].v, out[1].v);
    out[0] = {_mm512_and_si512(out[0].v, mask)}, out[1] = {_mm512_and_si512(out[1].v, mask)};
  }
};
template <>
struct Planes<4> {
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    const __m512i all = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    out[0] = {_mm512_and_si512(all, mask)};
    out[1] = {_mm512_and_si512(_mm512_srli_epi16(all, 4), mask)};
  }
};
template <>
struct Planes<8> {
  VC_INLINE void read(const uint8_t* p, Bytes* out) const { out[0] = load(p), out[1] = load(p + 64); }
};
// One bit more than `lower` has.
template <int lower>
struct WithBit {
  Planes<lower> planes;
  Bits<lower> bits;
  __m512i value = bytes_of(1 << lower);
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    __m512i low, high;
    planes.read(p, out), bits.read(p + 16 * lower, low, high);
    out[0] = {_mm512_ternarylogic_epi32(out[0].v, low, value, kOrAnd)};
    out[1] = {_mm512_ternarylogic_epi32(out[1].v, high, value, kOrAnd)};
  }
};
template <>
struct Planes<3> : WithBit<2> {};
template <>
struct Planes<5> : WithBit<4> {};
template <>
struct Planes<6> {
  Planes<4> lower;
  Planes<2> upper;
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    Bytes above[2];
    lower.read(p, out), upper.read(p + 64, above);
    for (int i = 0; i < 2; ++i) {
      out[i] = {_mm512_or_si512(out[i].v, _mm512_slli_epi16(above[i].v, 4))};
    }
  }
};

// The 16 bytes that codes stand for, the same in all rows of a vector. Entries repeat after 2^bits
// of them, and only six bits of an index count: what lies above a code need not be cleared.
template <int bits, bool shared>
struct Table;

inline __m512i sixteen(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <>
struct Table<4, true> {
  __m512i v;
  VC_INLINE explicit Table(const uint8_t* p) : v(sixteen(p)) {}
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    const __m512i low = _mm512_loadu_si512(p);
    out[0] = {_mm512_permutexvar_epi8(low, v)};
    out[1] = {_mm512_permutexvar_epi8(_mm512_srli_epi16(low, 4), v)};
  }
};
template <>
struct Table<2, true> {
  __m512i v;
  Pairs2 pairs;
  VC_INLINE explicit Table(const uint8_t* p) : v(sixteen(p)) {}
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    __m512i low, high;
    pairs.read(p, low, high);
    out[0] = {_mm512_permutexvar_epi8(low, v)}, out[1] = {_mm512_permutexvar_epi8(high, v)};
  }
};
template <>
struct Table<3, true> {
  __m512i v, two_bits = bytes_of(3);
  Pairs2 pairs;
  Bits<2> bits;
  VC_INLINE explicit Table(const uint8_t* p) : v(sixteen(p)) {}
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    constexpr int kSelect = 0xca;  // a ? b : c
    __m512i low, high, low_bits, high_bits;
    pairs.read(p, low, high), bits.read(p + 32, low_bits, high_bits);
    low = _mm512_ternarylogic_epi32(two_bits, low, low_bits, kSelect);
    high = _mm512_ternarylogic_epi32(two_bits, high, high_bits, kSelect);
    out[0] = {_mm512_permutexvar_epi8(low, v)}, out[1] = {_mm512_permutexvar_epi8(high, v)};
  }
};
// 16 bytes for each of the 16 rows of a vector, four of whose bytes are a row's.
template <int bits>
struct Table<bits, false> {
  __m512i v[4], first;
  Planes<bits> planes;
  VC_INLINE explicit Table(const uint8_t* p) {
    for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(p + 64 * i);
    const __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    first = _mm512_mullo_epi32(row, _mm512_set1_epi32(0x10101010));
  }
  // Seven bits of an index find the table of one of eight rows, and its entry.
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    planes.read(p, out);
    out[0] = values(out[0]), out[1] = values(out[1]);
  }
  VC_INLINE Bytes values(Bytes codes) const {
    const __m512i index = _mm512_or_si512(codes.v, first);
    const __m512i low = _mm512_permutex2var_epi8(v[0], index, v[1]);
    const __m512i high = _mm512_permutex2var_epi8(v[2], index, v[3]);
    return {_mm512_mask_blend_epi64(0xf0, low, high)};
  }
};

// The 16 floats that codes of 4 bits stand for: 8 columns of 16 rows. Of an index 4 bits count.
struct FloatTable {
  __m512 v;
  VC_INLINE explicit FloatTable(const float* p) : v(_mm512_loadu_ps(p)) {}
  VC_INLINE void read(const uint8_t* p, Floats* out) const {
    const __m512i all = _mm512_loadu_si512(p);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      out[i] = {_mm512_permutexvar_ps(_mm512_srli_epi32(all, 8 * i), v)};
      out[4 + i] = {_mm512_permutexvar_ps(_mm512_srli_epi32(all, 8 * i + 4), v)};
    }
  }
};

// The windows of a tile of 16 rows, lanes of which are 16 bits.
template <int bits>
struct Windows {
  static constexpr int kSize = 32 * bits;  // bytes of a tile
  __m512i parts[3], mask;                  // 48 bits from where a lane begins

  VC_INLINE explicit Windows(uint16_t window) : mask(_mm512_set1_epi16(static_cast<int16_t>(window))) {}
  VC_INLINE void load(const uint8_t* p) {
    const __m512i first = _mm512_loadu_si512(p);
    const __m512i up = _mm512_alignr_epi32(first, first, 1);  // by two lanes
    const __m512i next = _mm512_shrdi_epi32(first, up, 16);
    parts[0] = first, parts[2] = next;
    if constexpr (bits == 2) {
      parts[1] = next;
    } else if constexpr (bits == 3) {
      const __m256i rest = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 64));
      parts[1] = _mm512_or_si512(_mm512_cvtepu8_epi16(rest), _mm512_slli_epi16(next, 8));
      parts[2] = _mm512_srli_epi16(next, 8);
    } else {
      parts[1] = _mm512_loadu_si512(p + 64);
    }
  }
  template <int at>
  VC_INLINE __m512i value() const {
    constexpr int kPart = at / 16, kShift = at % 16;
    __m512i window = parts[kPart];
    if constexpr (kShift) window = _mm512_shrdi_epi16(window, parts[kPart + 1], kShift);
    const __m512i factor = _mm512_set1_epi16(static_cast<int16_t>(kTrellisFactor));
    const __m512i addend = _mm512_set1_epi16(static_cast<int16_t>(kTrellisAddend));
    const __m512i digit = _mm512_set1_epi8(15);
    const __m512i weights = _mm512_set1_epi16(kTrellisUpper << 8 | kTrellisLower);
    const __m512i hash =
        _mm512_add_epi16(_mm512_mullo_epi16(_mm512_and_si512(window, mask), factor), addend);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(hash, 4), digit);
    const __m512i sums = _mm512_add_epi8(_mm512_and_si512(hash, digit), high);
    return _mm512_maddubs_epi16(sums, weights);
  }
  // 4 columns of every row.
  template <int quarter>
  VC_INLINE Bytes columns() const {
    const __m512i odd = _mm512_slli_epi16(value<(2 * quarter + 1) * bits>(), 8);
    return {_mm512_or_si512(value<2 * quarter * bits>(), odd)};
  }
  // The first or the last 8 columns of every row.
  template <int which>
  VC_INLINE void half(Bytes* out) const {
    out[0] = columns<2 * which>(), out[1] = columns<2 * which + 1>();
  }
};

inline Floats load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store_floats(Floats a, float* p) { _mm512_storeu_ps(p, a.v); }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats subtract(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
// Sums and differences of each lane with its `partner`, differences where `mask` has a bit.
inline __m512 pairs(__m512 a, __m512 partner, __mmask16 mask) {
  return _mm512_mask_sub_ps(_mm512_add_ps(a, partner), mask, partner, a);
}
// The Walsh-Hadamard transform of a vector, but for the factor.
VC_INLINE Floats butterflies(Floats x) {
  __m512 a = x.v;
  a = pairs(a, _mm512_permute_ps(a, 0xb1), 0xaaaa);
  a = pairs(a, _mm512_permute_ps(a, 0x4e), 0xcccc);
  a = pairs(a, _mm512_shuffle_f32x4(a, a, 0xb1), 0xf0f0);
  return {pairs(a, _mm512_shuffle_f32x4(a, a, 0x4e), 0xff00)};
}

// 16 E4M3 numbers as float16 takes them, see `numbers.h`.
inline __m512 halves_of_e4m3(__m128i codes) {
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<short>(0xbf80))));
}
inline Floats widen_e4m3(const uint8_t* p) {
  return {halves_of_e4m3(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

// The next bytes of `from`, in order, where a bit of 64 is set, else those of `rest`. Reads no
// others.
VC_INLINE Bytes expand(const uint8_t*& from, const uint8_t* mask, Bytes rest) {
  uint64_t bits;
  __builtin_memcpy(&bits, mask, sizeof bits);
  const __m512i bytes = _mm512_mask_expandloadu_epi8(rest.v, bits, from);
  from += __builtin_popcountll(bits);
  return {bytes};
}
// The same for 16 numbers of 16 bits, widened; the rest zeros.
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
// 64 codes of 4 bits: from each 16 bytes the low halves, then the high ones.
VC_INLINE Bytes nibbles(const uint8_t* p) {
  const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m512i index = _mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3);
  const __m512i doubled = _mm512_permutexvar_epi64(index, _mm512_castsi256_si512(stored));
  const __m512i shifted = _mm512_srlv_epi32(doubled, quarters(0, 4, 0, 4));
  return {_mm512_and_si512(shifted, _mm512_set1_epi8(15))};
}

}  // namespace vec
