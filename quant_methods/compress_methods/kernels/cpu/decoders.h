// From stored weights to bytes: a line of 128 columns becomes four vectors of 32 codes.
//
// A line is the packing block of format `integer`: inside it, a plane of p bits keeps columns
// i, i + 16p, i + 32p, ... in byte i, lowest bits first. A new format is one more decoder.
#pragma once

#include "vector.h"

constexpr int kLine = 128;
constexpr int kVectors = kLine / 32;

template <int bits>
struct Decoder;

template <>
struct Decoder<2> {
  static constexpr int kBytes = 32;
  static constexpr bool kSigned = false;
  static void decode(const uint8_t* p, vec::Bytes* out) {
    const vec::Bytes all = vec::load(p);
    out[0] = vec::mask(all, 3);
    out[1] = vec::shift_mask<2>(all, 3);
    out[2] = vec::shift_mask<4>(all, 3);
    out[3] = vec::shift_mask<6>(all, 3);
  }
};

template <>
struct Decoder<3> {
  static constexpr int kBytes = 48;
  static constexpr bool kSigned = false;
  static void decode(const uint8_t* p, vec::Bytes* out) {
    Decoder<2>::decode(p, out);
    out[0] = vec::either(out[0], vec::spread_bits<0>(p + 32, 4));
    out[1] = vec::either(out[1], vec::spread_bits<2>(p + 32, 4));
    out[2] = vec::either(out[2], vec::spread_bits<4>(p + 32, 4));
    out[3] = vec::either(out[3], vec::spread_bits<6>(p + 32, 4));
  }
};

template <>
struct Decoder<4> {
  static constexpr int kBytes = 64;
  static constexpr bool kSigned = false;
  static void decode(const uint8_t* p, vec::Bytes* out) {
    const vec::Bytes low = vec::load(p), high = vec::load(p + 32);
    out[0] = vec::mask(low, 15);
    out[1] = vec::mask(high, 15);
    out[2] = vec::shift_mask<4>(low, 15);
    out[3] = vec::shift_mask<4>(high, 15);
  }
};

template <>
struct Decoder<8> {  // codes less 128, so that they are signed bytes
  static constexpr int kBytes = 128;
  static constexpr bool kSigned = true;
  static void decode(const uint8_t* p, vec::Bytes* out) {
    for (int i = 0; i < kVectors; ++i) out[i] = vec::load(p + 32 * i);
  }
};
