// Products of decoded rows with a panel, a group of columns at a time: VNNI or FMA with a broadcast
// dword of a row, and AMX. Each adds scaled sums to floats [tokens / 16, kBlockRows, 16].
#pragma once

#include "panel.h"
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace panel {

// What a product reads and adds to: `lines` lines of a block from its row on, and of a panel from
// its tile on.
struct Place {
  const uint8_t* weights;            // [lines, kBlockRows, bytes of a line]
  const float *scales, *offsets;     // [kBlockRows, stride], from the first line on
  const uint8_t* in;                 // [tiles, lines of the panel, bytes of 16 lines]
  const float *in_scales, *in_sums;  // [tiles, lines of the panel (* parts), 16]
  const int32_t* starts;             // the same
  float* sums;                       // [tiles, kBlockRows, 16]
  int64_t lines, panel_lines, stride;
};

// sums += value * scale, less the share of a zero point.
template <bool zeros>
inline void add(float* to, __m512 value, __m512 scale, const float* offset, __m512 sum) {
  __m512 total = _mm512_fmadd_ps(value, scale, _mm512_load_ps(to));
  if constexpr (zeros) total = _mm512_fnmadd_ps(sum, _mm512_set1_ps(*offset), total);
  _mm512_store_ps(to, total);
}

constexpr int kRowsAtOnce = 16;  // of one tile, half as many of two

// As intrinsics, GCC 12 copies every sum of the loop to another register and back.
inline void add_products(__m512i& sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}
inline void add_products(__m512& sum, __m512 values, __m512 x) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(values), "v"(x));
}

// `parts` groups in a line.
template <bool zeros, int parts, int tiles>
void vnni_rows(const Place& p) {
  constexpr int kSteps = 32 / parts, kRows = kRowsAtOnce / tiles;
  for (int64_t i = 0; i < p.lines * parts; ++i) {
    const int64_t at = i / parts, part = i % parts;
    __m512i dots[kRows][tiles];
    const uint8_t* in[tiles];
    for (int t = 0; t < tiles; ++t) {
      in[t] = p.in + (t * p.panel_lines + at) * kLine * kTile + part * kSteps * 64;
      const __m512i start = _mm512_load_si512(p.starts + (t * p.panel_lines * parts + i) * kTile);
      for (int r = 0; r < kRows; ++r) dots[r][t] = start;
    }
    const uint8_t* w = p.weights + at * kBlockRows * kLine + part * kSteps * 4;
    for (int step = 0; step < kSteps; ++step, w += 4) {
      __m512i x[tiles];
      for (int t = 0; t < tiles; ++t) x[t] = _mm512_load_si512(in[t] + 64 * step);
      for (int r = 0; r < kRows; ++r) {
        int32_t dword;
        std::memcpy(&dword, w + r * kLine, sizeof dword);
        const __m512i codes = _mm512_set1_epi32(dword);
        for (int t = 0; t < tiles; ++t) add_products(dots[r][t], codes, x[t]);
      }
    }
    for (int t = 0; t < tiles; ++t) {
      const __m512 factor = _mm512_load_ps(p.in_scales + (t * p.panel_lines + at) * kTile);
      __m512 sum = factor;
      if (zeros) sum = _mm512_load_ps(p.in_sums + (t * p.panel_lines * parts + i) * kTile);
      for (int r = 0; r < kRows; ++r) {
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[r][t]), factor);
        const int64_t term = r * p.stride + i;
        add<zeros>(p.sums + (t * kBlockRows + r) * kTile, value, _mm512_set1_ps(p.scales[term]),
                   p.offsets + term, sum);
      }
    }
  }
}

template <int parts, int tiles>
void fma_rows(const Place& p) {
  constexpr int kSteps = kLine / parts, kRows = kRowsAtOnce / tiles;
  for (int64_t i = 0; i < p.lines * parts; ++i) {
    const int64_t at = i / parts, part = i % parts;
    __m512 dots[kRows][tiles];
    const float* in[tiles];
    for (int t = 0; t < tiles; ++t) {
      in[t] = reinterpret_cast<const float*>(p.in) +
              ((t * p.panel_lines + at) * kLine + part * kSteps) * kTile;
      for (int r = 0; r < kRows; ++r) dots[r][t] = _mm512_setzero_ps();
    }
    const float* w =
        reinterpret_cast<const float*>(p.weights) + at * kBlockRows * kLine + part * kSteps;
    for (int step = 0; step < kSteps; ++step, ++w) {
      __m512 x[tiles];
      for (int t = 0; t < tiles; ++t) x[t] = _mm512_load_ps(in[t] + kTile * step);
      for (int r = 0; r < kRows; ++r) {
        const __m512 value = _mm512_set1_ps(w[r * kLine]);
        for (int t = 0; t < tiles; ++t) add_products(dots[r][t], value, x[t]);
      }
    }
    for (int t = 0; t < tiles; ++t) {
      for (int r = 0; r < kRows; ++r) {
        const __m512 scale = _mm512_set1_ps(p.scales[r * p.stride + i]);
        add<false>(p.sums + (t * kBlockRows + r) * kTile, dots[r][t], scale, nullptr, dots[r][t]);
      }
    }
  }
}

// The rows that registers hold at a time, one lot after the other.
template <void (*rows)(const Place&), int size, int tiles>
void in_lots(const Place& p) {
  Place lot = p;
  for (int i = 0; i < tiles; ++i) {
    rows(lot);
    const int64_t count = kRowsAtOnce / tiles;
    lot.weights += count * kLine * size;
    lot.scales += count * p.stride, lot.offsets += count * p.stride;
    lot.sums += count * kTile;
  }
}
template <bool zeros, int parts, int tiles>
constexpr auto vnni = in_lots<vnni_rows<zeros, parts, tiles>, 1, tiles>;
template <int parts, int tiles>
constexpr auto fma = in_lots<fma_rows<parts, tiles>, 4, tiles>;

