// Products of blocks of 16 rows, a lane for each.
//
// A vector has 4 columns of every row, side by side, so VNNI adds to 16 rows at once what it
// multiplies with a broadcast dword of a token, and no sum is ever taken across lanes.
//
// Few tokens: lines are decoded in registers as they come from memory. Many: a chunk of two blocks
// is decoded once, to codes of 8 bits or floats in the first-level cache, and all tokens pass by.
//
// A step's sum of code * x comes with -zero * (sum of x), both exact in int32, before it becomes a
// float.
#pragma once

#include <array>
#include <utility>

#include "blocks/cursors.h"
#include "blocks/in_place.h"
#include "blocks/inputs.h"

namespace block {

constexpr int kMostStreamed = 12;  // tokens whose sums registers hold
// Of floats: where pairs of bfloat16 are multiplied, these are for the dtypes of few models, and
// more of them take a third of the time to compile.
#ifdef __AVX512BF16__
constexpr int kMostFloats = 4;
#else
constexpr int kMostFloats = kMostStreamed;
#endif

// What a product reads and adds to: a chunk of one or two blocks, and tokens of it.
struct Place {
  const uint8_t* weights;
  Key key;                 // of the first block
  int64_t next, bytes;     // from one block to the next, of a line
  const float* scales;     // [steps, blocks, 16]
  const int32_t* zeros;    // twice 16 bits, or bits of a float: [steps, blocks, 16]
  int64_t zero_step;       // from one step to the next; 0 where zeros are those of all steps
  const uint8_t* in;       // [tokens, kStride]
  const float* in_scales;  // [steps, padded]
  const int32_t* in_sums;  // the same
  int64_t padded;
  float* sums;              // [tokens, blocks, 16]
  int64_t parts, step;      // of lines: in the chunk, in a step
  const uint8_t* ahead;     // what to fetch meanwhile, there and `gap` bytes on
  int64_t gap, ahead_step;  // bytes of each, per part
};
using Multiply = void (*)(const Place&);

// As intrinsics, GCC 12 copies every sum of a loop to another register and back.
inline void add_products(__m512i& sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}
inline void add_products(__m512& sum, __m512 values, __m512 x) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(values), "v"(x));
}
// The same, broadcasting a dword.
inline void add_products(__m512i& sum, __m512i codes, const int32_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*x));
}
inline void add_products(__m512& sum, __m512 values, const float* x) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(values), "m"(*x));
}
#ifdef __AVX512BF16__  // pairs of bfloat16, both added
inline void add_products(__m512& sum, __m512i pairs, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(x));
}
inline void add_products(__m512& sum, __m512i pairs, const int32_t* x) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(*x));
}
#endif
inline __m512i added(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
inline __m512 added(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512i broadcast(const int32_t* x) { return _mm512_set1_epi32(*x); }
inline __m512 broadcast(const float* x) { return _mm512_set1_ps(*x); }

// What a step's sums of 16 rows and one token make of those before.
VC_INLINE __m512 with_step(__m512 before, __m512i dots, __m512 scale, __m512i zero,
                           const float* in_scale, const int32_t* in_sum) {
  const __m512i exact = _mm512_dpwssd_epi32(dots, zero, _mm512_set1_epi32(*in_sum));
  const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(*in_scale));
  return _mm512_fmadd_ps(value, scale, before);
}
VC_INLINE __m512 with_step(__m512 before, __m512 dots, __m512 scale, __m512i zero, const float*,
                           const int32_t* in_sum) {
  const __m512 sum = _mm512_castsi512_ps(_mm512_set1_epi32(*in_sum));
  const __m512 value = _mm512_fnmadd_ps(_mm512_castsi512_ps(zero), sum, dots);
  return _mm512_fmadd_ps(value, scale, before);
}

// Sums of 16 rows, for each token and block: in registers where they are few, so that no step waits
// for the memory of the one before.
template <int tokens, int blocks>
struct Sums {
  static constexpr bool kHeld = tokens * blocks <= 8;
  __m512 held[tokens][blocks];
  float* memory;

  VC_INLINE explicit Sums(float* from) : memory(from) {
    if constexpr (kHeld) each([&](int t, int b) { held[t][b] = _mm512_load_ps(at(t, b)); });
  }
  VC_INLINE void finish() {
    if constexpr (kHeld) each([&](int t, int b) { _mm512_store_ps(at(t, b), held[t][b]); });
  }
  template <class Sum>
  VC_INLINE void add(int t, int b, Sum dots, __m512 scale, __m512i zero, const float* in_scale,
                     const int32_t* in_sum) {
    if constexpr (kHeld) {
      held[t][b] = with_step(held[t][b], dots, scale, zero, in_scale, in_sum);
    } else {
      const __m512 before = _mm512_load_ps(at(t, b));
      _mm512_store_ps(at(t, b), with_step(before, dots, scale, zero, in_scale, in_sum));
    }
  }

 private:
  VC_INLINE float* at(int t, int b) const { return memory + (t * blocks + b) * kBlock; }
  template <class F>
  static VC_INLINE void each(const F& f) {
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b) f(t, b);
    }
  }
};

