// What a call must be before the library reads memory for it. Each check is one line to the user;
// all of them together cost tens of nanoseconds.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "matrix.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return Dtype::kFloat32;
  if (type == ScalarType::BFloat16) return Dtype::kBfloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, name, " are neither float32, bfloat16 nor float16");
  return Dtype::kFloat16;
}

// Of scales, which may have 8 bits.
inline Dtype scale_dtype_of(const Tensor& scales) {
  const ScalarType type = scales.scalar_type();
  if (type == ScalarType::Byte) return Dtype::kE8m0;
  return type == ScalarType::Float8_e4m3fn ? Dtype::kE4m3 : dtype_of(scales, "scales");
}

// What `kind` says of a matrix.
enum Kind : int64_t { kWhole, kSparse, kMid, kLookUp, kFloats, kTrellis, kValues };
constexpr int64_t kKindBits = 8;     // above them, of a trellis, the bits of a window
constexpr int64_t kScaleRows = 128;  // that may share scales

inline int64_t divided_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// Bytes, one after another, of as many as the library will read.
inline void check_tensor(const Tensor& tensor, const char* name, int64_t dimensions,
                         bool is_bytes) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, " have ", tensor.dim(), " dimensions, not ",
                  dimensions);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " are not contiguous");
  STD_TORCH_CHECK(!is_bytes || tensor.scalar_type() == ScalarType::Byte, name, " are not uint8");
}

// Whether 128 rows have scales together: they have no rows of a block then.
inline bool takes_shared(Matrix& m, const Tensor& scales) {
  const int64_t count = divided_up(m.rows, kScaleRows);
  const bool shared = scales.dim() == 2 && scales.size(0) == count && scales.size(1) == m.groups;
  const bool taken = m.floats && shared && (kRowsTogether > 1 || count != m.rows);
  if (taken) m.scale_rows = kScaleRows;
  return taken;
}

// Rows of a line side by side, as scales and zeros have them too.
inline void check_terms(const Matrix& m, const Tensor& terms, const char* name) {
  const bool blocks = kRowsTogether > 1;
  STD_TORCH_CHECK(terms.size(0) == (blocks ? divided_up(m.rows, kRowsTogether) : m.rows) &&
                      terms.size(1) == m.groups && (!blocks || terms.size(2) == kRowsTogether),
                  name, " are not those of ", m.rows, " rows and ", m.groups, " groups");
}

inline bool knows_bits(const Matrix& m) {
  const int32_t bits = m.bits;
  if (m.sparse) return bits == 4 || bits == 8 || bits == 16;
  if (m.floats) return bits == 4 || bits == 8;
  if (bits >= 2 && bits <= 4) return true;
  return (bits == 5 || bits == 6 || bits == 8) && !m.mid && !m.tables && !m.window;
}

inline void check_bits(const Matrix& m) {
  const int32_t bits = m.bits;
  STD_TORCH_CHECK(knows_bits(m), "weights of ", bits, " bits",
                  m.sparse ? " in a sparse matrix" : "");
  const int64_t most = kRowsTogether * kLine * bits / 8;
  if (m.sparse) {  // some values, then a bit for each place
    const int64_t values = m.bytes - kRowsTogether * kLine / 8;
    STD_TORCH_CHECK(values > 0 && values <= most, "sparse lines of ", m.bytes, " bytes");
  } else {
    STD_TORCH_CHECK(m.bytes == most, "lines of ", m.bytes, " bytes, not ", most);
  }
}

// As many as rows (with those that fill a block), or as 16 of them.
inline void take_tables(Matrix& m, const std::optional<Tensor>& tables) {
  STD_TORCH_CHECK(tables, "a matrix of kind ", static_cast<int64_t>(kLookUp), " has no tables");
  check_tensor(*tables, "tables", 2, true);
  const int64_t count = tables->size(0), shared = divided_up(m.rows, kTableRows);
  const int64_t own = divided_up(m.rows, kRowsTogether) * kRowsTogether;
  STD_TORCH_CHECK(tables->size(1) == kTable && (count == shared || count == own), count,
                  " tables of ", tables->size(1), " bytes for ", m.rows, " rows");
  m.tables = static_cast<const uint8_t*>(tables->const_data_ptr());
  m.table_rows = count == shared ? kTableRows : 1;
}

// What codes of 4 bits stand for.
inline void take_values(Matrix& m, const std::optional<Tensor>& values) {
  STD_TORCH_CHECK(values, "a matrix of kind ", static_cast<int64_t>(kValues), " has no values");
  check_tensor(*values, "values", 1, false);
  STD_TORCH_CHECK(values->scalar_type() == ScalarType::Float && values->size(0) == kTable &&
                      m.bits == 4,
                  "values are not 16 float32 for codes of 4 bits");
  m.values = static_cast<const float*>(values->const_data_ptr());
}

// Of floats: a table of those of 4 bits, and the scales of rows, with those that fill a block.
inline void take_row_scales(Matrix& m, const std::optional<Tensor>& row_scales) {
  if (m.bits == 4) m.tables = kTwiceE2m1, m.table_rows = std::max<int64_t>(1, m.rows);
  if (!row_scales) return;
  check_tensor(*row_scales, "row scales", 1, false);
  STD_TORCH_CHECK(row_scales->scalar_type() == ScalarType::Float, "row scales are not float32");
  STD_TORCH_CHECK(row_scales->size(0) == divided_up(m.rows, kRowsTogether) * kRowsTogether,
                  row_scales->size(0), " row scales of ", m.rows, " rows");
  m.row_scales = static_cast<const float*>(row_scales->const_data_ptr());
}

