// Codes that are evenly spaced.

#include "functions.h"

Functions functions_of_integers(const Matrix& m) {
  if (m.mid && m.bits == 2) return functions<Mid<2>>(m);
  if (m.mid) return m.bits == 3 ? functions<Mid<3>>(m) : functions<Mid<4>>(m);
  if (m.bits == 2) return functions<Decoder<2>>(m);
  if (m.bits == 3) return functions<Decoder<3>>(m);
  if (m.bits == 4) return functions<Decoder<4>>(m);
  if (m.bits == 5) return functions<Decoder<5>>(m);
  if (m.bits == 6) return functions<Decoder<6>>(m);
  return functions<Decoder<8>>(m);
}