// What multiplies: vectors of a decoded line with columns of a token.
struct Vnni {
  using Sum = __m512i;
  using Factor = __m512i;
  using In = int32_t;
  static constexpr int kSize = 1, kFactors = 2;

  template <class Code, int i>
  static VC_INLINE __m512i factor(const Codes& line) {
    return line.v[i].v;
  }
};
template <class Code>
constexpr bool is_sparse = false;
template <int bits>
constexpr bool is_sparse<Sparse<bits>> = true;

struct Fma {
  using Sum = __m512;
  using Factor = __m512;
  using In = float;
  static constexpr int kSize = 4, kFactors = kColumns;

  template <class Code, int i>
  static VC_INLINE __m512 factor(const Codes& line) {
    __m512i codes = line.v[i / 4].v;
    if constexpr (i % 4) codes = _mm512_srli_epi32(codes, 8 * (i % 4));
    if constexpr (i % 4 < 3) codes = _mm512_and_si512(codes, _mm512_set1_epi32(255));
    if constexpr (is_sparse<Code>) {
      codes = _mm512_sub_epi32(codes, _mm512_set1_epi32(Code::kMiddle));
    }
    return _mm512_cvtepi32_ps(codes);
  }
  template <class Code, int i>
  static VC_INLINE __m512 factor(const Values& line) {
    return line.v[i].v;
  }
};

// Pairs of columns, as `decode` stores them.
struct Pairs {
  struct Line {
    __m512i v[kColumns / 2];
  };
  static VC_INLINE void decode(const uint8_t* p, int64_t, Line& line) {
#pragma GCC unroll 4
    for (auto& pairs : line.v) pairs = _mm512_load_si512(p), p += 64;
  }
};

// Codes below 32, less `middle`, as bfloat16.
template <int middle>
struct Words {
  uint16_t of[32] = {};

  constexpr Words() {
    for (int code = 0; code < 32; ++code) {
      const int value = code - middle, size = value < 0 ? -value : value;
      int exponent = 0;
      while (size >> (exponent + 1)) ++exponent;
      const int bits = (127 + exponent) << 7 | ((size << (7 - exponent)) & 127);
      of[code] = static_cast<uint16_t>(size == 0 ? 0 : value < 0 ? bits | 0x8000 : bits);
    }
  }
};
template <int middle>
alignas(64) inline constexpr Words<middle> kWords;

// Whether codes are below 32, and what their middle is if lines have lost it.
template <class Code>
constexpr bool has_words = false;
template <int bits>
constexpr bool has_words<Decoder<bits>> = bits <= 5;
template <int bits>
constexpr bool has_words<Mid<bits>> = true;
template <>
constexpr bool has_words<Sparse<4>> = true;
template <class Code>
constexpr int lost_middle = 0;
template <int bits>
constexpr int lost_middle<Sparse<bits>> = Sparse<bits>::kMiddle;

// Floats that are bfloat16: two columns of each row, side by side.
VC_INLINE __m512i paired(__m512 even, __m512 odd) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
  return _mm512_or_si512(low, _mm512_castps_si512(odd));
}

struct Bf16 {
  using Sum = __m512;
  using Factor = __m512i;
  using In = int32_t;
  static constexpr int kSize = 2, kFactors = kColumns / 2;

  template <class Code, int i>
  static VC_INLINE __m512i factor(const typename Code::Line& line) {
    if constexpr (std::is_same_v<Code, Pairs>) {
      return line.v[i];
    } else if constexpr (has_words<Code>) {
      const __m512i bytes = _mm512_shuffle_epi8(line.v[i / 2].v, two_of_four(i % 2 * 2));
      return _mm512_permutexvar_epi16(bytes, _mm512_load_si512(kWords<lost_middle<Code>>.of));
    } else {
      return paired(Fma::factor<Code, 2 * i>(line), Fma::factor<Code, 2 * i + 1>(line));
    }
  }

 private:
  // Puts the bytes `at` and `at` + 1 of each dword at the low ends of its words.
  static VC_INLINE __m512i two_of_four(int at) {
    const auto both = [](int byte) { return byte | (byte + 1) << 16; };
    const __m128i lane = _mm_setr_epi32(both(at), both(at + 4), both(at + 8), both(at + 12));
    return _mm512_broadcast_i32x4(lane);
  }
};

// Sums of a step, in registers; with few of them several chains hide latency.
template <class Code, class Kind, int tokens, int blocks>
struct Dots {
  static constexpr int kSums = tokens * blocks;
  static constexpr int kChains = kSums <= 4 ? (Kind::kFactors > 2 ? 4 : 2) : kSums <= 8 ? 2 : 1;
  typename Kind::Sum v[kChains][tokens][blocks];

