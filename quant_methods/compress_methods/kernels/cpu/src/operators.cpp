// The library's functions as torch operators, whose namespace names the instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "door.h"

extern "C" {
void vc_linear(const Matrix*, const void*, int32_t, int64_t, int64_t, int64_t, const float*, void*,
               int32_t);
void vc_rotated(const Matrix*, const void*, int32_t, int64_t, int64_t, int64_t, const float*, void*,
                int32_t, const float*, int64_t);
void vc_corrected(const Matrix*, const void*, int32_t, int64_t, int64_t, int64_t, const float*,
                  void*, int32_t, const void*, const void*, int32_t, int64_t);
void vc_encode(const float*, const float*, const float*, int64_t, int64_t, int32_t, int32_t,
               uint8_t*);
void vc_embed(const Matrix*, const int64_t*, int64_t, int64_t, float*);
}

namespace {

std::vector<int64_t> shape_of(const Tensor& like, int64_t dimensions, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < dimensions; ++d) shape.push_back(like.size(d));
  shape.push_back(last);
  return shape;
}

// `product` is called with the matrix, then what `vc_linear` takes after it.
template <class F>
Tensor multiplied(Tensor x, std::optional<Tensor> bias, int64_t mode, int64_t rows, int64_t bits,
                  int64_t group, int64_t kind, const Tensor& weights, const Tensor& scales,
                  const std::optional<Tensor>& zeros, const F& product) {
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(last >= 0, "the input is a single number");
  STD_TORCH_CHECK(mode >= 0 && mode <= static_cast<int64_t>(Mode::kInt8PerToken), "mode ", mode);
  const int64_t cols = x.size(last);
  const Dtype dtype = dtype_of(x, "inputs");
  const Matrix m = matrix_of(rows, bits, group, kind, weights, scales, zeros, cols);
  const bool rows_apart = last == 1 && x.stride(1) == 1;
  if (!rows_apart && !x.is_contiguous()) x = torch::stable::contiguous(x);
  static thread_local std::vector<float> floats;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == m.rows, "a bias of ", bias->numel(), " for ", m.rows, " rows");
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    floats.resize(m.rows);
    read_floats(bias->const_data_ptr(), 0, m.rows, dtype_of(*bias, "biases"), floats.data());
  }
  Tensor out = torch::stable::new_empty(x, shape_of(x, last, m.rows));
  int64_t tokens = 1;
  for (int64_t d = 0; d < last; ++d) tokens *= x.size(d);
  product(&m, x.const_data_ptr(), static_cast<int32_t>(dtype), tokens, cols,
          rows_apart ? x.stride(0) : cols, bias ? floats.data() : nullptr, out.mutable_data_ptr(),
          static_cast<int32_t>(mode));
  return out;
}

Tensor linear(Tensor x, std::optional<Tensor> bias, int64_t mode, int64_t rows, int64_t bits,
              int64_t group, int64_t kind, Tensor weights, Tensor scales,
              std::optional<Tensor> zeros) {
  return multiplied(x, bias, mode, rows, bits, group, kind, weights, scales, zeros, vc_linear);
}

// signs [2, block] float32: of inputs and of outputs.
Tensor rotated(Tensor x, std::optional<Tensor> bias, int64_t mode, int64_t rows, int64_t bits,
               int64_t group, int64_t kind, Tensor signs, Tensor weights, Tensor scales,
               std::optional<Tensor> zeros) {
  check_signs(signs);
  const float* values = static_cast<const float*>(signs.const_data_ptr());
  const int64_t block = signs.size(1);
  return multiplied(x, bias, mode, rows, bits, group, kind, weights, scales, zeros,
                    [=](auto... request) { vc_rotated(request..., values, block); });
}

