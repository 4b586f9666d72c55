// The same vectors in plain C++, for any processor; what the compiler makes of it.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector/float16.h"

namespace vec {

struct Bytes {
  uint8_t v[32];
};
struct Ints {
  int32_t v[8];
};
struct Floats {
  float v[8];
};
constexpr int kBytes = 32, kFloats = 8;
constexpr int kSignedOffset = 0;
constexpr int kTokens = 4;  // that registers hold the sums of

inline void prefetch(const uint8_t*) {}
inline void prefetch_far(const uint8_t*) {}
inline Bytes load(const uint8_t* p) {
  Bytes out;
  std::memcpy(out.v, p, 32);
  return out;
}
inline Bytes twice(Bytes a) {
  for (auto& byte : a.v) byte = static_cast<uint8_t>(2 * byte);
  return a;
}
inline void store(const Bytes& a, uint8_t* p) { std::memcpy(p, a.v, 32); }

template <int bits>
VC_INLINE void planes(const uint8_t* p, Bytes* out) {
  constexpr int kSize = 16 * bits;
  for (int i = 0; i < 128; ++i) {
    const int field = p[i % kSize] >> (i / kSize * bits);
    out[i / 32].v[i % 32] = static_cast<uint8_t>(field & ((1 << bits) - 1));
  }
}
inline void add_bits(const uint8_t* p, int place, Bytes* out) {
  for (int i = 0; i < 128; ++i) out[i / 32].v[i % 32] |= (p[i % 16] >> (i / 16) & 1) << place;
}
inline void add_third_bits(const uint8_t* p, Bytes* out) { add_bits(p, 2, out); }
inline void add_fifth_bits(const uint8_t* p, Bytes* out) { add_bits(p, 4, out); }
// Codes of 6 bits, less 32, of the lower four and the upper two.
inline Bytes with_upper(Bytes lower, const Bytes& upper) {
  for (int i = 0; i < 32; ++i) {
    lower.v[i] = static_cast<uint8_t>((lower.v[i] | upper.v[i] << 4) - 32);
  }
  return lower;
}

// The 16 bytes that codes stand for.
template <int bits, bool>
struct Table {
  const uint8_t* v;
  VC_INLINE explicit Table(const uint8_t* p) : v(p) {}
  VC_INLINE void read(const uint8_t* p, Bytes* out) const {
    planes<bits == 3 ? 2 : bits>(p, out);
    if constexpr (bits == 3) add_third_bits(p + 32, out);
    for (int i = 0; i < 128; ++i) out[i / 32].v[i % 32] = v[out[i / 32].v[i % 32]];
  }
};

// The 16 floats that codes of 4 bits stand for.
struct FloatTable {
  const float* v;
  VC_INLINE explicit FloatTable(const float* p) : v(p) {}
  VC_INLINE void read(const uint8_t* p, Floats* out) const {
    for (int i = 0; i < 64; ++i) {
      out[i / 8].v[i % 8] = v[p[i] & 15], out[8 + i / 8].v[i % 8] = v[p[i] >> 4];
    }
  }
};

// 128 columns of a row at `p`, into which the windows of the row before reach, as this one's reach
// into that at `next`. Tiles lie in the order 0, 2, 4, 6, 1, 3, 5, 7.
template <int bits>
VC_INLINE void trellis(const uint8_t* p, const uint8_t* next, uint16_t window, Bytes* out) {
  constexpr int kRest = bits - 2;  // bytes of a lane after the first two
  for (int lane = 0; lane < 16; ++lane) {
    const uint8_t* after = lane % 2 ? next + 2 * (lane - 1) : p + 2 * (lane + 1);
    uint64_t stream = p[2 * lane] | p[2 * lane + 1] << 8;
    for (int i = 0; i < kRest; ++i) {
      stream |= static_cast<uint64_t>(p[32 + kRest * lane + i]) << (16 + 8 * i);
    }
    stream |= static_cast<uint64_t>(after[0] | after[1] << 8) << (8 * bits);
    const int tile = lane / 2 < 4 ? lane / 2 * 2 : (lane / 2 - 4) * 2 + 1;
    for (int place = 0; place < 8; ++place) {
      const uint32_t part = static_cast<uint32_t>(stream >> (bits * place)) & window;
      const uint32_t hash = part * kTrellisFactor + kTrellisAddend;
      const int lower = (hash & 15) + (hash >> 4 & 15), upper = (hash >> 8 & 15) + (hash >> 12 & 15);
      const int value = kTrellisLower * lower + kTrellisUpper * upper - kTrellisMiddle;
      const int column = 16 * tile + place / 2 * 4 + lane % 2 * 2 + place % 2;
      out[column / 32].v[column % 32] = static_cast<uint8_t>(value);
    }
  }
}

template <bool is_signed, int count>
inline Ints start(const Bytes*) {
  return {};
}
template <bool is_signed, int count>
inline Ints dot(const Bytes* w, const int8_t* x, Ints sum) {
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < 32; ++j) {
      const int code = is_signed ? static_cast<int8_t>(w[i].v[j]) : w[i].v[j];
      sum.v[j / 4] += code * x[32 * i + j];
    }
  }
  return sum;
}

