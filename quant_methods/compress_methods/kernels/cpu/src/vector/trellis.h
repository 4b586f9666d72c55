// How a window of a trellis becomes a value, see `formats/trellis.py`:
//
//   hash = kTrellisFactor * window + kTrellisAddend, the low 16 bits of it
//   value = kTrellisLower * (the two lower hexadecimal digits' sum) + kTrellisUpper * (the upper's)
//
// which is at most 2 * kTrellisMiddle. A tile is 16 rows of 16 columns. Lane 2r + h of it has the
// bits of 8 weights of row r: columns 0, 1, 4, 5, ... of h = 0, the others of h = 1. Stored as
// planes: the first 16 bits of every lane, then what is left of them. A window reaches into the
// lane that follows; the last lane's into the first.
#pragma once

#include <cstdint>

constexpr int32_t kTrellisMiddle = 75, kTrellisMostWindow = 16;
constexpr uint16_t kTrellisFactor = 25173, kTrellisAddend = 13849;
constexpr int kTrellisLower = 2, kTrellisUpper = 3;
