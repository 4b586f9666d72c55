// The same vectors in plain C++, for any processor; what the compiler makes of it.
#pragma once

#include <cstdint>
#include <cstring>

namespace vec {

constexpr const char* kName = "plain";

struct Bytes {
  uint8_t v[32];
};
struct Ints {
  int32_t v[8];
};
struct Floats {
  float v[8];
};
constexpr int kFloats = 8;

inline Bytes load(const uint8_t* p) {
  Bytes out;
  std::memcpy(out.v, p, 32);
  return out;
}
inline Bytes mask(Bytes a, uint8_t bits) {
  for (auto& byte : a.v) byte &= bits;
  return a;
}
template <int shift>
inline Bytes shift_mask(Bytes a, uint8_t bits) {
  for (auto& byte : a.v) byte = static_cast<uint8_t>(byte >> shift) & bits;
  return a;
}
inline Bytes either(Bytes a, Bytes b) {
  for (int i = 0; i < 32; ++i) a.v[i] |= b.v[i];
  return a;
}

template <int low>
inline Bytes spread_bits(const uint8_t* p, uint8_t value) {
  Bytes out;
  for (int i = 0; i < 16; ++i) {
    out.v[i] = p[i] >> low & 1 ? value : 0;
    out.v[16 + i] = p[i] >> (low + 1) & 1 ? value : 0;
  }
  return out;
}

template <bool is_signed, int count>
inline Ints dot(const Bytes* w, const int8_t* x) {
  Ints out = {};
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < 32; ++j) {
      const int code = is_signed ? static_cast<int8_t>(w[i].v[j]) : w[i].v[j];
      out.v[j % 8] += code * x[32 * i + j];
    }
  }
  return out;
}

inline Floats zero() { return {}; }
inline Floats load_floats(const float* p) {
  Floats out;
  std::memcpy(out.v, p, sizeof(out.v));
  return out;
}
inline Floats multiply_add(Floats a, Floats b, Floats sum) {
  for (int i = 0; i < 8; ++i) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}
inline Floats scale_add(Floats a, float factor, Floats sum) {
  for (int i = 0; i < 8; ++i) sum.v[i] += a.v[i] * factor;
  return sum;
}
inline Floats scale_add(Ints a, float factor, Floats sum) {
  for (int i = 0; i < 8; ++i) sum.v[i] += static_cast<float>(a.v[i]) * factor;
  return sum;
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

inline Bytes expand(const uint8_t*& from, const uint8_t* mask) {
  Bytes out = {};
  for (int i = 0; i < 32; ++i) {
    if (mask[i / 8] >> (i % 8) & 1) out.v[i] = *from++;
  }
  return out;
}
inline float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}
template <bool is_bfloat16>
inline Floats expand_floats(const uint8_t*& from, uint8_t mask) {
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

inline void store(const Bytes& a, uint8_t* p) { std::memcpy(p, a.v, 32); }
inline Bytes nibbles(const uint8_t* p) {
  Bytes out;
  for (int i = 0; i < 16; ++i) {
    out.v[i] = static_cast<uint8_t>((p[i] & 15) - 8);
    out.v[16 + i] = static_cast<uint8_t>((p[i] >> 4) - 8);
  }
  return out;
}

inline float total(Floats a) {
  float sum = 0;
  for (float value : a.v) sum += value;
  return sum;
}

}  // namespace vec
