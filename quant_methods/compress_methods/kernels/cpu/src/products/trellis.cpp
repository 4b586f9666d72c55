// Codes that are computed of a window of bits.

#include "functions.h"

Functions functions_of_trellis(const Matrix& m) {
  if (m.bits == 2) return functions<Trellis<2>>(m);
  return m.bits == 3 ? functions<Trellis<3>>(m) : functions<Trellis<4>>(m);
}
