// out[tokens, rows] = x[tokens, cols] * W[rows, cols]^T for weights of few bits, and row look-up.
//
// One product for every decoder: lines of 128 codes are decoded in registers and multiplied with
// the tokens there are before the next line is read, by blocks of rows on torch's own threads. How
// rows share vectors depends on their width: `sweep.h` with AVX-512, `rows.h` else.
//
//   value = scale * (code - zero)
//   out   = sum over groups of scale * (sum of code * x  -  zero * sum of x)

#include "vector.h"
#ifdef VC_BLOCKS
#include "sweep.h"
#else
#include "rows.h"
#endif

namespace {

Functions functions_of(const Matrix& m) {
  if (m.sparse && m.bits == 16) {
    return m.scale_dtype == Dtype::kBfloat16 ? functions<SparseFloats<true>>(m)
                                             : functions<SparseFloats<false>>(m);
  }
  if (m.sparse) return m.bits == 4 ? functions<Sparse<4>>(m) : functions<Sparse<8>>(m);
  if (m.bits == 2) return functions<Decoder<2>>(m);
  if (m.bits == 3) return functions<Decoder<3>>(m);
  if (m.bits == 4) return functions<Decoder<4>>(m);
  return functions<Decoder<8>>(m);
}

}  // namespace

extern "C" {

void vc_linear(const Matrix* matrix, const void* x, int32_t x_dtype, int64_t tokens, int64_t cols,
               int64_t x_stride, const float* bias, void* out, int32_t mode) {
  const bool floats = matrix->sparse && matrix->bits == 16;  // activations are not quantized for
  const Mode how = floats ? Mode::kExact : static_cast<Mode>(mode);
  multiply({*matrix, x, static_cast<Dtype>(x_dtype), tokens, cols, x_stride, bias, out, how},
           functions_of(*matrix));
}

// out [count, cols] float32: rows `ids` of the matrix.
void vc_embed(const Matrix* matrix, const int64_t* ids, int64_t count, int64_t cols, float* out) {
  const Matrix& m = *matrix;
  const LookUp body = functions_of(m).look_up;
  parallel(count, std::max<int64_t>(1, kWork / 16 / (m.lines * kLine)), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) body(m, ids[i], cols, out + i * cols);
  });
}
}
