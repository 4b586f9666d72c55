// The library's two functions as torch operators, whose namespace names the instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "matrix.h"

extern "C" {
void vc_linear(const Matrix*, const void*, int32_t, int64_t, int64_t, int64_t, const float*, void*,
               int32_t);
void vc_embed(const Matrix*, const int64_t*, int64_t, int64_t, float*);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::kFloat32;
  if (type == ScalarType::BFloat16) return Dtype::kBfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "neither float32, bfloat16 nor float16");
  return Dtype::kFloat16;
}

Matrix matrix_of(int64_t rows, int64_t bits, int64_t group, bool sparse, const Tensor& weights,
                 const Tensor& scales, const std::optional<Tensor>& zeros, int64_t cols) {
  Matrix m;
  m.weights = static_cast<const uint8_t*>(weights.const_data_ptr());
  m.scales = scales.numel() ? scales.const_data_ptr() : nullptr;
  m.zeros = zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr;
  m.rows = rows, m.lines = weights.size(1), m.bytes = weights.size(2);
  m.groups = std::max<int64_t>(1, scales.size(1));
  m.bits = static_cast<int32_t>(bits), m.group = static_cast<int32_t>(group);
  m.sparse = sparse;
  m.scale_dtype = dtype_of(scales);
  STD_TORCH_CHECK(m.lines == (cols + kLine - 1) / kLine, "the input has ", cols,
                  " columns, the matrix ", m.lines, " lines of ", kLine);
  STD_TORCH_CHECK(weights.size(0) == (rows + kRowsTogether - 1) / kRowsTogether, rows, " rows in ",
                  weights.size(0), " blocks of ", kRowsTogether);
  return m;
}

std::vector<int64_t> shape_of(const Tensor& like, int64_t dimensions, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < dimensions; ++d) shape.push_back(like.size(d));
  shape.push_back(last);
  return shape;
}

Tensor linear(Tensor x, std::optional<Tensor> bias, int64_t mode, int64_t rows, int64_t bits,
              int64_t group, bool sparse, Tensor weights, Tensor scales,
              std::optional<Tensor> zeros) {
  const int64_t last = x.dim() - 1, cols = x.size(last);
  const Matrix m = matrix_of(rows, bits, group, sparse, weights, scales, zeros, cols);
  const bool rows_apart = last == 1 && x.stride(1) == 1;
  if (!rows_apart && !x.is_contiguous()) x = torch::stable::contiguous(x);
  static thread_local std::vector<float> floats;
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == m.rows, "a bias of ", bias->numel(), " for ", m.rows, " rows");
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    floats.resize(m.rows);
    read_floats(bias->const_data_ptr(), 0, m.rows, dtype_of(*bias), floats.data());
  }
  Tensor out = torch::stable::new_empty(x, shape_of(x, last, m.rows));
  vc_linear(&m, x.const_data_ptr(), static_cast<int32_t>(dtype_of(x)), cols ? x.numel() / cols : 0,
            cols, rows_apart ? x.stride(0) : cols, bias ? floats.data() : nullptr,
            out.mutable_data_ptr(), static_cast<int32_t>(mode));
  return out;
}

Tensor embed(Tensor ids, int64_t cols, int64_t rows, int64_t bits, int64_t group, bool sparse,
             Tensor weights, Tensor scales, std::optional<Tensor> zeros) {
  const Matrix m = matrix_of(rows, bits, group, sparse, weights, scales, zeros, cols);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids are not int64");
  ids = torch::stable::contiguous(ids);
  Tensor out = torch::stable::new_empty(ids, shape_of(ids, ids.dim(), cols), ScalarType::Float);
  vc_embed(&m, static_cast<const int64_t*>(ids.const_data_ptr()), ids.numel(), cols,
           static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

int64_t rows_together() { return kRowsTogether; }

}  // namespace

#define VC_MATRIX \
  "int rows, int bits, int group, bool sparse, Tensor weights, Tensor scales, Tensor? zeros=None"

STABLE_TORCH_LIBRARY(VC_NAMESPACE, m) {
  m.def("linear(Tensor x, Tensor? bias, int mode, " VC_MATRIX ") -> Tensor");
  m.def("embed(Tensor ids, int cols, " VC_MATRIX ") -> Tensor");
  m.def("rows_together() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(VC_NAMESPACE, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("embed", TORCH_BOX(&embed));
}

STABLE_TORCH_LIBRARY_IMPL(VC_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("rows_together", TORCH_BOX(&rows_together));
}
