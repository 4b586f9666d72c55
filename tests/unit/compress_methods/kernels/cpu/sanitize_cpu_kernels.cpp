// Runs every decoder, group size, zero-point kind, dtype and mode on buffers of exact size: for the
// sanitizers to watch, or to keep what comes out in the file that it is given, as floats, each
// result after their number. Prints how many products and look-ups it made, and how often it looked
// for paths.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "matrix.h"

extern "C" {
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                           void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  if (middle > begin) body(begin, middle, context);
  if (end > middle) body(middle, end, context);
  return 0;
}
void vc_linear(const Matrix*, const void*, int32_t, int64_t, int64_t, int64_t, const float*, void*,
               int32_t);
void vc_rotated(const Matrix*, const void*, int32_t, int64_t, int64_t, int64_t, const float*, void*,
                int32_t, const float*, int64_t);
void vc_corrected(const Matrix*, const void*, int32_t, int64_t, int64_t, int64_t, const float*,
                  void*, int32_t, const void*, const void*, int32_t, int64_t);
void vc_embed(const Matrix*, const int64_t*, int64_t, int64_t, float*);
void vc_encode(const float*, const float*, const float*, int64_t, int64_t, int32_t, int32_t,
               uint8_t*);
}

template <class T>
std::vector<T> filled(int64_t size, int seed) {
  std::vector<T> out(size);
  uint32_t state = seed + 1;
  for (auto& value : out) value = static_cast<T>((state = state * 1664525u + 1013904223u) >> 24);
  return out;
}

// Scales that leave sums in the range of float16.
std::vector<float> small(int64_t size, int seed) {
  auto out = filled<float>(size, seed);
  for (auto& value : out) value /= 8192;
  return out;
}
// Numbers from 1 to 2 of either sign, as 32 or 16 bits.
std::vector<uint8_t> numbers(int64_t count, int dtype, int seed) {
  const int64_t size = dtype == 0 ? 4 : 2;
  auto out = filled<uint8_t>(count * size, seed);
  for (int64_t i = size; i <= count * size; i += size) {
    const uint8_t random = out[i - 1], sign = random & 0x80;
    if (dtype != 2) out[i - 2] |= 0x80;  // the last bit of the exponent
    out[i - 1] = sign | (dtype == 2 ? 0x3c | (random & 3) : 0x3f);
  }
  return out;
}

constexpr int64_t kRows = 19, kCols = 352, kLines = 3;
constexpr int64_t kBlocks = (kRows + kRowsTogether - 1) / kRowsTogether;
int products = 0, rotated = 0, corrected = 0, look_ups = 0, paths = 0;
std::FILE* kept = nullptr;

void keep(const void* values, int64_t count, Dtype dtype) {
  if (!kept) return;
  std::vector<float> out(count);
  read_floats(values, 0, count, dtype, out.data());
  std::fwrite(&count, sizeof count, 1, kept);
  std::fwrite(out.data(), sizeof(float), count, kept);
}

void use(const Matrix& m) {
  const auto bias = filled<float>(kRows, 4);
  for (const int64_t tokens : {1, 7, 13, 33}) {
    if (kept && tokens > 7) break;  // emulators are slow
    for (const int dtype : {0, 1, 2}) {
      for (const int mode : {0, 1, 2}) {
        if (dtype == 1 && mode != 0) continue;  // bfloat16 has products of its own there alone
        const auto x = numbers(tokens * kCols, dtype, 5);
        std::vector<uint8_t> out(tokens * kRows * (dtype == 0 ? 4 : 2));
        const auto keep_it = [&] { keep(out.data(), tokens * kRows, static_cast<Dtype>(dtype)); };
        vc_linear(&m, x.data(), dtype, tokens, kCols, kCols, bias.data(), out.data(), mode);
        ++products, keep_it();
        if (mode == 2) continue;
        const int64_t block = tokens == 1 ? 32 : tokens == 7 ? 512 : 128;
        const std::vector<float> signs(2 * block, -1.0f);
        vc_rotated(&m, x.data(), dtype, tokens, kCols, kCols, bias.data(), out.data(), mode,
                   signs.data(), block);
        ++rotated, keep_it();
        const int factors = tokens == 1 ? 0 : tokens == 7 ? 1 : 2;
        const int64_t rank = 3 + 5 * factors;
        const auto left = numbers(rank * kRows, factors, 6);
        const auto right = numbers(rank * kCols, factors, 7);
        vc_corrected(&m, x.data(), dtype, tokens, kCols, kCols, bias.data(), out.data(), mode,
                     left.data(), right.data(), factors, rank);
        ++corrected, keep_it();
      }
    }
  }
  const std::vector<int64_t> ids = {0, 18, 7};
  std::vector<float> out(ids.size() * kCols);
  vc_embed(&m, ids.data(), ids.size(), kCols, out.data());
  ++look_ups, keep(out.data(), ids.size() * kCols, Dtype::kFloat32);
}

