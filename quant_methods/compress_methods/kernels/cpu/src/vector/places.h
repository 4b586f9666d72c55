// Where kept values go, by the bits of a mask.
#pragma once

#include <cstdint>

namespace vec {

// Shuffles that move the first bytes (or pairs of bytes) of a vector to where a bit of a byte is
// set, the others becoming zero; `high` for the upper eight of sixteen bytes.
struct Places {
  uint8_t low[256][8], high[256][8], pairs[256][16];
};
constexpr Places places() {
  Places out = {};
  for (int mask = 0; mask < 256; ++mask) {
    int count = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = mask >> i & 1;
      out.low[mask][i] = set ? count : 0x80;
      out.high[mask][i] = set ? 8 + count : 0x80;
      out.pairs[mask][2 * i] = set ? 2 * count : 0x80;
      out.pairs[mask][2 * i + 1] = set ? 2 * count + 1 : 0x80;
      count += set;
    }
  }
  return out;
}
alignas(64) inline constexpr Places kPlaces = places();

}  // namespace vec
