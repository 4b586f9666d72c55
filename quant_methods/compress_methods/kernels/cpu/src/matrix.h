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
#else
constexpr int64_t kRowsTogether = 1;
#endif

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

  int32_t middle() const {
    return window ? kTrellisMiddle : tables ? 128 : mid ? (1 << bits) - 1 : 1 << (bits - 1);
  }
  Key key_of(int64_t row) const {
    const int64_t next = row % kTileRows == kTileRows - 1 ? 1 - kTileRows : 1;
    return {tables ? tables + row / table_rows * kTable : nullptr, next * lines * bytes,
            static_cast<uint16_t>((1 << window) - 1)};
  }
};
