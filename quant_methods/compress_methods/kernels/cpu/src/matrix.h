// A matrix as `operators.cpp` hands it over.
#pragma once

#include <algorithm>

#include "decoders.h"
#include "numbers.h"

// Fetches what follows a line of the cache: into the first level, and into the second so far ahead
// that memory stays busy while a row is finished.
VC_INLINE void fetch_ahead(const uint8_t* p) {
  constexpr int64_t kNear = 2048, kFar = 8192;
  vec::prefetch(p + kNear);
  vec::prefetch_far(p + kFar);
}

constexpr int64_t kTable = 16, kTableRows = 16;  // bytes of a table, rows that may share one
constexpr int64_t kTileRows = 16;                // rows of a trellis that bite each other's tail

#ifdef VC_BLOCKS
constexpr int64_t kRowsTogether = 16;
constexpr uint8_t kZero = 128;
#else
constexpr int64_t kRowsTogether = 1;
constexpr uint8_t kZero = 0;
#endif

// Twice the values of E2M1, as a table of `Matrix` has them.
constexpr uint8_t e2m1(int twice) { return static_cast<uint8_t>(kZero + twice); }
constexpr uint8_t kTwiceE2m1[kTable] = {
    e2m1(0), e2m1(1),  e2m1(2),  e2m1(3),  e2m1(4),  e2m1(6),  e2m1(8),  e2m1(12),
    e2m1(0), e2m1(-1), e2m1(-2), e2m1(-3), e2m1(-4), e2m1(-6), e2m1(-8), e2m1(-12),
};

// In blocks where `kRowsTogether` > 1 (`blocks/`): weights [blocks, lines, bytes], where a line is
// 128 columns of 16 rows, scales and zeros [blocks, groups, 16].
struct Matrix {
  const uint8_t* weights;  // [rows, lines, bytes]
  const void* scales;      // [rows, groups], or null: ones
  const uint8_t* zeros;    // [rows, groups], or null: every zero is `middle`
  int64_t rows, lines, bytes, groups;
  int32_t bits, group;  // columns per group, 0 for the whole row
  int32_t sparse;       // whether lines are: kept values, then a mask; zeros are null then
  int32_t mid;          // whether codes count twice and zeros lie between two; zeros are null then
  Dtype scale_dtype;    // if there are 16 bits, of the values
  // [rows / table_rows, 16] bytes that codes stand for, or null; one table for a row, or for 16.
  // Those of fewer bits repeat until there are 16.
  // Row by row they are signed, else 128 more than they are. Zeros are null then.
  const uint8_t* tables = nullptr;
  int64_t table_rows = 1;
  // Bits of a window of a trellis that count, or 0. Row by row its values are signed, else `middle`
  // more. Zeros are null then.
  int32_t window = 0;
  int32_t floats = 0;                 // whether codes are E2M1, whose table is `kTwiceE2m1`, or E4M3
  const float* row_scales = nullptr;  // of floats: [rows, with those that fill a block], or ones
  int64_t scale_rows = 1;             // that share `scales`
  // 16 floats that codes stand for, or null. `floats` is set then, and zeros are null.
  const float* values = nullptr;

  int32_t middle() const {
    if (window) return kTrellisMiddle;
    return tables ? 128 : floats ? 0 : mid ? (1 << bits) - 1 : 1 << (bits - 1);
  }
  // What decoded floats are multiplied by to be what they are.
  float unit() const { return !floats || values ? 1.0f : bits == 8 ? kE4m3Unit : 0.5f; }
  float factor_of(int64_t row) const { return row_scales ? unit() * row_scales[row] : unit(); }
  Key key_of(int64_t row) const {
    const int64_t next = row % kTileRows == kTileRows - 1 ? 1 - kTileRows : 1;
    return {tables ? tables + row / table_rows * kTable : nullptr, next * lines * bytes,
            static_cast<uint16_t>((1 << window) - 1), values};
  }
};
