// How fast the multiplications are that the product is made of, with nothing to load or decode:
// operations (a multiply-add counts as two) of `rounds` rounds on one thread.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "matrix.h"
#ifdef VC_BLOCKS
#include "blocks/product.h"
#endif

extern "C" __attribute__((visibility("default"))) int64_t peak(int64_t rounds) {
#if defined(__AMX_INT8__)
  rounds /= 10;
  block::configure_amx(64);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return rounds * 4 * 2 * 16 * 16 * 64;
#elif defined(VC_BLOCKS)
  constexpr int kChains = 12;  // independent, so that latency hides
  __m512i sums[kChains];
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  const __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(5);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (auto& sum : sums) asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
  for (auto& sum : sums) asm volatile("" : "+v"(sum));
  return rounds * kChains * 2 * 64;
#elif defined(__AVX2__)
  constexpr int kChains = 10;
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