inline Floats zero() { return {}; }
inline Floats load_floats(const float* p) {
  Floats out;
  std::memcpy(out.v, p, sizeof(out.v));
  return out;
}
inline void store_floats(const Floats& a, float* p) { std::memcpy(p, a.v, sizeof(a.v)); }
inline Floats add(Floats a, const Floats& b) {
  for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
  return a;
}
inline Floats subtract(Floats a, const Floats& b) {
  for (int i = 0; i < 8; ++i) a.v[i] -= b.v[i];
  return a;
}
// The Walsh-Hadamard transform of a vector, but for the factor.
inline Floats butterflies(Floats a) {
  for (int apart = 1; apart < 8; apart *= 2) {
    for (int i = 0; i < 8; ++i) {
      if (i & apart) continue;
      const float first = a.v[i], second = a.v[i + apart];
      a.v[i] = first + second, a.v[i + apart] = first - second;
    }
  }
  return a;
}
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
  for (int i = 0; i < 8; ++i) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}
inline Floats scale_add(Floats a, float factor, Floats sum) {
  for (int i = 0; i < 8; ++i) sum.v[i] += a.v[i] * factor;
  return sum;
}
// The same with a factor of its own for each half of the lanes.
inline Floats scale_add_halves(Floats a, const float* factors, Floats sum) {
  for (int i = 0; i < 8; ++i) sum.v[i] += a.v[i] * factors[i / 4];
  return sum;
}
inline Floats scale(Ints a, float factor) {
  Floats out;
  for (int i = 0; i < 8; ++i) out.v[i] = static_cast<float>(a.v[i]) * factor;
  return out;
}

template <bool is_signed, int part>
inline Floats widen(Bytes a) {
  Floats out;
  for (int i = 0; i < 8; ++i) {
    const uint8_t byte = a.v[8 * part + i];
    out.v[i] = is_signed ? static_cast<float>(static_cast<int8_t>(byte)) : byte;
  }
  return out;
}

VC_INLINE Bytes expand(const uint8_t*& from, const uint8_t* mask) {
  Bytes out = {};
  for (int i = 0; i < 32; ++i) {
    if (mask[i / 8] >> (i % 8) & 1) out.v[i] = *from++;
  }
  return out;
}
inline float half_to_float(uint16_t bits) {
  Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}
// 8 E4M3 numbers as float16 takes them, see `numbers.h`.
inline Floats widen_e4m3(const uint8_t* p) {
  Floats out;
  for (int i = 0; i < 8; ++i) {
    out.v[i] = half_to_float(static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7));
  }
  return out;
}
template <bool is_bfloat16>
VC_INLINE Floats expand_floats(const uint8_t*& from, const uint8_t* which) {
  const uint8_t mask = *which;
  Floats out = {};
  for (int i = 0; i < 8; ++i) {
    if (!(mask >> i & 1)) continue;
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    from += sizeof bits;
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    if (is_bfloat16) {
      std::memcpy(&out.v[i], &wide, sizeof wide);
    } else {
      out.v[i] = half_to_float(bits);
    }
  }
  return out;
}

VC_INLINE void spread_nibbles(const uint8_t* p, int64_t stored, Bytes* out) {
  uint8_t codes[128];
  for (int64_t i = 0; i < 2 * stored; ++i) {
    const int code = p[i / 32 * 16 + i % 16] >> (i % 32 / 16 * 4) & 15;
    codes[i] = static_cast<uint8_t>(code - 8);
  }
  const uint8_t* from = codes;
  for (int i = 0; i < 4; ++i) out[i] = expand(from, p + stored + 4 * i);
}

inline float total(Floats a) {
  float sum = 0;
  for (float value : a.v) sum += value;
  return sum;
}

}  // namespace vec