void use_dense(int bits, int group) {
  const int64_t groups = group == 0 ? 1 : kLines * 128 / group;
  const int64_t bytes = 16 * bits * kRowsTogether;
  const auto weights = filled<uint8_t>(kBlocks * kLines * bytes, bits);
  const auto scales = small(kBlocks * kRowsTogether * groups, 2);
  const auto zeros = filled<uint8_t>(kBlocks * kRowsTogether * groups, 3);
  for (const int mid : {0, 1}) {
    for (const uint8_t* zero : {zeros.data(), static_cast<const uint8_t*>(nullptr)}) {
      if (mid && (zero || bits > 4)) continue;
      use({weights.data(), scales.data(), zero, kRows, kLines, bytes, groups, bits, group, 0, mid,
           Dtype::kFloat32});
    }
  }
}

// Tables of exactly as many rows as there are, or as many as fill the last block.
void use_tables(int bits, int group, int64_t table_rows) {
  const int64_t groups = group == 0 ? 1 : kLines * 128 / group;
  const int64_t bytes = 16 * bits * kRowsTogether;
  const auto weights = filled<uint8_t>(kBlocks * kLines * bytes, bits);
  const auto scales = small(kBlocks * kRowsTogether * groups, 2);
  const int64_t own = kBlocks * kRowsTogether, shared = (kRows + kTableRows - 1) / kTableRows;
  const auto tables = filled<uint8_t>((table_rows == 1 ? own : shared) * kTable, 6);
  use({weights.data(), scales.data(), nullptr, kRows, kLines, bytes, groups, bits, group, 0, 0,
       Dtype::kFloat32, tables.data(), table_rows});
}

// 16 floats, not one more.
void use_values(int group) {
  const int64_t groups = group == 0 ? 1 : kLines * 128 / group;
  const int64_t bytes = 64 * kRowsTogether;
  const auto weights = filled<uint8_t>(kBlocks * kLines * bytes, 4);
  const auto scales = small(kBlocks * kRowsTogether * groups, 2);
  const auto values = filled<float>(kTable, 3);
  Matrix m = {weights.data(), scales.data(), nullptr, kRows, kLines, bytes, groups, 4, group, 0, 0,
              Dtype::kFloat32};
  m.floats = 1, m.values = values.data();
  use(m);
}

// Rows of the last tile that the matrix does not have are stored.
void use_trellis(int bits, int group, int window) {
  const int64_t groups = group == 0 ? 1 : kLines * 128 / group;
  const int64_t bytes = 16 * bits * kRowsTogether;
  const int64_t stored = (kRows + kTileRows - 1) / kTileRows * kTileRows;
  const auto weights = filled<uint8_t>(stored / kRowsTogether * kLines * bytes, bits);
  const auto scales = small(kBlocks * kRowsTogether * groups, 2);
  use({weights.data(), scales.data(), nullptr, kRows, kLines, bytes, groups, bits, group, 0, 0,
       Dtype::kFloat32, nullptr, 1, window});
}

void find_paths() {
  constexpr int64_t kSequences = 3, kPlaces = 40;
  for (const int bits : {2, 3, 4}) {
    for (const int window : {bits, 8}) {
      const auto targets = filled<float>(kSequences * kPlaces, bits);
      const auto weights = filled<float>(kSequences * kPlaces, 2);
      const auto values = filled<float>(int64_t{1} << window, 3);
      std::vector<uint8_t> out(kSequences * kPlaces);
      vc_encode(targets.data(), weights.data(), values.data(), kSequences, kPlaces, bits, window,
                out.data());
      const std::vector<float> found(out.begin(), out.end());
      ++paths, keep(found.data(), found.size(), Dtype::kFloat32);
    }
  }
}

