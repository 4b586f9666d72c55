// A layer's input for products row by row, brought into the form they need once per call: codes or
// float32, either way with the sum over each weight group, by which zero points count.
#pragma once

#include <vector>

#include "matrix.h"

// Greatest magnitude; NaN or infinity if there is one (their bits are the greatest).
inline float magnitude(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = to_bits(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return from_bits(most);
}

struct Activations {
  int64_t tokens = 0, lines = 0, groups = 0;
  int group = kLine;  // columns per weight group; 0 for the whole row
  int offset = 0;     // added to codes, see `vec::kSignedOffset`
  std::vector<float> values, scales, sums;
  std::vector<int8_t> codes;

  // From one token to the next; tokens a power of two apart would share places in the cache.
  int64_t width() const { return lines * kLine + 64; }

  void resize(int64_t tokens_, int64_t lines_, int64_t groups_, int group_, int offset_,
              bool exact) {
    tokens = tokens_, lines = lines_, groups = groups_, group = group_, offset = offset_;
    if (exact) {
      grow(values, tokens * width());
    } else {
      grow(codes, tokens * width());
      grow(scales, tokens * lines);
    }
    grow(sums, tokens * groups);
  }

  template <class T>
  static void grow(std::vector<T>& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size) v.resize(size);
  }

  float& sum_of(int64_t token, int64_t column) {
    return sums[token * groups + (group == 0 ? 0 : column / group)];
  }

  void keep_line(int64_t token, int64_t at, const float* x) {
    std::memcpy(&values[token * width() + at * kLine], x, kLine * sizeof(float));
    const int step = group == 0 || group > kLine ? kLine : group;
    for (int first = 0; first < kLine; first += step) {
      float part[8] = {};
      for (int i = 0; i < step; ++i) part[i % 8] += x[first + i];
      float sum = 0;
      for (const float value : part) sum += value;
      sum_of(token, at * kLine + first) += sum;
    }
  }

  void quantize_line(int64_t token, int64_t at, const float* x, float most) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    int8_t* q = &codes[token * width() + at * kLine];
    const auto [inverse, scale] = step_of(most);
    scales[token * lines + at] = scale;
    const int step = group == 0 || group > kLine ? kLine : group;
    for (int first = 0; first < kLine; first += step) {
      int32_t sum = 0;
      if (inverse == 0.0f) {
        std::memset(q + first, offset, step);
      } else {
        for (int i = first; i < first + step; ++i) {
          const float rounded = x[i] * inverse + kRound - kRound;
          const int32_t code = static_cast<int32_t>(rounded);
          q[i] = static_cast<int8_t>(code + offset);
          sum += code;
        }
      }
      sum_of(token, at * kLine + first) += scale * static_cast<float>(sum);
    }
  }

  // One token: `cols` values of `x` from `first` on; columns beyond them count as zero.
  void fill(int64_t token, const void* x, int64_t first, int64_t cols, Dtype dtype, Mode mode) {
    std::memset(&sums[token * groups], 0, groups * sizeof(float));
    float row_most = 0;
    float x_line[kLine];
    if (mode == Mode::kInt8PerToken) {
      for (int64_t at = 0; at * kLine < cols; ++at) {
        const int64_t count = cols - at * kLine < kLine ? cols - at * kLine : kLine;
        read_floats(x, first + at * kLine, count, dtype, x_line);
        const float most = magnitude(x_line, count);
        row_most = to_bits(most) > to_bits(row_most) ? most : row_most;
      }
    }
    for (int64_t at = 0; at < lines; ++at) {
      const int64_t left = cols - at * kLine;
      const int64_t count = left < kLine ? left : kLine;
      read_floats(x, first + at * kLine, count, dtype, x_line);
      std::memset(x_line + count, 0, (kLine - count) * sizeof(float));
      if (mode == Mode::kExact) {
        keep_line(token, at, x_line);
      } else {
        quantize_line(token, at, x_line,
                      mode == Mode::kInt8PerToken ? row_most : magnitude(x_line, kLine));
      }
    }
  }
};
