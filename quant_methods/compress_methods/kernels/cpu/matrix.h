// A matrix as `operators.cpp` hands it over, and what its scales and zero points do to a row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "activations.h"

// Fetches what follows a line of `bytes`: into the first-level cache, and into the second so far
// ahead that memory stays busy while a row is finished.
VC_INLINE void fetch_ahead(const uint8_t* p, int64_t bytes) {
  constexpr int64_t kNear = 2048, kFar = 8192;
  vec::prefetch(p + kNear);
  vec::prefetch_far(p + kFar);
  if (bytes > 64) {
    vec::prefetch(p + kNear + 64);
    vec::prefetch_far(p + kFar + 64);
  }
}

struct Matrix {
  const uint8_t* weights;  // [rows, lines, bytes]
  const void* scales;      // [rows, groups], or null: ones
  const uint8_t* zeros;    // [rows, groups], or null: every zero is 2^(bits - 1)
  int64_t rows, lines, bytes, groups;
  int32_t bits, group;  // columns per group, 0 for the whole row
  int32_t sparse;       // whether lines are sparse; zeros are null then
  Dtype scale_dtype;    // if there are 16 bits, of the values
};

// What a row's groups are multiplied by: scales (ones if the row has one, which is `factor` then),
// zeros as the decoder counts codes, and the product of the two.
struct RowTerms {
  std::vector<float> scales, zeros, offsets;
  float factor = 1;

  void load(const Matrix& m, int64_t row) {
    const float shift = m.bits == 8 ? 128.0f : 0.0f;
    const float middle = m.sparse ? 0.0f : static_cast<float>(1 << (m.bits - 1)) - shift;
    zeros.assign(m.groups, middle);
    if (m.zeros) {
      const uint8_t* stored = m.zeros + row * m.groups;
      for (int64_t g = 0; g < m.groups; ++g) zeros[g] = static_cast<float>(stored[g]) - shift;
    }
    if (m.group == 0) {
      factor = 1;
      if (m.scales) read_floats(m.scales, row, 1, m.scale_dtype, &factor);
      scales.assign(m.lines, 1.0f);
    } else {
      factor = 1;
      scales.resize(m.groups);
      read_floats(m.scales, row * m.groups, m.groups, m.scale_dtype, scales.data());
    }
    offsets.resize(m.sparse ? 0 : m.groups);
    for (size_t g = 0; g < offsets.size(); ++g) offsets[g] = scales[g] * zeros[g];
    if (m.group > kLine) {  // from here on one for each line
      const int64_t lines = m.group / kLine;
      scales.resize(m.lines);
      for (int64_t g = m.groups; g-- > 0;) {
        const float scale = scales[g];
        for (int64_t l = std::min((g + 1) * lines, m.lines); l-- > g * lines;) scales[l] = scale;
      }
    }
  }

  // Index of the group that a line begins with.
  static int64_t group_of(const Matrix& m, int64_t line) {
    return m.group == 0 ? 0 : line * kLine / m.group;
  }

  float correction(const float* sums) const {
    float part[8] = {};
    const int64_t count = static_cast<int64_t>(offsets.size());
    int64_t g = 0;
    for (; g + 8 <= count; g += 8) {
      for (int i = 0; i < 8; ++i) part[i] += offsets[g + i] * sums[g + i];
    }
    for (; g < count; ++g) part[0] += offsets[g] * sums[g];
    return ((part[0] + part[4]) + (part[1] + part[5])) +
           ((part[2] + part[6]) + (part[3] + part[7]));
  }
};
