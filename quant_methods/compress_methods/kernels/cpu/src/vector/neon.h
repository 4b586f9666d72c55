// Vectors of 32 bytes, 8 int32 and 8 floats, in pairs of registers, for ARM with dot products.
//
// SDOT multiplies signed bytes and adds four products to an int32, exactly. Codes without a sign are
// below 128 (see `decoders.h`), so they are signed bytes as they are.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "vector/places.h"

namespace vec {

struct Bytes {
  uint8x16_t v[2];
};
struct Ints {
  int32x4_t v[2];
};
struct Floats {
  float32x4_t v[2];
};
constexpr int kBytes = 32, kFloats = 8;
constexpr int kSignedOffset = 0;
constexpr int kTokens = 4;  // that registers hold the sums of

VC_INLINE void prefetch(const uint8_t* p) { asm volatile("prfm pldl1keep, [%0]" : : "r"(p)); }
VC_INLINE void prefetch_far(const uint8_t* p) {  // into the second-level cache
  asm volatile("prfm pldl2keep, [%0]" : : "r"(p));
}
VC_INLINE Bytes load(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16)}}; }
VC_INLINE void store(Bytes a, uint8_t* p) { vst1q_u8(p, a.v[0]), vst1q_u8(p + 16, a.v[1]); }
VC_INLINE Bytes twice(Bytes a) {
  return {{vaddq_u8(a.v[0], a.v[0]), vaddq_u8(a.v[1], a.v[1])}};
}

// 128 fields of `bits` bits: byte i of 16 * bits keeps columns i, i + 16 * bits, ... from the
// lowest.
template <int bits>
VC_INLINE void planes(const uint8_t* p, Bytes* out) {
  constexpr int kSize = 16 * bits;
  const uint8x16_t mask = vdupq_n_u8((1 << bits) - 1);
  for (int i = 0; i < 8; ++i) {
    const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(-(16 * i / kSize * bits)));
    out[i / 2].v[i % 2] = vandq_u8(vshlq_u8(vld1q_u8(p + 16 * i % kSize), shift), mask);
  }
}
// Adds a value where the bit of a column is set in a plane of one bit.
VC_INLINE void add_bits(const uint8_t* p, uint8_t value, Bytes* out) {
  const uint8x16_t plane = vld1q_u8(p), added = vdupq_n_u8(value);
  for (int i = 0; i < 8; ++i) {
    const uint8x16_t set = vtstq_u8(plane, vdupq_n_u8(static_cast<uint8_t>(1 << i)));
    out[i / 2].v[i % 2] = vorrq_u8(out[i / 2].v[i % 2], vandq_u8(set, added));
  }
}
VC_INLINE void add_third_bits(const uint8_t* p, Bytes* out) { add_bits(p, 4, out); }
VC_INLINE void add_fifth_bits(const uint8_t* p, Bytes* out) { add_bits(p, 16, out); }
// Codes of 6 bits, less 32, of the lower four and the upper two.
VC_INLINE Bytes with_upper(Bytes lower, Bytes upper) {
  for (int i = 0; i < 2; ++i) {
    const uint8x16_t all = vorrq_u8(lower.v[i], vshlq_n_u8(upper.v[i], 4));
    lower.v[i] = vsubq_u8(all, vdupq_n_u8(32));
  }
  return lower;
}

// The 16 bytes that codes stand for.
template <int bits, bool>
struct Table {
  uint8x16_t v;
  VC_INLINE explicit Table(const uint8_t* p) : v(vld1q_u8(p)) {}
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    planes<bits == 3 ? 2 : bits>(p, out);
    if constexpr (bits == 3) add_third_bits(p + 32, out);
    for (int i = 0; i < 8; ++i) out[i / 2].v[i % 2] = vqtbl1q_u8(v, out[i / 2].v[i % 2]);
  }
};