// Scales of one or four bytes, of rows or of 128 together; E4M3 with one more of each row.
void use_floats(int bits, int group, Dtype dtype, int64_t scale_rows) {
  const int64_t groups = group == 0 ? 1 : kLines * 128 / group;
  const int64_t bytes = 16 * bits * kRowsTogether, padded = kBlocks * kRowsTogether;
  const auto weights = filled<uint8_t>(kBlocks * kLines * bytes, bits);
  const int64_t count = (scale_rows == 1 ? padded : 1) * groups;
  auto scales = dtype == Dtype::kFloat32 ? numbers(count, 0, 2) : filled<uint8_t>(count, 2);
  if (dtype == Dtype::kE8m0) {
    for (auto& scale : scales) scale = 124 + scale % 8;  // powers of two around 1
  }
  const auto row_scales = small(padded, 3);
  const float* of_rows = dtype == Dtype::kE4m3 ? row_scales.data() : nullptr;
  use({weights.data(), scales.data(), nullptr, kRows, kLines, bytes, groups, bits, group, 0, 0,
       dtype, bits == 4 ? kTwiceE2m1 : nullptr, kRows, 0, 1, of_rows, scale_rows});
}

// Masks keep the first, the last or scattered ones of each line's places, `kept` of 128.
void use_sparse(int bits, int group, int kept) {
  const int64_t groups = group == 0 ? 1 : (kLines * 128 + group - 1) / group;
  const int64_t values = kept * kRowsTogether, places = 128 * kRowsTogether;
  const int64_t stored = bits == 4 ? (values + 31) / 32 * 16 : values * bits / 8;
  const int64_t bytes = stored + places / 8, lines = kBlocks * kLines;
  auto weights = filled<uint8_t>(lines * bytes, bits);
  for (int64_t line = 0; line < lines; ++line) {
    uint8_t* p = weights.data() + line * bytes;
    for (int64_t i = 0; bits == 16 && i < stored; ++i) p[i] %= 64;  // no infinities
    std::fill(p + stored, p + bytes, static_cast<uint8_t>(0));
    for (int64_t i = 0; i < values; ++i) {
      const int64_t place = line % 3 == 0 ? i : line % 3 == 1 ? places - 1 - i : i * 37 % places;
      p[stored + place / 8] |= 1 << place % 8;
    }
  }
  const auto scales = small(kBlocks * kRowsTogether * groups, 2);
  use({weights.data(), bits == 16 ? nullptr : scales.data(), nullptr, kRows, kLines, bytes, groups,
       bits, group, 1, 0, bits == 16 ? Dtype::kBfloat16 : Dtype::kFloat32});
}

int main(int count, char** arguments) {
  if (count > 1) kept = std::fopen(arguments[1], "wb");
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const int group : {0, 16, 32, 64, 128}) use_dense(bits, group);
  }
  for (const int bits : {2, 3, 4}) {
    for (const int group : {0, 16, 32, 64, 128}) {
      use_tables(bits, group, 1), use_tables(bits, group, kTableRows);
    }
  }
  for (const int bits : {2, 3, 4}) {
    for (const int group : {0, 32, 64, 128}) use_trellis(bits, group, 8), use_trellis(bits, group, 16);
  }
  for (const int group : {0, 16, 32, 64, 128}) use_values(group);
  find_paths();
  for (const int bits : {4, 8}) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kE8m0, Dtype::kE4m3}) {
      use_floats(bits, 16, dtype, 1), use_floats(bits, 0, dtype, 1);
      use_floats(bits, 32, dtype, 1), use_floats(bits, 128, dtype, 128);
    }
  }
  for (const int bits : {4, 8, 16}) {
    for (const int kept : {1, 5, 64, 96, 127, 128}) {
      use_sparse(bits, 0, kept);
      if (bits < 16) use_sparse(bits, 64, kept), use_sparse(bits, 256, kept);
    }
  }
  if (kept) std::fclose(kept);
  std::printf("products %d rotated %d corrected %d look-ups %d paths %d\n", products, rotated, corrected,
              look_ups, paths);
}