#ifdef __AMX_INT8__

constexpr int kAmxRows = 32;

// Linux lets a process use tiles once it has asked.
inline const bool kAmxAllowed = [] {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}();

// GCC's tile intrinsics don't say that they read memory.
inline void all_stored(const void* p) { asm volatile("" : : "r"(p) : "memory"); }

// Bytes of a row of weights in a tile: 64, less only where a group has fewer.
template <class Kind, int parts>
constexpr int kTileBytes = std::min(64, int{kLine} * Kind::kSize / parts);

// Tiles of this thread until another product configures them: 0 to 3 are sums of 16 rows and 16
// tokens, 4 and 5 rows, 6 and 7 tokens.
template <int tile_bytes>
void configure_amx() {
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = i / 2 == 2 ? tile_bytes : 64;
    config[48 + i] = i / 2 == 3 ? tile_bytes / 4 : 16;
  }
  all_stored(config);
  _tile_loadconfig(config);
}

using Dots = int32_t[kAmxRows][2][kTile];  // [row, token tile, token]

// Adds sums of a group, kept in `dots`, a few rows at a time so that tiles work beside it.
template <class Kind, bool zeros, int tiles>
struct Adder {
  const int32_t (*dots)[2][kTile];
  const float *scales, *offsets;
  int64_t stride;
  __m512 factors[tiles], in_sums[tiles];
  float* sums[tiles];

  Adder(const Place& p, const Dots& from, int64_t i, int parts)
      : dots(from), scales(p.scales + i), offsets(p.offsets + i), stride(p.stride) {
    for (int t = 0; t < tiles; ++t) {
      sums[t] = p.sums + t * kBlockRows * kTile;
      factors[t] = in_sums[t] = _mm512_setzero_ps();
      const int64_t tile = t * p.panel_lines;
      if (Kind::kIsInt8) factors[t] = _mm512_load_ps(p.in_scales + (tile + i / parts) * kTile);
      if (zeros) in_sums[t] = _mm512_load_ps(p.in_sums + (tile * parts + i) * kTile);
    }
  }

  template <int rows>
  void add_rows() {
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const __m512 scale = _mm512_set1_ps(scales[r * stride]);
#pragma GCC unroll 2
      for (int t = 0; t < tiles; ++t) {
        const __m512i found = _mm512_load_si512(dots[r][t]);
        __m512 value = _mm512_castsi512_ps(found);
        if constexpr (Kind::kIsInt8) value = _mm512_mul_ps(_mm512_cvtepi32_ps(found), factors[t]);
        add<zeros>(sums[t] + r * kTile, value, scale, offsets + r * stride, in_sums[t]);
      }
    }
    dots += rows, scales += rows * stride, offsets += rows * stride;
    for (auto& sum : sums) sum += rows * kTile;
  }
};

// Tile registers are part of the instruction's name, so this cannot be a function.
#define VC_MULTIPLY_TILES(to, left, right) \
  if constexpr (Kind::kIsInt8) {           \
    _tile_dpbssd(to, left, right);         \
  } else {                                 \
    _tile_dpbf16ps(to, left, right);       \
  }

// 32 rows times 16 or 32 tokens.
template <class Kind, bool zeros, int parts, int tiles>
void amx(const Place& p) {
  constexpr int kLineBytes = kLine * Kind::kSize, kBytes = kTileBytes<Kind, parts>;
  constexpr int kSteps = kLineBytes / parts / kBytes;
  constexpr int kRows = kAmxRows / (4 * kSteps);  // added between two multiplications
  alignas(64) Dots dots[2];
  const int64_t tile_bytes = p.panel_lines * kLineBytes * kTile;
  for (int64_t i = 0; i < p.lines * parts; ++i) {
    const uint8_t* w =
        p.weights + i / parts * kBlockRows * kLineBytes + i % parts * kSteps * kBytes;
    const uint8_t* in = p.in + i * kSteps * kBytes * kTile;
    const bool adds = i > 0;
    Adder<Kind, zeros, tiles> before(p, dots[(i + 1) % 2], adds ? i - 1 : 0, parts);
    all_stored(dots);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      _tile_loadd(6, in + kBytes * kTile * step, 64);
      _tile_loadd(4, w + kBytes * step, kLineBytes);
      VC_MULTIPLY_TILES(0, 4, 6)
      if (adds) before.template add_rows<kRows>();
      _tile_loadd(5, w + kBytes * step + 16 * kLineBytes, kLineBytes);
      VC_MULTIPLY_TILES(2, 5, 6)
      if (adds) before.template add_rows<kRows>();
      if constexpr (tiles == 2) {
        _tile_loadd(7, in + kBytes * kTile * step + tile_bytes, 64);
        VC_MULTIPLY_TILES(1, 4, 7)
      }
      if (adds) before.template add_rows<kRows>();
      if constexpr (tiles == 2) {
        VC_MULTIPLY_TILES(3, 5, 7)
      }
      if (adds) before.template add_rows<kRows>();
    }
    auto& to = dots[i % 2];
    _tile_stored(0, to[0][0], sizeof to[0]);
    _tile_stored(2, to[16][0], sizeof to[0]);
    if constexpr (tiles == 2) {
      _tile_stored(1, to[0][1], sizeof to[0]);
      _tile_stored(3, to[16][1], sizeof to[0]);
    }
  }
  const int64_t last = p.lines * parts - 1;
  Adder<Kind, zeros, tiles>(p, dots[last % 2], last, parts).template add_rows<kAmxRows>();
}

#endif

}  // namespace panel
