// What VNNI's dot product of bytes does, in plain C++: each unsigned byte times its signed one, four
// products added to an int32.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

inline __m256i emulated_dot_bytes(__m256i sum, __m256i left, __m256i right) {
  int32_t out[8];
  uint8_t a[32];
  int8_t b[32];
  std::memcpy(out, &sum, sizeof out);
  std::memcpy(a, &left, sizeof a);
  std::memcpy(b, &right, sizeof b);
  for (int i = 0; i < 32; ++i) out[i / 4] += a[i] * b[i];
  std::memcpy(&sum, out, sizeof out);
  return sum;
}
