// From stored weights to numbers: a line of 128 codes becomes vectors of codes, or of floats.
//
// A line is the packing block of format `integer`: inside it, a plane of p bits keeps codes
// i, i + 16p, i + 32p, ... in byte i, lowest bits first. Which columns, and of how many rows, these
// are is the layout's affair. A new format is one more decoder, or a table between code and number.
#pragma once

#include <cstring>

#include "vector/vector.h"

constexpr int kLine = 128;
constexpr int kVectors = kLine / vec::kBytes;

struct Codes {
  vec::Bytes v[kVectors];
};
struct Values {
  vec::Floats v[kLine / vec::kFloats];
};

#ifdef VC_BLOCKS  // which a cursor decodes
template <int bits>
struct Decoder {
  using Line = Codes;
};
template <int bits>
struct Mid {
  using Line = Codes;
};
#else
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
struct Decoder<5> {
  using Line = Codes;
  static constexpr bool kSigned = false;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::planes<4>(p, line.v);
    vec::add_fifth_bits(p + 64, line.v);
  }
};

template <>
struct Decoder<6> {  // row by row less 32: AVX2 adds products of unsigned bytes up to 5 bits only
  using Line = Codes;
  static constexpr bool kSigned = true;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Codes& line) {
    Codes upper;
    vec::planes<4>(p, line.v);
    vec::planes<2>(p + 64, upper.v);
    for (int i = 0; i < kVectors; ++i) line.v[i] = vec::with_upper(line.v[i], upper.v[i]);
  }
};

template <>
struct Decoder<8> {  // row by row less 128, so that they are signed bytes
  using Line = Codes;
  static constexpr bool kSigned = true;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Codes& line) {
    vec::planes<8>(p, line.v);
  }
};

template <int bits>
struct Mid {  // twice the codes: scales are halves, and zeros whole
  using Line = Codes;
  static constexpr bool kSigned = false;
  static VC_INLINE void decode(const uint8_t* p, int64_t bytes, Codes& line) {
    Decoder<bits>::decode(p, bytes, line);
#pragma GCC unroll 4
    for (auto& codes : line.v) codes = vec::twice(codes);
  }
};
#endif

// Codes of a table, which every row has of its own or all rows of a vector share.
template <int bits, bool shared>
struct LookUp {
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
};

// Windows of a trellis, see `formats/trellis.py`; row by row less the middle, to be signed.
template <int bits>
struct Trellis {
  using Line = Codes;
  using Dense = Decoder<8>;
  static constexpr bool kSigned = true;
};

// What rows need besides their codes: the table, if there is one, of bytes or of floats; of a
// trellis, how far on the row is that the windows of this one reach into, and the bits of a window
// that count.
struct Key {
  const uint8_t* table;
  int64_t next;
  uint16_t window;
  const float* values;
};

// Reads line after line of a code.
template <class Code>
struct Reader {
  VC_INLINE explicit Reader(const Key&) {}
  VC_INLINE void read(const uint8_t* p, int64_t bytes, typename Code::Line& line) const {
    Code::decode(p, bytes, line);
  }
};

template <int bits, bool shared>
struct Reader<LookUp<bits, shared>> {
  vec::Table<bits, shared> table;

  VC_INLINE explicit Reader(const Key& key) : table(key.table) {}
  VC_INLINE void read(const uint8_t* p, int64_t, Codes& line) const { table.read(p, line.v); }
};

#ifndef VC_BLOCKS
template <int bits>
struct Reader<Trellis<bits>> {
  int64_t next;
  uint16_t window;

  VC_INLINE explicit Reader(const Key& key) : next(key.next), window(key.window) {}
  VC_INLINE void read(const uint8_t* p, int64_t, Codes& line) const {
    vec::trellis<bits>(p, p + next, window, line.v);
  }
};
#endif

struct FloatTable {  // codes of 4 bits that stand for 16 floats, one table for all rows
  using Line = Values;
  using Dense = struct Floats;
};

template <>
struct Reader<FloatTable> {
  vec::FloatTable table;

  VC_INLINE explicit Reader(const Key& key) : table(key.values) {}
  VC_INLINE void read(const uint8_t* p, int64_t, Values& line) const { table.read(p, line.v); }
};

struct Floats {  // what other lines are decoded to
  using Line = Values;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Values& line) {
    const float* from = reinterpret_cast<const float*>(p);
#pragma GCC unroll 16
    for (auto& value : line.v) value = vec::load_floats(from), from += vec::kFloats;
  }
};

struct E4m3 {  // in units of `kE4m3Unit`
  using Line = Values;
  using Dense = Floats;
  static VC_INLINE void decode(const uint8_t* p, int64_t, Values& line) {
#pragma GCC unroll 16
    for (auto& value : line.v) value = vec::widen_e4m3(p), p += vec::kFloats;
  }
};
