// Products of decoded blocks by AMX: 32 rows times up to 32 tokens.
//
// Lines of a block are what AMX takes as its right-hand tile, tokens as they lie its left-hand one:
// int8 times unsigned codes, or bfloat16. While tiles work on a step, sums of the one before are
// scaled and added beside them.
#pragma once

#include "blocks/multiply.h"
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>

namespace block {

constexpr int64_t kTiles = 2;  // of tokens, and of rows

// Linux lets a process use tiles once it has asked.
inline const bool kAmxAllowed = [] {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}();

// GCC's tile intrinsics don't say that they read memory.
inline void all_stored(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Bytes of a token in a tile: 64, less only where a step has fewer.
inline int64_t tile_bytes(int64_t step, int64_t size) { return std::min<int64_t>(64, step * size); }

// Tiles of this thread until it releases them: 0 to 3 are sums of 16 tokens and 16 rows, 4 and 5
// tokens, 6 and 7 rows.
inline void configure_amx(int64_t bytes) {
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = i / 2 == 2 ? static_cast<uint8_t>(bytes) : 64;
    config[48 + i] = i / 2 == 3 ? static_cast<uint8_t>(bytes / 4) : 16;
  }
  all_stored(config);
  _tile_loadconfig(config);
}

using TileDots = int32_t[kTiles * kTileTokens][kTiles][kBlock];  // [token, block, row]

// Adds sums of a step, kept in `dots`, a few tokens at a time so that tiles work beside it.
template <class Kind>
struct Adder {
  const int32_t (*dots)[kTiles][kBlock];
  const float* in_scales;
  const int32_t* in_sums;
  float* sums;
  int64_t left;
  __m512 scales[kTiles];
  __m512i zeros[kTiles];

  VC_INLINE void add_tokens(int64_t count) {
    count = std::min(count, left);
    left -= count;
    for (; count-- > 0; ++dots, ++in_scales, ++in_sums, sums += kTiles * kBlock) {
#pragma GCC unroll 2
      for (int b = 0; b < kTiles; ++b) {
        typename Kind::Sum sum;
        std::memcpy(&sum, (*dots)[b], sizeof sum);
        float* to = sums + b * kBlock;
        const __m512 before = _mm512_load_ps(to);
        _mm512_store_ps(to, with_step(before, sum, scales[b], zeros[b], in_scales, in_sums));
      }
    }
  }
};

// Tile registers are part of the instruction's name, so this cannot be a function.
#define VC_MULTIPLY_TILES(to, left, right) \
  if constexpr (size == 1) {               \
    _tile_dpbsud(to, left, right);         \
  } else {                                 \
    _tile_dpbf16ps(to, left, right);       \
  }

// `Kind` adds sums as it does elsewhere.
template <class Kind, int tiles>
void amx(const Place& p) {
  constexpr int size = Kind::kSize == 1 ? 1 : 2;
  alignas(64) TileDots dots[2];
  const int64_t tokens = tiles * kTileTokens;
  const int64_t bytes = tile_bytes(p.step * kColumns, size);
  const uint8_t *in = p.in, *w = p.weights;
  const uint8_t *ahead = p.ahead, *read = p.ahead;
  const int64_t ahead_step = bytes / (size * kColumns) * p.ahead_step;
  Adder<Kind> before = {};
  int64_t i = 0;
  for (int64_t part = 0; part < p.parts; part += p.step, ++i) {
    const int64_t columns = std::min(p.step, p.parts - part) * kColumns;
    const int64_t count = columns * size / bytes, share = (tokens + 4 * count - 1) / (4 * count);
    all_stored(dots);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < count; ++k, in += bytes, w += bytes * kBlock) {
      for (read += ahead_step; ahead < read; ahead += 64) {
        vec::prefetch_far(ahead), vec::prefetch_far(ahead + p.gap);
      }
      _tile_loadd(4, in, kStride);
      _tile_loadd(6, w, 64);
      VC_MULTIPLY_TILES(0, 4, 6)
      before.add_tokens(share);
      _tile_loadd(7, w + p.next, 64);
      VC_MULTIPLY_TILES(1, 4, 7)
      before.add_tokens(share);
      if constexpr (tiles == 2) {
        _tile_loadd(5, in + kTileTokens * kStride, kStride);
        VC_MULTIPLY_TILES(2, 5, 6)
      }
      before.add_tokens(share);
      if constexpr (tiles == 2) {
        VC_MULTIPLY_TILES(3, 5, 7)
      }
      before.add_tokens(share);
    }
    auto& to = dots[i % 2];
    _tile_stored(0, to[0][0], sizeof to[0]);
    _tile_stored(1, to[0][1], sizeof to[0]);
    if constexpr (tiles == 2) {
      _tile_stored(2, to[kTileTokens][0], sizeof to[0]);
      _tile_stored(3, to[kTileTokens][1], sizeof to[0]);
    }
    const int64_t terms = i * kTiles * kBlock;
    const int32_t* zeros = p.zeros + i * p.zero_step;
    before = {to,
              p.in_scales + i * p.padded,
              p.in_sums + i * p.padded,
              p.sums,
              tokens,
              {_mm512_load_ps(p.scales + terms), _mm512_load_ps(p.scales + terms + kBlock)},
              {_mm512_load_si512(zeros), _mm512_load_si512(zeros + kBlock)}};
  }
  all_stored(dots);
  before.add_tokens(tokens);
}

#undef VC_MULTIPLY_TILES

}  // namespace block

#endif
