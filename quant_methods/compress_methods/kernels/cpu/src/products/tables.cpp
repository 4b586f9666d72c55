// Codes that stand for entries of a table, of bytes or floats, or for floats of a byte.

#include "functions.h"

namespace {

// Where a vector holds several rows, tables of their own are another look-up.
template <int bits>
Functions of_tables(const Matrix& m) {
#ifdef VC_BLOCKS
  if (m.table_rows == 1) return functions<LookUp<bits, false>>(m);
#endif
  return functions<LookUp<bits, true>>(m);
}

}  // namespace

Functions functions_of_tables(const Matrix& m) {
  if (m.values) return functions<FloatTable>(m);
  if (!m.tables) return functions<E4m3>(m);
  if (m.bits == 2) return of_tables<2>(m);
  return m.bits == 3 ? of_tables<3>(m) : of_tables<4>(m);
}
