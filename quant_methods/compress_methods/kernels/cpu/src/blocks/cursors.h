// Goes through the lines of a block of 16 rows, two vectors of codes or eight of floats at a time.
//
// A line of 128 columns is 16 such halves of 8 columns of every row. Vectors of codes have 4
// columns of each row, side by side; vectors of floats one. Codes are unsigned.
//
// In a sparse line all kept values come first, in the order of its vectors, then a bit for every
// place in them. Its size is always the same, so each can be found; inside it, masks tell how many
// values to go on. 4-bit values are packed in blocks of 32. As floats, codes of sparse lines have
// lost their zero point, so that nothing adds nothing.
#pragma once

#include "matrix.h"

// What `gemm.cpp` calls the lines of sparse matrices.
template <int bits>
struct Sparse {
  using Line = Codes;
  static constexpr int kMiddle = 1 << (bits - 1);  // the code of nothing
};
template <bool is_bfloat16>
struct SparseFloats {
  using Line = Values;
};

namespace block {

constexpr int kBlock = 16;                 // rows
constexpr int kColumns = 8;                // of a part of a line
constexpr int kParts = kLine / kColumns;   // of a line
constexpr int kMask = kBlock * kLine / 8;  // bytes of a sparse line

template <class Code>
struct Cursor {
  const uint8_t* p;
  int64_t bytes;  // of a part
  Reader<Code> reader;

  VC_INLINE Cursor(const uint8_t* from, int64_t line_bytes, const Key& key)
      : p(from), bytes(line_bytes / kParts), reader(key) {}
  VC_INLINE void next(typename Code::Line& to) {
    reader.read(p, bytes, to);
    p += bytes;
  }
};

template <int bits>
struct Cursor<Decoder<bits>> {
  const uint8_t* p;
  int64_t bytes;
  vec::Planes<bits> planes;

  VC_INLINE Cursor(const uint8_t* from, int64_t line_bytes, const Key&)
      : p(from), bytes(line_bytes / kParts) {}
  VC_INLINE void next(Codes& to) {
    planes.read(p, to.v);
    p += bytes;
  }
};

template <int bits>
struct Cursor<Mid<bits>> : Cursor<Decoder<bits>> {  // twice the codes: scales are halves, zeros whole
  using Cursor<Decoder<bits>>::Cursor;
  VC_INLINE void next(Codes& to) {
    Cursor<Decoder<bits>>::next(to);
    for (auto& codes : to.v) codes = vec::twice(codes);
  }
};

// Where values and mask of a sparse line are.
struct SparseLine {
  const uint8_t *line, *values = nullptr, *mask = nullptr;
  int64_t bytes;
  int part = 0;

  VC_INLINE SparseLine(const uint8_t* from, int64_t line_bytes, const Key&)
      : line(from), bytes(line_bytes) {}
  // Whether a line begins.
  VC_INLINE bool enter() {
    const bool begins = part == 0;
    if (begins) values = line, line += bytes, mask = line - kMask;
    part = (part + 1) % kParts;
    return begins;
  }
};

template <>
struct Cursor<Sparse<8>> : SparseLine {
  using SparseLine::SparseLine;
  VC_INLINE void next(Codes& to) {
    enter();
    const vec::Bytes rest = {_mm512_set1_epi8(static_cast<char>(Sparse<8>::kMiddle))};
    for (auto& codes : to.v) codes = vec::expand(values, mask, rest), mask += 8;
  }
};

template <>
struct Cursor<Sparse<4>> : SparseLine {
  alignas(64) uint8_t codes[kBlock * kLine];
  const uint8_t* code = codes;

  using SparseLine::SparseLine;
  VC_INLINE void next(Codes& to) {
    if (enter()) {
      const int64_t stored = mask - values;
      for (int64_t i = 0; i < stored; i += 32) {
        _mm512_store_si512(codes + 2 * i, vec::nibbles(values + i).v);
      }
      code = codes;
    }
    const vec::Bytes rest = {_mm512_set1_epi8(Sparse<4>::kMiddle)};
    for (auto& vector : to.v) vector = vec::expand(code, mask, rest), mask += 8;
  }
};

template <bool is_bfloat16>
struct Cursor<SparseFloats<is_bfloat16>> : SparseLine {
  using SparseLine::SparseLine;
  VC_INLINE void next(Values& to) {
    enter();
    for (auto& values_of : to.v) {
      values_of = vec::expand_floats<is_bfloat16>(values, mask), mask += 2;
    }
  }
};

// A part is half a tile: the first and the second 8 columns of its rows.
template <int bits>
struct Cursor<Trellis<bits>> {
  const uint8_t* p;
  vec::Windows<bits> windows;
  bool second = false;

  VC_INLINE Cursor(const uint8_t* from, int64_t, const Key& key) : p(from), windows(key.window) {}
  VC_INLINE void next(Codes& to) {
    if (second) {
      windows.template half<1>(to.v);
    } else {
      windows.load(p), p += vec::Windows<bits>::kSize;
      windows.template half<0>(to.v);
    }
    second = !second;
  }
};

}  // namespace block