// The 16 floats that codes of 4 bits stand for, in four planes of their bytes.
struct FloatTable {
  uint8x16x4_t v;
  VC_INLINE explicit FloatTable(const float* p) : v(vld4q_u8(reinterpret_cast<const uint8_t*>(p))) {}
  VC_INLINE void read(const uint8_t* p, Floats* out) const {
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t all = vld1q_u8(p + 16 * i);
      values(vandq_u8(all, vdupq_n_u8(15)), out + 2 * i);
      values(vshrq_n_u8(all, 4), out + 8 + 2 * i);
    }
  }
  VC_INLINE void values(uint8x16_t codes, Floats* out) const {
    uint8x16x4_t bytes;
    for (int i = 0; i < 4; ++i) bytes.val[i] = vqtbl1q_u8(v.val[i], codes);
    alignas(16) float sixteen[16];
    vst4q_u8(reinterpret_cast<uint8_t*>(sixteen), bytes);
    for (int i = 0; i < 4; ++i) out[i / 2].v[i % 2] = vld1q_f32(sixteen + 4 * i);
  }
};

// Windows of a trellis from `at` bits on, of 8 lanes that hold 16 bits in each part.
template <int at>
VC_INLINE uint16x8_t trellis_values(const uint16x8_t* parts, uint16x8_t mask) {
  constexpr int kPart = at / 16, kShift = at % 16;
  uint16x8_t window = parts[kPart];
  if constexpr (kShift) {
    window = vorrq_u16(vshrq_n_u16(window, kShift), vshlq_n_u16(parts[kPart + 1], 16 - kShift));
  }
  const uint16x8_t addend = vdupq_n_u16(kTrellisAddend);
  const uint16x8_t hash = vmlaq_n_u16(addend, vandq_u16(window, mask), kTrellisFactor);
  const uint16x8_t digits = vdupq_n_u16(0x0f0f);
  const uint16x8_t sums =
      vaddq_u16(vandq_u16(hash, digits), vandq_u16(vshrq_n_u16(hash, 4), digits));
  const uint16x8_t lower = vandq_u16(sums, vdupq_n_u16(255)), upper = vshrq_n_u16(sums, 8);
  return vmlaq_n_u16(vmulq_n_u16(lower, kTrellisLower), upper, kTrellisUpper);
}
// 4 columns of a row's 4 tiles.
template <int bits, int quarter>
VC_INLINE uint32x4_t trellis_columns(const uint16x8_t* parts, uint16x8_t mask) {
  const uint16x8_t even = trellis_values<2 * quarter * bits>(parts, mask);
  const uint16x8_t odd = trellis_values<(2 * quarter + 1) * bits>(parts, mask);
  const uint8x16_t both = vreinterpretq_u8_u16(vorrq_u16(even, vshlq_n_u16(odd, 8)));
  return vreinterpretq_u32_u8(vsubq_u8(both, vdupq_n_u8(kTrellisMiddle)));
}
// 128 columns of a row at `p`, into which the windows of the row before reach, as this one's reach
// into that at `next`. Tiles lie in the order 0, 2, 4, 6, 1, 3, 5, 7.
template <int bits>
VC_INLINE void trellis(const uint8_t* p, const uint8_t* next, uint16_t window, Bytes* out) {
  const uint16x8_t mask = vdupq_n_u16(window);
  for (int half = 0; half < 2; ++half) {
    const uint32x4_t own = vreinterpretq_u32_u8(vld1q_u8(p + 16 * half));
    const uint32x4_t following = vreinterpretq_u32_u8(vld1q_u8(next + 16 * half));
    const uint16x8_t after = vreinterpretq_u16_u32(
        vorrq_u32(vshrq_n_u32(own, 16), vshlq_n_u32(following, 16)));
    uint16x8_t parts[3] = {vreinterpretq_u16_u32(own), after, after};
    if constexpr (bits == 3) {
      parts[1] = vorrq_u16(vmovl_u8(vld1_u8(p + 32 + 8 * half)), vshlq_n_u16(after, 8));
      parts[2] = vshrq_n_u16(after, 8);
    } else if constexpr (bits == 4) {
      parts[1] = vreinterpretq_u16_u8(vld1q_u8(p + 32 + 16 * half));
    }
    const uint32x4_t a = trellis_columns<bits, 0>(parts, mask);
    const uint32x4_t b = trellis_columns<bits, 1>(parts, mask);
    const uint32x4_t c = trellis_columns<bits, 2>(parts, mask);
    const uint32x4_t d = trellis_columns<bits, 3>(parts, mask);
    const uint64x2_t ab = vreinterpretq_u64_u32(vzip1q_u32(a, b));
    const uint64x2_t cd = vreinterpretq_u64_u32(vzip1q_u32(c, d));
    const uint64x2_t ab_high = vreinterpretq_u64_u32(vzip2q_u32(a, b));
    const uint64x2_t cd_high = vreinterpretq_u64_u32(vzip2q_u32(c, d));
    out[0].v[half] = vreinterpretq_u8_u64(vzip1q_u64(ab, cd));
    out[1].v[half] = vreinterpretq_u8_u64(vzip2q_u64(ab, cd));
    out[2].v[half] = vreinterpretq_u8_u64(vzip1q_u64(ab_high, cd_high));
    out[3].v[half] = vreinterpretq_u8_u64(vzip2q_u64(ab_high, cd_high));
  }
}