  VC_INLINE void clear() {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 12
      for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) v[c][t][b] = typename Kind::Sum{};
      }
    }
  }

  template <int i>
  VC_INLINE void multiply(const typename Code::Line* lines, const uint8_t* in) {
    typename Kind::Factor factors[blocks];
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) factors[b] = Kind::template factor<Code, i>(lines[b]);
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
      const auto* x = reinterpret_cast<const typename Kind::In*>(in + t * kStride) + i;
      auto& sums = v[i % kChains][t];
      if constexpr (blocks == 1) {
        add_products(sums[0], factors[0], x);
      } else {
        const auto value = broadcast(x);
#pragma GCC unroll 2
        for (int b = 0; b < blocks; ++b) add_products(sums[b], factors[b], value);
      }
    }
  }
  template <int... i>
  VC_INLINE void multiply_all(const typename Code::Line* lines, const uint8_t* in,
                              std::integer_sequence<int, i...>) {
    (multiply<i>(lines, in), ...);
  }

  VC_INLINE typename Kind::Sum of(int t, int b) const {
    if constexpr (is_in_place<Code>) return Code::total(v[0][t][b], v[1][t][b]);
    typename Kind::Sum sum = v[0][t][b];
#pragma GCC unroll 4
    for (int c = 1; c < kChains; ++c) sum = added(sum, v[c][t][b]);
    return sum;
  }
};

template <class Code, class Kind, int tokens, int blocks>
void multiply(const Place& place) {
  const Place p = place;
  Cursor<Code> first(p.weights, p.bytes, p.key), second(p.weights + p.next, p.bytes, p.key);
  const uint8_t *x = p.in, *ahead = p.ahead, *read = p.ahead;
  const float *scales = p.scales, *in_scales = p.in_scales;
  const int32_t *zeros = p.zeros, *in_sums = p.in_sums;
  Sums<tokens, blocks> sums(p.sums);
  for (int64_t part = 0; part < p.parts;) {
    Dots<Code, Kind, tokens, blocks> dots;
    dots.clear();
    for (const int64_t end = std::min(p.parts, part + p.step); part < end; ++part) {
      typename Code::Line lines[blocks];
      for (read += p.ahead_step; ahead < read; ahead += 64) {
        if constexpr (blocks == 1) {
          fetch_ahead(ahead);
        } else {
          vec::prefetch_far(ahead), vec::prefetch_far(ahead + p.gap);
        }
      }
      first.next(lines[0]);
      if constexpr (blocks == 2) second.next(lines[1]);
      dots.multiply_all(lines, x, std::make_integer_sequence<int, Kind::kFactors>());
      x += kColumns * Kind::kSize;
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
      for (int b = 0; b < blocks; ++b) {
        sums.add(t, b, dots.of(t, b), _mm512_load_ps(scales + b * kBlock),
                 _mm512_load_si512(zeros + b * kBlock), in_scales + t, in_sums + t);
      }
    }
    scales += blocks * kBlock, zeros += p.zero_step;
    in_scales += p.padded, in_sums += p.padded;
  }
  sums.finish();
}

// By the number of tokens, from one on.
template <class Code, class Kind, int blocks, int... less>
constexpr auto products_of(std::integer_sequence<int, less...>) {
  if constexpr (std::is_same_v<Kind, Vnni> && blocks == 1) {
    return std::array<Multiply, sizeof...(less)>{
        multiply<typename Streamed<Code, less + 1>::type, Kind, less + 1, blocks>...};
  } else {
    return std::array<Multiply, sizeof...(less)>{multiply<Code, Kind, less + 1, blocks>...};
  }
}
template <class Code, class Kind, int blocks, int most = kMostStreamed>
inline constexpr auto kProducts =
    products_of<Code, Kind, blocks>(std::make_integer_sequence<int, most>());

// `lines` lines of a block from one on, decoded to elements of `size` bytes: codes, bfloat16 (two
// columns of each row, side by side) or floats.
using Decode = void (*)(const Matrix& m, int64_t block, int64_t line, int64_t lines, uint8_t* out);

template <class Code, int i>
VC_INLINE void store_two(const typename Code::Line& line, int size, uint8_t* out) {
  if (size == 4) {
    _mm512_store_ps(out, Fma::factor<Code, i>(line));
    _mm512_store_ps(out + 64, Fma::factor<Code, i + 1>(line));
  } else {
    _mm512_store_si512(out, Bf16::factor<Code, i / 2>(line));
  }
}

template <class Code, int size>
void decode(const Matrix& m, int64_t block, int64_t line, int64_t lines, uint8_t* out) {
  const uint8_t* from = m.weights + (block * m.lines + line) * m.bytes;
  Cursor<Code> cursor(from, m.bytes, m.key_of(block * kBlock));
  for (int64_t i = 0; i < lines * kParts; ++i, out += kBlock * kColumns * size) {
    typename Code::Line decoded;
    cursor.next(decoded);
    if constexpr (size == 1) {
      for (int v = 0; v < 2; ++v) _mm512_store_si512(out + 64 * v, decoded.v[v].v);
    } else {
      store_two<Code, 0>(decoded, size, out), store_two<Code, 2>(decoded, size, out + 32 * size);
      store_two<Code, 4>(decoded, size, out + 64 * size);
      store_two<Code, 6>(decoded, size, out + 96 * size);
    }
  }
}

}  // namespace block
