// Numbers of 8, 16 and 32 bits, and how activations become codes.
//
// Quantized: int8 per token and line of 128 columns, q = round(x / scale), scale = max|x| / 127, so
// that an outlier costs its own line only; or one scale per token, where the format says so.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector/float16.h"

// Those of 8 bits are scales only.
enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kE8m0 = 3, kE4m3 = 4 };
enum class Mode : int32_t { kExact = 0, kInt8PerLine = 1, kInt8PerToken = 2 };

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// E8M0, a power of two.
inline float power_of(uint8_t code) {
  constexpr uint32_t kLeast = 0x400000;  // 2^-127, whose exponent is 0
  const uint32_t bits = static_cast<uint32_t>(code) << 23;
  return from_bits(bits < kLeast ? kLeast : bits);
}

// E4M3 is float16 but for a bit of the exponent, which makes it 256 times as large.
constexpr float kE4m3Unit = 256.0f;
inline float e4m3_of(uint8_t code) {
  const uint16_t bits = static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7f) << 7);
  Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value) * kE4m3Unit;
}

inline void read_floats(const void* from, int64_t first, int64_t count, Dtype dtype, float* to) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + first, count * sizeof(float));
  } else if (dtype == Dtype::kBfloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(from) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = from_bits(static_cast<uint32_t>(p[i]) << 16);
  } else if (dtype == Dtype::kFloat16) {
    const Float16* p = static_cast<const Float16*>(from) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(p[i]);
  } else if (dtype == Dtype::kE8m0) {
    const uint8_t* p = static_cast<const uint8_t*>(from) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = power_of(p[i]);
  } else {
    const uint8_t* p = static_cast<const uint8_t*>(from) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = e4m3_of(p[i]);
  }
}

inline void write_float(void* to, int64_t index, Dtype dtype, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(to)[index] = value;
  } else if (dtype == Dtype::kBfloat16) {
    const uint32_t bits = to_bits(value);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    static_cast<uint16_t*>(to)[index] = static_cast<uint16_t>(nan ? bits >> 16 | 0x40u : rounded);
  } else {
    static_cast<Float16*>(to)[index] = static_cast<Float16>(value);
  }
}

// `count` values from `to[first]` on.
inline void write_floats(const float* from, int64_t count, void* to, int64_t first, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(to) + first, from, count * sizeof(float));
  } else if (dtype == Dtype::kBfloat16) {
    for (int64_t i = 0; i < count; ++i) write_float(to, first + i, Dtype::kBfloat16, from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) write_float(to, first + i, Dtype::kFloat16, from[i]);
  }
}

// What values are multiplied by to become codes, and codes by to become values. `most` is the
// magnitude that becomes 127. If it isn't finite the scale is NaN, and with it all that it scales.
struct Step {
  float inverse, scale;
};
inline Step step_of(float most) {
  constexpr float kLeast = 1e-35f;
  if (to_bits(most) >= 0x7f800000u) return {0.0f, from_bits(0x7fc00000u)};
  return most > kLeast ? Step{127.0f / most, most / 127.0f} : Step{0.0f, 0.0f};
}
