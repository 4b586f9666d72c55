// Runs every decoder, group size, zero-point kind, dtype and mode on buffers of exact size, for the
// sanitizers to watch. Prints how many products and look-ups it made.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                           void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t middle = begin + (end - begin) / 2;
  if (middle > begin) body(begin, middle, context);
  if (end > middle) body(middle, end, context);
  return 0;
}
void vc_linear(const uint8_t*, const void*, const uint8_t*, int64_t, int64_t, int64_t, int32_t,
               int32_t, int32_t, const void*, int32_t, int64_t, int64_t, int64_t, const float*,
               void*, int32_t);
void vc_embed(const uint8_t*, const void*, const uint8_t*, int64_t, int64_t, int64_t, int32_t,
              int32_t, int32_t, const int64_t*, int64_t, int64_t, float*);
}

template <class T>
std::vector<T> filled(int64_t size, int seed) {
  std::vector<T> out(size);
  uint32_t state = seed + 1;
  for (auto& value : out) value = static_cast<T>((state = state * 1664525u + 1013904223u) >> 24);
  return out;
}

int main() {
  constexpr int64_t rows = 19, cols = 352, lines = 3;
  int products = 0, look_ups = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const int group : {0, 32, 64, 128}) {
      const int64_t groups = group == 0 ? 1 : lines * 128 / group;
      const auto weights = filled<uint8_t>(rows * lines * 16 * bits, bits);
      const auto scales = filled<float>(rows * groups, 2);
      const auto zeros = filled<uint8_t>(rows * groups, 3);
      const auto bias = filled<float>(rows, 4);
      for (const uint8_t* zero : {zeros.data(), static_cast<const uint8_t*>(nullptr)}) {
        for (const int64_t tokens : {1, 7}) {
          for (const int dtype : {0, 2}) {
            for (const int mode : {0, 1, 2}) {
              // Bytes 0 to 255 as fp32 values, or as pairs of bytes of an fp16 value below infinity.
              auto x = filled<float>(dtype == 0 ? tokens * cols : tokens * cols / 2, 5);
              if (dtype == 2) {
                auto* p = reinterpret_cast<uint8_t*>(x.data());
                for (int64_t i = 0; i < 2 * tokens * cols; ++i) p[i] = (i * 37) % 100;
              }
              std::vector<uint8_t> out(tokens * rows * (dtype == 0 ? 4 : 2));
              vc_linear(weights.data(), scales.data(), zero, rows, lines, groups, bits, group, 0,
                        x.data(), dtype, tokens, cols, cols, bias.data(), out.data(), mode);
              ++products;
            }
          }
        }
        const std::vector<int64_t> ids = {0, 18, 7};
        std::vector<float> out(ids.size() * cols);
        vc_embed(weights.data(), scales.data(), zero, rows, lines, groups, bits, group, 0,
                 ids.data(), ids.size(), cols, out.data());
        ++look_ups;
      }
    }
  }
  std::printf("products %d look-ups %d\n", products, look_ups);
}