template <bool is_signed, int count>
VC_INLINE Ints start(const Bytes*) {
  return {{vdupq_n_s32(0), vdupq_n_s32(0)}};
}
// Adds the products of `count` vectors of weight and activation bytes, in 8 lanes.
template <bool is_signed, int count>
VC_INLINE Ints dot(const Bytes* w, const int8_t* x, Ints sum) {
  for (int i = 0; i < 2 * count; ++i) {
    const int8x16_t codes = vreinterpretq_s8_u8(w[i / 2].v[i % 2]);
    sum.v[i % 2] = vdotq_s32(sum.v[i % 2], codes, vld1q_s8(x + 16 * i));
  }
  return sum;
}

VC_INLINE Floats zero() { return {{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
VC_INLINE Floats load_floats(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4)}}; }
VC_INLINE void store_floats(Floats a, float* p) { vst1q_f32(p, a.v[0]), vst1q_f32(p + 4, a.v[1]); }
VC_INLINE Floats add(Floats a, Floats b) {
  return {{vaddq_f32(a.v[0], b.v[0]), vaddq_f32(a.v[1], b.v[1])}};
}
VC_INLINE Floats subtract(Floats a, Floats b) {
  return {{vsubq_f32(a.v[0], b.v[0]), vsubq_f32(a.v[1], b.v[1])}};
}
// Sums of each lane with its `partner`, differences where `lanes` are set.
VC_INLINE float32x4_t pairs(float32x4_t a, float32x4_t partner, uint32x4_t lanes) {
  return vbslq_f32(lanes, vsubq_f32(partner, a), vaddq_f32(a, partner));
}
// The Walsh-Hadamard transform of a vector, but for the factor.
VC_INLINE Floats butterflies(Floats x) {
  const uint32x4_t odd = {0, ~0u, 0, ~0u}, upper = {0, 0, ~0u, ~0u};
  for (auto& a : x.v) {
    a = pairs(a, vrev64q_f32(a), odd);
    a = pairs(a, vextq_f32(a, a, 2), upper);
  }
  return {{vaddq_f32(x.v[0], x.v[1]), vsubq_f32(x.v[0], x.v[1])}};
}
VC_INLINE Floats multiply_add(Floats a, Floats b, Floats sum) {
  return {{vfmaq_f32(sum.v[0], a.v[0], b.v[0]), vfmaq_f32(sum.v[1], a.v[1], b.v[1])}};
}
// The same with a factor of its own for each half of the lanes.
VC_INLINE Floats scale_add_halves(Floats a, const float* factors, Floats sum) {
  return {{vfmaq_n_f32(sum.v[0], a.v[0], factors[0]), vfmaq_n_f32(sum.v[1], a.v[1], factors[1])}};
}
VC_INLINE Floats scale_add(Floats a, float factor, Floats sum) {
  const float both[2] = {factor, factor};
  return scale_add_halves(a, both, sum);
}
VC_INLINE Floats scale(Ints a, float factor) {
  return {{vmulq_n_f32(vcvtq_f32_s32(a.v[0]), factor), vmulq_n_f32(vcvtq_f32_s32(a.v[1]), factor)}};
}

