// W x = Q x + A (B x): what a base of few bits lost, added back by two thin factors.
//
// B x is summed first, by ranks, and stays in the cache; then the base is multiplied as it is alone,
// into float32; then A is added by blocks of rows while these are written. A lies by columns, so
// that a vector holds rows. All three on torch's own threads. For a few tokens: with many, a matrix
// product that holds A in registers is faster.
#pragma once

#include <vector>

#include "call.h"

namespace correction {

constexpr int64_t kRows = 256, kShare = 1 << 14;
constexpr int kRanks = 8;  // added together

struct Factors {
  const void *left, *right;  // [rank, rows], [rank, cols]
  Dtype dtype;
  int64_t rank;
};

struct Bfloat16 {
  uint16_t bits;
  operator float() const { return from_bits(static_cast<uint32_t>(bits) << 16); }
};

template <class A>
float dot(const A* a, const float* b, int64_t count) {
  constexpr int kLanes = 32;
  float part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) part[l] += static_cast<float>(a[i + l]) * b[i + l];
  }
  for (; i < count; ++i) part[i % kLanes] += static_cast<float>(a[i]) * b[i];
  float sum = 0;
  for (const float value : part) sum += value;
  return sum;
}

// to[i] += sum over k of thin[k] * left[k * stride + i]
template <int ranks, class A>
void add_ranks(const A* left, int64_t stride, const float* thin, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = to[i];
    for (int k = 0; k < ranks; ++k) sum += thin[k] * static_cast<float>(left[k * stride + i]);
    to[i] = sum;
  }
}

template <class A>
void add_product(const A* left, int64_t stride, const float* thin, int64_t rank, int64_t count,
                 float* to) {
  int64_t k = 0;
  for (; k + kRanks <= rank; k += kRanks) {
    add_ranks<kRanks>(left + k * stride, stride, thin + k, count, to);
  }
  for (; k < rank; ++k) add_ranks<1>(left + k * stride, stride, thin + k, count, to);
}

// `multiply` reads the inputs as float32 [tokens, cols] and writes Q x [tokens, rows].
template <class A, class F>
void product_of(const Request& r, const Factors& f, const F& multiply) {
  static thread_local std::vector<float> inputs, thin, sums;
  const A *left = static_cast<const A*>(f.left), *right = static_cast<const A*>(f.right);
  const int64_t rows = r.m.rows, tokens = r.tokens;
  inputs.resize(tokens * r.cols), thin.resize(tokens * f.rank), sums.resize(tokens * rows);
  float *x = inputs.data(), *inner = thin.data(), *out = sums.data();  // of this thread
  for (int64_t t = 0; t < tokens; ++t) {
    read_floats(r.x, t * r.stride, r.cols, r.dtype, x + t * r.cols);
  }
  const int64_t grain = std::max<int64_t>(1, kShare / std::max<int64_t>(1, tokens * r.cols));
  parallel(f.rank, grain, [&](int64_t a, int64_t b) {
    for (int64_t k = a; k < b; ++k) {
      for (int64_t t = 0; t < tokens; ++t) {
        inner[t * f.rank + k] = dot(right + k * r.cols, x + t * r.cols, r.cols);
      }
    }
  });
  multiply(x, out);
  const int64_t work = std::max<int64_t>(1, tokens * f.rank * kRows);
  parallel((rows + kRows - 1) / kRows, std::max<int64_t>(1, kShare / work),
           [&](int64_t a, int64_t b) {
             for (int64_t row = a * kRows; row < std::min(b * kRows, rows); row += kRows) {
               const int64_t count = std::min(kRows, rows - row);
               for (int64_t t = 0; t < tokens; ++t) {
                 float* to = out + t * rows + row;
                 add_product(left + row, rows, inner + t * f.rank, f.rank, count, to);
                 for (int64_t i = 0; r.bias && i < count; ++i) to[i] += r.bias[row + i];
                 write_floats(to, count, r.out, t * rows + row, r.dtype);
               }
             }
           });
}

template <class F>
void product(const Request& r, const Factors& f, const F& multiply) {
  if (f.dtype == Dtype::kFloat32) return product_of<float>(r, f, multiply);
  if (f.dtype == Dtype::kBfloat16) return product_of<Bfloat16>(r, f, multiply);
  return product_of<Float16>(r, f, multiply);
}

}  // namespace correction
