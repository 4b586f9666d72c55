// From stored weights to numbers: a line of 128 columns becomes four vectors of 32 codes, or
// sixteen of 8 floats.
//
// A line is the packing block of format `integer`: inside it, a plane of p bits keeps columns
// i, i + 16p, i + 32p, ... in byte i, lowest bits first. In a sparse line only the kept columns are
// stored, so packed (4 bits in blocks of 32), and after them one bit per column. A new format is
// one more decoder.
#pragma once

#include <cstring>

#include "vector.h"

constexpr int kLine = 128;
constexpr int kVectors = kLine / vec::kBytes;
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
  static VC_INLINE void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::planes<2>(p, line.v);
  }
};

template <>
struct Decoder<3> {
  using Line = Codes;
  static constexpr bool kSigned = false;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::planes<2>(p, line.v);
    vec::add_third_bits(p + 32, line.v);
  }
};

template <>
struct Decoder<4> {
  using Line = Codes;
  static constexpr bool kSigned = false;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::planes<4>(p, line.v);
  }
};

template <>
struct Decoder<8> {  // codes less 128, so that they are signed bytes
  using Line = Codes;
  static constexpr bool kSigned = true;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::planes<8>(p, line.v);
  }
};

struct Floats {  // what a line of sparse floats becomes
  using Line = Values;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Values& line) {
    std::memcpy(&line, p, sizeof line);
  }
};

// Kept values in `bytes` - kMask bytes, then the mask. Vectors may be read up to the end of the
// mask.
template <int bits>
struct Sparse;

template <>
struct Sparse<8> {
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
  static VC_INLINE void decode(const uint8_t* p, int64_t bytes, Codes& line) {
    const uint8_t* mask = p + bytes - kMask;
    for (int i = 0; i < kVectors; ++i) line.v[i] = vec::expand(p, mask + vec::kBytes / 8 * i);
  }
};

template <>
struct Sparse<4> {  // codes less 8 by then
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
  static VC_INLINE void decode(const uint8_t* p, int64_t bytes, Codes& line) {
    vec::spread_nibbles(p, bytes - kMask, line.v);
  }
};

template <bool is_bfloat16>
struct SparseFloats {
  using Line = Values;
  using Dense = Floats;
  static VC_INLINE void decode(const uint8_t* p, int64_t bytes, Values& line) {
    const uint8_t* mask = p + bytes - kMask;
    for (auto& value : line.v) {
      value = vec::expand_floats<is_bfloat16>(p, mask);
      mask += vec::kFloats / 8;
    }
  }
};