// 8 numbers of 16 bits as floats.
VC_INLINE Floats from_halves(uint16x8_t bits) {
  const float16x8_t halves = vreinterpretq_f16_u16(bits);
  return {{vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)}};
}
VC_INLINE Floats from_bfloat16(uint16x8_t bits) {
  return {{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
           vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))}};
}
// Bytes 8 * part to 8 * part + 7 as floats.
template <bool is_signed, int part>
VC_INLINE Floats widen(Bytes a) {
  const uint8x16_t half = a.v[part / 2];
  const uint8x8_t bytes = part % 2 ? vget_high_u8(half) : vget_low_u8(half);
  const int16x8_t wide = is_signed ? vmovl_s8(vreinterpret_s8_u8(bytes))
                                   : vreinterpretq_s16_u16(vmovl_u8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide))}};
}
// 8 E4M3 numbers as float16 takes them, see `numbers.h`.
VC_INLINE Floats widen_e4m3(const uint8_t* p) {
  const int16x8_t codes = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  const uint16x8_t shifted = vreinterpretq_u16_s16(vshlq_n_s16(codes, 7));
  return from_halves(vandq_u16(shifted, vdupq_n_u16(0xbf80)));
}

// The next bytes of `from`, in order, where a bit of 32 is set, else 0. Reads 8 bytes at a time.
VC_INLINE Bytes expand(const uint8_t*& from, const uint8_t* mask) {
  uint8x8_t parts[4];
  for (int i = 0; i < 4; ++i) {
    parts[i] = vtbl1_u8(vld1_u8(from), vld1_u8(kPlaces.low[mask[i]]));
    from += __builtin_popcount(mask[i]);
  }
  return {{vcombine_u8(parts[0], parts[1]), vcombine_u8(parts[2], parts[3])}};
}
// The same for 8 numbers of 16 bits, widened. Reads 16 bytes.
template <bool is_bfloat16>
VC_INLINE Floats expand_floats(const uint8_t*& from, const uint8_t* which) {
  const uint8_t mask = *which;
  const uint16x8_t bits =
      vreinterpretq_u16_u8(vqtbl1q_u8(vld1q_u8(from), vld1q_u8(kPlaces.pairs[mask])));
  from += 2 * __builtin_popcount(mask);
  return is_bfloat16 ? from_bfloat16(bits) : from_halves(bits);
}

// 128 columns from `stored` bytes of nibbles, 16 low halves before 16 high ones, and, after them,
// the mask of columns they are for; codes less 8.
VC_INLINE void spread_nibbles(const uint8_t* p, int64_t stored, Bytes* out) {
  uint8_t codes[128 + 8];  // 8 are read at a time
  const uint8x16_t middle = vdupq_n_u8(8);
  for (int64_t at = 0; at < stored; at += 16) {
    const uint8x16_t both = vld1q_u8(p + at);
    vst1q_u8(codes + 2 * at, vsubq_u8(vandq_u8(both, vdupq_n_u8(15)), middle));
    vst1q_u8(codes + 2 * at + 16, vsubq_u8(vshrq_n_u8(both, 4), middle));
  }
  const uint8_t* from = codes;
  for (int i = 0; i < 4; ++i) out[i] = expand(from, p + stored + 4 * i);
}

VC_INLINE float total(Floats a) { return vaddvq_f32(vaddq_f32(a.v[0], a.v[1])); }

}  // namespace vec
