// Kept values of n:m, then a mask of their places.

#include "functions.h"

Functions functions_of_sparse(const Matrix& m) {
  if (m.bits == 4) return functions<Sparse<4>>(m);
  if (m.bits == 8) return functions<Sparse<8>>(m);
  if (m.scale_dtype == Dtype::kBfloat16) return functions<SparseFloats<true>>(m);
  return functions<SparseFloats<false>>(m);
}
