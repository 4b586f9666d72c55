// Walsh-Hadamard transforms with signs: what a rotated matrix's inputs and outputs go through.
//
// A row is cut into blocks of `block` columns, and what is left into powers of two, the largest
// first. Column i of a block has the sign i of `block`; transforms are orthonormal.
#pragma once

#include <cmath>
#include <vector>

#include "call.h"

namespace rotation {

struct Signs {
  const float* values;  // +1 or -1, of one block
  int64_t block;
};

constexpr int kCount = kLine / vec::kFloats;

// Sums and differences of vectors `apart` from each other, and of those further apart.
template <int apart>
VC_INLINE void across(vec::Floats* v) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (i & apart) continue;
    const vec::Floats a = v[i], b = v[i + apart];
    v[i] = vec::add(a, b), v[i + apart] = vec::subtract(a, b);
  }
  if constexpr (2 * apart < kCount) across<2 * apart>(v);
}

// x <- H x for a line of 128, but for the factor.
inline void transform_line(float* x) {
  vec::Floats v[kCount];
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) v[i] = vec::butterflies(vec::load_floats(x + i * vec::kFloats));
  across<1>(v);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) vec::store_floats(v[i], x + i * vec::kFloats);
}

// The same for any power of two.
inline void transform(float* x, int64_t size) {
  int64_t apart = 1;
  if (size >= kLine) {
    for (int64_t at = 0; at < size; at += kLine) transform_line(x + at);
    apart = kLine;
  }
  for (; apart < size; apart *= 2) {
    for (int64_t at = 0; at < size; at += 2 * apart) {
      for (int64_t i = at; i < at + apart; ++i) {
        const float a = x[i], b = x[i + apart];
        x[i] = a + b, x[i + apart] = a - b;
      }
    }
  }
}

// f(first column, columns, first sign, factor) for every block of a row.
template <class F>
inline void for_blocks(int64_t cols, int64_t block, const F& f) {
  int64_t at = 0, size = block;
  while (at < cols) {
    while (size > cols - at) size /= 2;
    f(at, size, at % block, 1.0f / std::sqrt(static_cast<float>(size)));
    at += size;
  }
}

// out <- H S x for a row of `cols`.
inline void turn_inputs(const void* x, int64_t first, int64_t cols, Dtype dtype, Signs signs,
                        float* out) {
  read_floats(x, first, cols, dtype, out);
  for_blocks(cols, signs.block, [&](int64_t at, int64_t size, int64_t sign, float factor) {
    float* block = out + at;
    const float* s = signs.values + sign;
    for (int64_t i = 0; i < size; ++i) block[i] *= s[i] * factor;
    transform(block, size);
  });
}

// x <- S H x + bias for a row of `rows`.
inline void turn_outputs(float* x, int64_t rows, Signs signs, const float* bias) {
  for_blocks(rows, signs.block, [&](int64_t at, int64_t size, int64_t sign, float factor) {
    float* block = x + at;
    const float* s = signs.values + sign;
    transform(block, size);
    for (int64_t i = 0; i < size; ++i) block[i] *= s[i] * factor;
  });
  if (!bias) return;
  for (int64_t i = 0; i < rows; ++i) x[i] += bias[i];
}

constexpr int64_t kMostFloats = 1 << 23;  // held between the transforms
constexpr int64_t kFewestTokens = 32;
constexpr int64_t kShare = 1 << 14;  // values worth a thread

// out = S H (W (H S x)) + bias; `r` is of the whole product, `multiply` of the matrix inside takes
// rows of floats.
template <class F>
void product(const Request& r, Signs inputs, Signs outputs, const F& multiply) {
  static thread_local std::vector<float> turned, sums;
  const int64_t rows = r.m.rows, fitting = kMostFloats / std::max<int64_t>(1, rows + r.cols);
  const int64_t most = std::max(kFewestTokens, fitting);
  for (int64_t first = 0; first < r.tokens; first += most) {
    const int64_t count = std::min(most, r.tokens - first);
    if (static_cast<int64_t>(turned.size()) < count * r.cols) turned.resize(count * r.cols);
    if (static_cast<int64_t>(sums.size()) < count * rows) sums.resize(count * rows);
    float *in = turned.data(), *out = sums.data();  // of this thread: others have their own
    parallel(count, std::max<int64_t>(1, kShare / std::max<int64_t>(1, r.cols)),
             [&](int64_t a, int64_t b) {
               for (int64_t t = a; t < b; ++t) {
                 turn_inputs(r.x, (first + t) * r.stride, r.cols, r.dtype, inputs, in + t * r.cols);
               }
             });
    multiply(in, count, out);
    parallel(count, std::max<int64_t>(1, kShare / std::max<int64_t>(1, rows)),
             [&](int64_t a, int64_t b) {
               for (int64_t t = a; t < b; ++t) {
                 turn_outputs(out + t * rows, rows, outputs, r.bias);
                 write_floats(out + t * rows, rows, r.out, (first + t) * rows, r.dtype);
               }
             });
  }
}

}  // namespace rotation
