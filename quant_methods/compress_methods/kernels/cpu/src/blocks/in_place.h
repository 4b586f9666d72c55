// Codes of 2 bits, multiplied where they lie in their bytes, for few tokens.
//
// A code that is not shifted down counts 4, 16 or 64 times as much, the same in all of a lane's
// dword. So sums are divided, once a step, instead of every code. They are multiples: it is exact.
// Each of the two vectors of a part needs sums of its own.
#pragma once

#include "blocks/cursors.h"

namespace block {

template <bool doubled>
struct InPlace {
  using Line = Codes;
  static VC_INLINE __m512i total(__m512i first, __m512i second) {
    const __m512i low = _mm512_srav_epi32(first, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0,  //
                                                                   2, 2, 2, 2, 2, 2, 2, 2));
    const __m512i high = _mm512_srav_epi32(second, _mm512_setr_epi32(4, 4, 4, 4, 4, 4, 4, 4,  //
                                                                     6, 6, 6, 6, 6, 6, 6, 6));
    const __m512i sum = _mm512_add_epi32(low, high);
    return doubled ? _mm512_add_epi32(sum, sum) : sum;
  }
};
template <class Code>
constexpr bool is_in_place = false;
template <bool doubled>
constexpr bool is_in_place<InPlace<doubled>> = true;

template <bool doubled>
struct Cursor<InPlace<doubled>> {
  static constexpr int kLowest = 0x03030303;
  const uint8_t* p;
  int64_t bytes;
  __m512i first = vec::quarters(kLowest, kLowest, kLowest << 2, kLowest << 2);
  __m512i second = vec::quarters(kLowest << 4, kLowest << 4, ~0x3f3f3f3f, ~0x3f3f3f3f);

  VC_INLINE Cursor(const uint8_t* from, int64_t line_bytes, const Key&)
      : p(from), bytes(line_bytes / kParts) {}
  VC_INLINE void next(Codes& to) {
    const __m512i twice =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    to.v[0] = {_mm512_and_si512(twice, first)}, to.v[1] = {_mm512_and_si512(twice, second)};
    p += bytes;
  }
};

// As what a code is multiplied with so many tokens, straight from memory.
template <class Code, int tokens>
struct Streamed {
  using type = Code;
};
constexpr int kMostInPlace = 2;
template <int tokens>
struct Streamed<Decoder<2>, tokens> {
  using type = std::conditional_t<tokens <= kMostInPlace, InPlace<false>, Decoder<2>>;
};
template <int tokens>
struct Streamed<Mid<2>, tokens> {
  using type = std::conditional_t<tokens <= kMostInPlace, InPlace<true>, Mid<2>>;
};

}  // namespace block