inline void check_groups(const Matrix& m) {
  const int64_t group = m.group, columns = m.lines * kLine;
  const bool inside = group == 16 || group == 32 || group == 64;
  STD_TORCH_CHECK(group == 0 || (inside && !(m.sparse && group == 16)) ||
                      (group > 0 && group % kLine == 0),
                  "groups of ", group, " columns");
  const int64_t expected = group ? divided_up(columns, group) : 1;
  STD_TORCH_CHECK(m.groups == expected || !columns, m.groups, " groups of ", group, " in ", columns,
                  " columns");
}

// `zeros` are the tables, or values, of a matrix that has those, the row scales of one of floats.
inline Matrix matrix_of(int64_t rows, int64_t bits, int64_t group, int64_t kind,
                        const Tensor& weights, const Tensor& scales,
                        const std::optional<Tensor>& zeros, int64_t cols) {
  check_tensor(weights, "weights", 3, true);
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "a matrix of ", rows, " x ", cols);
  Matrix m;
  m.weights = static_cast<const uint8_t*>(weights.const_data_ptr());
  m.scales = nullptr, m.zeros = nullptr;
  m.rows = rows, m.lines = weights.size(1), m.bytes = weights.size(2), m.groups = 1;
  m.bits = static_cast<int32_t>(bits), m.group = static_cast<int32_t>(group);
  const int64_t window = kind >> kKindBits;
  kind &= (1 << kKindBits) - 1;
  STD_TORCH_CHECK(kind >= kWhole && kind <= kValues, "a matrix of kind ", kind);
  STD_TORCH_CHECK(kind == kTrellis ? window >= bits && window <= kTrellisMostWindow : window == 0,
                  "windows of ", window, " bits in a matrix of kind ", kind);
  const bool sparse = kind == kSparse;
  m.sparse = sparse, m.mid = kind == kMid, m.floats = kind == kFloats || kind == kValues;
  m.window = static_cast<int32_t>(window);
  const int64_t stored = m.window ? divided_up(rows, kTileRows) * kTileRows : rows;
  m.scale_dtype = m.floats ? scale_dtype_of(scales) : dtype_of(scales, "scales");
  STD_TORCH_CHECK(m.lines == divided_up(cols, kLine), "the input has ", cols,
                  " columns, the matrix ", m.lines, " lines of ", kLine);
  STD_TORCH_CHECK(weights.size(0) == divided_up(stored, kRowsTogether), rows, " rows in ",
                  weights.size(0), " blocks of ", kRowsTogether);
  if (kind == kLookUp) take_tables(m, zeros);
  if (kind == kFloats) take_row_scales(m, zeros);
  if (kind == kValues) take_values(m, zeros);
  check_bits(m);
  if (sparse && bits == 16) {  // values are what they are
    STD_TORCH_CHECK(group == 0 && !zeros && m.scale_dtype != Dtype::kFloat32 && !scales.numel(),
                    "values of 16 bits have neither scales nor zeros");
    return m;
  }
  m.scales = scales.const_data_ptr(), m.groups = scales.dim() > 1 ? scales.size(1) : 0;
  const bool shared = takes_shared(m, scales);
  const int64_t dimensions = kRowsTogether > 1 && !shared ? 3 : 2;
  check_tensor(scales, "scales", dimensions, false);
  check_groups(m);
  if (!shared) check_terms(m, scales, "scales");
  if (!zeros || m.tables || m.floats) return m;
  STD_TORCH_CHECK(kind == kWhole, "a sparse matrix, or one without 0, has no zeros");
  check_tensor(*zeros, "zeros", dimensions, true);
  check_terms(m, *zeros, "zeros");
  m.zeros = static_cast<const uint8_t*>(zeros->const_data_ptr());
  return m;
}

inline void check_floats(const Tensor& tensor, const char* name, int64_t dimensions) {
  check_tensor(tensor, name, dimensions, false);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, " are not float32");
}

inline void check_signs(const Tensor& signs) {
  check_floats(signs, "signs", 2);
  const int64_t block = signs.size(1);
  STD_TORCH_CHECK(signs.size(0) == 2 && block > 0 && (block & (block - 1)) == 0,
                  "signs are not those of inputs and outputs in blocks of a power of two");
}

inline void check_factors(const Tensor& left, const Tensor& right, int64_t rows, int64_t cols) {
  check_tensor(left, "factors", 2, false);
  check_tensor(right, "factors", 2, false);
  STD_TORCH_CHECK(left.scalar_type() == right.scalar_type(), "factors are of two dtypes");
  STD_TORCH_CHECK(left.size(0) == right.size(0) && left.size(1) == rows && right.size(1) == cols,
                  "factors are not those of ", rows, " rows and ", cols, " columns");
}

// One pass, in vectors: an id below zero is a very large one.
inline void check_ids(const int64_t* ids, int64_t count, int64_t rows) {
  uint64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, static_cast<uint64_t>(ids[i]));
  STD_TORCH_CHECK(!count || most < static_cast<uint64_t>(rows), "id ", static_cast<int64_t>(most),
                  " is none of the ", rows, " rows");
}
