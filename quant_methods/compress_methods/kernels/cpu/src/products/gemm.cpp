// out[tokens, rows] = x[tokens, cols] * W[rows, cols]^T for weights of few bits, and row look-up.
//
// One product for every decoder: lines of 128 codes are decoded in registers and multiplied with
// the tokens there are before the next line is read, by blocks of rows on torch's own threads. How
// rows share vectors depends on their width: `blocks/` with AVX-512, `rows/` else.
//
//   value = scale * (code - zero)
//   out   = sum over groups of scale * (sum of code * x  -  zero * sum of x)
//
// With a table, value = scale * table[code], whose entries are the codes of 8 bits, or floats.
// Floats of 4 bits are such codes, of one table; those of 8 are multiplied as floats. In a trellis
// codes are computed of a window of bits.
// A zero between two codes is counted, like the codes, in halves: value = scale/2 * (2 code - odd).

#include "correction.h"
#include "functions.h"
#include "rotation.h"
#include "viterbi.h"

namespace {

Functions functions_of(const Matrix& m) {
  if (m.sparse) return functions_of_sparse(m);
  if (m.window) return functions_of_trellis(m);
  if (m.tables || m.floats) return functions_of_tables(m);
  return functions_of_integers(m);
}

// What is left of a product without columns: the bias, or zeros.
void write_bias(const float* bias, int64_t tokens, int64_t rows, void* out, Dtype dtype) {
  for (int64_t i = 0; i < tokens * rows; ++i) {
    write_float(out, i, dtype, bias ? bias[i % rows] : 0.0f);
  }
}

}  // namespace

extern "C" {

void vc_linear(const Matrix* matrix, const void* x, int32_t x_dtype, int64_t tokens, int64_t cols,
               int64_t x_stride, const float* bias, void* out, int32_t mode) {
  if (!tokens || !matrix->rows) return;
  if (!cols) return write_bias(bias, tokens, matrix->rows, out, static_cast<Dtype>(x_dtype));
  // Activations are not quantized for floats.
  const bool floats = matrix->bits == 16 || (matrix->floats && !matrix->tables);
  const Mode how = floats ? Mode::kExact : static_cast<Mode>(mode);
  multiply({*matrix, x, static_cast<Dtype>(x_dtype), tokens, cols, x_stride, bias, out, how},
           functions_of(*matrix));
}

// The same of a matrix that is rotated: `signs` are those of a block of inputs, then of outputs.
void vc_rotated(const Matrix* matrix, const void* x, int32_t x_dtype, int64_t tokens, int64_t cols,
                int64_t x_stride, const float* bias, void* out, int32_t mode, const float* signs,
                int64_t block) {
  const Request request = {*matrix, x,    static_cast<Dtype>(x_dtype), tokens, cols, x_stride,
                           bias,    out, static_cast<Mode>(mode)};
  rotation::product(request, {signs, block}, {signs + block, block},
                    [&](const float* turned, int64_t count, float* sums) {
                      vc_linear(matrix, turned, static_cast<int32_t>(Dtype::kFloat32), count, cols,
                                cols, nullptr, sums, mode);
                    });
}

// The same plus A (B x); `left` [rank, rows] and `right` [rank, cols] of a dtype.
void vc_corrected(const Matrix* matrix, const void* x, int32_t x_dtype, int64_t tokens,
                  int64_t cols, int64_t x_stride, const float* bias, void* out, int32_t mode,
                  const void* left, const void* right, int32_t dtype, int64_t rank) {
  if (!tokens || !matrix->rows) return;
  const Request request = {*matrix, x,    static_cast<Dtype>(x_dtype), tokens, cols, x_stride,
                           bias,    out, static_cast<Mode>(mode)};
  correction::product(request, {left, right, static_cast<Dtype>(dtype), rank},
                      [&](const float* inputs, float* sums) {
                        vc_linear(matrix, inputs, static_cast<int32_t>(Dtype::kFloat32), tokens,
                                  cols, cols, nullptr, sums, mode);
                      });
}

// out uint8 [count, places]: the bits of sequences [count, places], see `viterbi.h`.
void vc_encode(const float* targets, const float* weights, const float* values, int64_t count,
               int64_t places, int32_t bits, int32_t window, uint8_t* out) {
  const viterbi::Problem p = {targets, weights, values, count, places, bits, window};
  if (bits == 2) return viterbi::encode<2>(p, out);
  if (bits == 3) return viterbi::encode<3>(p, out);
  viterbi::encode<4>(p, out);
}

// out [count, cols] float32: rows `ids` of the matrix.
void vc_embed(const Matrix* matrix, const int64_t* ids, int64_t count, int64_t cols, float* out) {
  const Matrix& m = *matrix;
  if (!count || !cols) return;
  const RowLookUp body = functions_of(m).look_up;
  parallel(count, std::max<int64_t>(1, kWork / 16 / (m.lines * kLine)), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) body(m, ids[i], cols, out + i * cols);
  });
}
}
