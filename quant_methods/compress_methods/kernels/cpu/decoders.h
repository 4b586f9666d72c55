// From stored weights to numbers: a line of 128 columns becomes four vectors of 32 codes, or sixteen
// of 8 floats.
//
// A line is the packing block of format `integer`: inside it, a plane of p bits keeps columns
// i, i + 16p, i + 32p, ... in byte i, lowest bits first. In a sparse line only the kept columns are
// stored, so packed (4 bits in blocks of 32), and after them one bit per column. A new format is one
// more decoder.
#pragma once

#include <cstring>

#include "vector.h"

constexpr int kLine = 128;
constexpr int kVectors = kLine / 32;
constexpr int kMask = kLine / 8;  // bytes that say which columns of a sparse line are kept

struct Codes {
  vec::Bytes v[kVectors];
};
struct Values {
  vec::Floats v[kLine / vec::kFloats];
};

template <int bits>
struct Decoder;

template <>
struct Decoder<2> {
  using Line = Codes;
  static constexpr bool kSigned = false;
  static void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::Bytes* out = line.v;
    const vec::Bytes all = vec::load(p);
    out[0] = vec::mask(all, 3);
    out[1] = vec::shift_mask<2>(all, 3);
    out[2] = vec::shift_mask<4>(all, 3);
    out[3] = vec::shift_mask<6>(all, 3);
  }
};

template <>
struct Decoder<3> {
  using Line = Codes;
  static constexpr bool kSigned = false;
  static void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::Bytes* out = line.v;
    Decoder<2>::decode(p, 0, line);
    out[0] = vec::either(out[0], vec::spread_bits<0>(p + 32, 4));
    out[1] = vec::either(out[1], vec::spread_bits<2>(p + 32, 4));
    out[2] = vec::either(out[2], vec::spread_bits<4>(p + 32, 4));
    out[3] = vec::either(out[3], vec::spread_bits<6>(p + 32, 4));
  }
};

template <>
struct Decoder<4> {
  using Line = Codes;
  static constexpr bool kSigned = false;
  static void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::Bytes* out = line.v;
    const vec::Bytes low = vec::load(p), high = vec::load(p + 32);
    out[0] = vec::mask(low, 15);
    out[1] = vec::mask(high, 15);
    out[2] = vec::shift_mask<4>(low, 15);
    out[3] = vec::shift_mask<4>(high, 15);
  }
};

template <>
struct Decoder<8> {  // codes less 128, so that they are signed bytes
  using Line = Codes;
  static constexpr bool kSigned = true;
  static void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::Bytes* out = line.v;
    for (int i = 0; i < kVectors; ++i) out[i] = vec::load(p + 32 * i);
  }
};

struct Floats {  // what a line of sparse floats becomes
  using Line = Values;
  static void decode(const uint8_t* p, int64_t, Values& line) { std::memcpy(&line, p, sizeof line); }
};

// Kept values in `bytes` - kMask bytes, then the mask. Vectors may be read up to the end of the mask.
template <int bits>
struct Sparse;

template <>
struct Sparse<8> {
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
  static void decode(const uint8_t* p, int64_t bytes, Codes& line) {
    const uint8_t* mask = p + bytes - kMask;
    for (int i = 0; i < kVectors; ++i) line.v[i] = vec::expand(p, mask + 4 * i);
  }
};

template <>
struct Sparse<4> {  // codes less 8 by then
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
  static void decode(const uint8_t* p, int64_t bytes, Codes& line) {
    uint8_t kept[kLine + kMask];
    const int64_t stored = bytes - kMask;
    for (int64_t at = 0; at < stored; at += 16) vec::store(vec::nibbles(p + at), kept + 2 * at);
    const uint8_t *mask = p + stored, *from = kept;
    for (int i = 0; i < kVectors; ++i) line.v[i] = vec::expand(from, mask + 4 * i);
  }
};

template <bool is_bfloat16>
struct SparseFloats {
  using Line = Values;
  using Dense = Floats;
  static void decode(const uint8_t* p, int64_t bytes, Values& line) {
    const uint8_t* mask = p + bytes - kMask;
    for (int i = 0; i < kLine / 8; ++i) line.v[i] = vec::expand_floats<is_bfloat16>(p, mask[i]);
  }
};
