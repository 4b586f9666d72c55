// How fast the multiplications are that the product is made of, with nothing to load or decode:
// operations (a multiply-add counts as two) of `rounds` rounds on one thread.
#include <cstdint>

#include "vector.h"

extern "C" int64_t peak(int64_t rounds) {
#if defined(__AVX2__)
  constexpr int kChains = 10;  // independent, so that latency hides
  __m256i sums[kChains];
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  __m256i w = _mm256_set1_epi8(3), x = _mm256_set1_epi8(5);
  for (int64_t i = 0; i < rounds; ++i) {
    for (auto& sum : sums) {
      asm volatile("" : "+x"(sum), "+x"(w), "+x"(x));
#ifdef VC_DOT_BYTES
      sum = VC_DOT_BYTES(sum, w, x);
#else
      sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
#endif
    }
  }
  for (auto& sum : sums) asm volatile("" : "+x"(sum));
  return rounds * kChains * 2 * 32;
#else
  (void)rounds;
  return 0;
#endif
}
