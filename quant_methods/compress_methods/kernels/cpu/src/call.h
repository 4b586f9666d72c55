// What the library is asked for, and torch's own threads to do it.
#pragma once

#include "matrix.h"

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

constexpr int64_t kWork = 1 << 17;  // multiplications worth a thread

template <class F>
void parallel(int64_t end, int64_t grain, const F& f) {
  auto body = [](int64_t from, int64_t to, void* context) {
    (*static_cast<const F*>(context))(from, to);
  };
  torch_parallel_for(0, end, grain, body, const_cast<F*>(&f));
}

// x [tokens, cols] with rows `stride` apart, out [tokens, rows], bias [rows] or null.
struct Request {
  const Matrix& m;
  const void* x;
  Dtype dtype;
  int64_t tokens, cols, stride;
  const float* bias;
  void* out;
  Mode how;
};

using RowLookUp = void (*)(const Matrix&, int64_t row, int64_t cols, float* out);