// left [rank, rows] and right [rank, cols], of one dtype.
Tensor corrected(Tensor x, std::optional<Tensor> bias, int64_t mode, int64_t rows, int64_t bits,
                 int64_t group, int64_t kind, Tensor left, Tensor right, Tensor weights,
                 Tensor scales, std::optional<Tensor> zeros) {
  check_factors(left, right, rows, x.dim() ? x.size(x.dim() - 1) : 0);
  const void *a = left.const_data_ptr(), *b = right.const_data_ptr();
  const int32_t dtype = static_cast<int32_t>(dtype_of(left, "factors"));
  const int64_t rank = left.size(0);
  return multiplied(x, bias, mode, rows, bits, group, kind, weights, scales, zeros,
                    [=](auto... request) { vc_corrected(request..., a, b, dtype, rank); });
}

Tensor embed(Tensor ids, int64_t cols, int64_t rows, int64_t bits, int64_t group, int64_t kind,
             Tensor weights, Tensor scales, std::optional<Tensor> zeros) {
  const Matrix m = matrix_of(rows, bits, group, kind, weights, scales, zeros, cols);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids are not int64");
  ids = torch::stable::contiguous(ids);
  const int64_t* which = static_cast<const int64_t*>(ids.const_data_ptr());
  check_ids(which, ids.numel(), rows);
  Tensor out = torch::stable::new_empty(ids, shape_of(ids, ids.dim(), cols), ScalarType::Float);
  vc_embed(&m, which, ids.numel(), cols, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// targets and weights float32 [count, places], values float32 [2^window], what a state stands for.
Tensor encode(Tensor targets, Tensor weights, Tensor values, int64_t bits) {
  for (const Tensor* x : {&targets, &weights}) check_floats(*x, "sequences", 2);
  check_floats(values, "values", 1);
  const int64_t count = targets.size(0), places = targets.size(1);
  STD_TORCH_CHECK(weights.size(0) == count && weights.size(1) == places,
                  "targets and weights are of two shapes");
  STD_TORCH_CHECK(bits >= 2 && bits <= 4, "codes of ", bits, " bits");
  int64_t window = bits;
  while (window < kTrellisMostWindow && (int64_t{1} << window) < values.size(0)) ++window;
  STD_TORCH_CHECK(values.size(0) == int64_t{1} << window && window <= places * bits,
                  values.size(0), " states for ", places, " places of ", bits, " bits");
  Tensor out = torch::stable::new_empty(targets, {count, places}, ScalarType::Byte);
  vc_encode(static_cast<const float*>(targets.const_data_ptr()),
            static_cast<const float*>(weights.const_data_ptr()),
            static_cast<const float*>(values.const_data_ptr()), count, places,
            static_cast<int32_t>(bits), static_cast<int32_t>(window),
            static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

int64_t rows_together() { return kRowsTogether; }

}  // namespace

#define VC_SETTINGS "int rows, int bits, int group, int kind, "
#define VC_TENSORS "Tensor weights, Tensor scales, Tensor? zeros=None"
#define VC_PRODUCT "(Tensor x, Tensor? bias, int mode, " VC_SETTINGS

STABLE_TORCH_LIBRARY(VC_NAMESPACE, m) {
  m.def("linear" VC_PRODUCT VC_TENSORS ") -> Tensor");
  m.def("rotated" VC_PRODUCT "Tensor signs, " VC_TENSORS ") -> Tensor");
  m.def("corrected" VC_PRODUCT "Tensor left, Tensor right, " VC_TENSORS ") -> Tensor");
  m.def("embed(Tensor ids, int cols, " VC_SETTINGS VC_TENSORS ") -> Tensor");
  m.def("encode(Tensor targets, Tensor weights, Tensor values, int bits) -> Tensor");
  m.def("rows_together() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(VC_NAMESPACE, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("rotated", TORCH_BOX(&rotated));
  m.impl("corrected", TORCH_BOX(&corrected));
  m.impl("embed", TORCH_BOX(&embed));
  m.impl("encode", TORCH_BOX(&encode));
}

STABLE_TORCH_LIBRARY_IMPL(VC_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("rows_together", TORCH_BOX(&rows_together));
}
