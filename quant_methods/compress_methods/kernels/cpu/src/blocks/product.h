// Block by block, where vectors are AVX-512's: batches of tokens, and the threads' share of blocks.
#pragma once

#include <array>
#include <initializer_list>
#include <type_traits>

#include "blocks/amx.h"
#include "blocks/laid_out.h"
#include "call.h"

namespace block {

// Whether AMX multiplies. With few tokens it is slower, measured on 11008 x 4096.
inline bool amx_takes(bool exact, Dtype dtype, int64_t tokens) {
#ifdef __AMX_INT8__
  constexpr int64_t kFewest = 13, kFewestExact = 7;
  if (!kAmxAllowed) return false;
  return exact ? dtype == Dtype::kBfloat16 && tokens >= kFewestExact : tokens >= kFewest;
#else
  return (void)exact, (void)dtype, (void)tokens, false;
#endif
}

// Whether pairs of bfloat16 are multiplied at once. With few tokens, to make them costs more than
// they save, measured on 11008 x 4096.
inline bool pairs_taken(bool exact, Dtype dtype, int64_t tokens) {
#ifdef __AVX512BF16__
  constexpr int64_t kFewest = 2;
  return exact && dtype == Dtype::kBfloat16 && tokens >= kFewest;
#else
  return (void)exact, (void)dtype, (void)tokens, false;
#endif
}

constexpr int64_t kMostAtOnce = 2 * kTileTokens;  // tokens of a tile

// What a thread keeps from one call to the next.
struct Scratch {
  Buffer<float> scales;     // [steps of a chunk, blocks, 16]
  Buffer<int32_t> zeros;    // the same
  Buffer<float> sums;       // [tokens, blocks, 16]
  Buffer<uint8_t> decoded;  // [blocks, lines of a chunk, bytes]
};

// Tokens whose activations are held at a time, to be multiplied with any range of blocks.
struct Batch {
  const Matrix& m;
  const Inputs& in;
  const Multiply* streamed;  // by the number of tokens less one
  Decode decode;
  bool tiles;  // AMX
  const float* bias;
  void* out;
  int64_t first;  // token
  Dtype dtype;

  // Blocks `from` to `last`, one at a time, straight from memory.
  void stream(int64_t from, int64_t last) const {
    Scratch& scratch = scratch_of(1);
    for (int64_t at = from; at < last; ++at) {
      clear_sums(scratch, 1);
      for (int64_t chunk = 0; chunk < in.chunks(); ++chunk) {
        Place place = place_of(scratch, chunk, {at});
        place.weights = place.ahead = line_of(at, chunk), place.key = m.key_of(at * kBlock);
        place.bytes = m.bytes, place.ahead_step = m.bytes / kParts;
        streamed[in.tokens - 1](place);
      }
      write(scratch, 1, at);
    }
  }

  // The same, decoded two at a time, a chunk after the other.
  void decode_first(int64_t from, int64_t last) const {
    Scratch& scratch = scratch_of(2);
    constexpr int64_t kDecoded = kBlock * kChunk;
    uint8_t* decoded = scratch.decoded.of(2 * kDecoded);
    start_tiles();
    for (int64_t at = from; at < last; at += 2) {
      const int64_t blocks[] = {at, std::min(at + 1, last - 1)};
      clear_sums(scratch, 2);
      for (int64_t chunk = 0; chunk < in.chunks(); ++chunk) {
        Place place = place_of(scratch, chunk, {blocks[0], blocks[1]});
        const int64_t line = chunk * in.chunk() / kLine;
        for (int b = 0; b < 2; ++b) {
          decode(m, blocks[b], line, place.parts / kParts, decoded + b * kDecoded);
        }
        place.weights = decoded, place.next = kDecoded, place.bytes = kBlock * kLine * in.size;
        multiply_all(place, {line_of(blocks[0], chunk + 1), line_of(blocks[1], chunk + 1)});
      }
      write(scratch, 2, at);
    }
    end_tiles();
  }

 private:
  static Scratch& scratch_of(int blocks) {
    static thread_local Scratch scratch[2];
    return scratch[blocks - 1];
  }

  void start_tiles() const {
#ifdef __AMX_INT8__
    if (tiles) configure_amx(tile_bytes(in.step, in.size));
#endif
  }
  void end_tiles() const {
#ifdef __AMX_INT8__
    if (tiles) _tile_release();
#endif
  }

  void clear_sums(Scratch& s, int64_t count) const {
    const int64_t sums = in.padded * count * kBlock;
    std::memset(s.sums.of(sums), 0, sums * sizeof(float));
  }

  // Where a chunk of a block begins; after the last, the block that follows.
  const uint8_t* line_of(int64_t block, int64_t chunk) const {
    const int64_t line = std::min(chunk * in.chunk() / kLine, m.lines);
    return m.weights + (block * m.lines + line) * m.bytes;
  }

  // A chunk of some blocks for all tokens; weights are left to the caller. Scales are laid out one
  // chunk at a time, to be in the first-level cache when they are used.
  Place place_of(Scratch& s, int64_t chunk, std::initializer_list<int64_t> blocks) const {
    const int64_t count = static_cast<int64_t>(blocks.size()), steps = in.chunk() / in.step;
    const int64_t first = steps * chunk, held = std::min(steps, in.steps() - first);
    const int64_t at = first * in.padded;
    const int64_t columns = std::min(in.chunk(), in.lines * kLine - chunk * in.chunk());
    Place p = {};
    float* scales = s.scales.of(steps * count * kBlock);
    int32_t* zeros = s.zeros.of(steps * count * kBlock);
    p.scales = scales, p.zeros = zeros, p.zero_step = m.zeros ? count * kBlock : 0;
    for (const int64_t block : blocks) {
      lay_out_scales(m, block, in, first, held, count, scales);
      lay_out_zeros(m, block, in, first, held, count, zeros);
      scales += kBlock, zeros += kBlock;
    }
    p.in = in.data.data() + chunk * in.padded * kStride;
    p.in_scales = in.scales.data() + at, p.in_sums = in.sums.data() + at;
    p.padded = in.padded;
    p.sums = s.sums.data();
    p.parts = columns / kColumns, p.step = in.step / kColumns;
    return p;
  }

  // All tokens, in tiles of about the same size. What of the two blocks is decoded `then` is
  // fetched meanwhile, a share with every tile.
  void multiply_all(Place place, std::array<const uint8_t*, 2> then) const {
    const int64_t most = tiles ? kMostAtOnce : kMostStreamed;
    const int64_t count = (in.tokens + most - 1) / most, parts = place.parts * count;
    place.ahead = then[0], place.gap = then[1] - then[0];
    place.ahead_step = (place.parts * m.bytes / kParts + parts - 1) / parts;
    for (int64_t i = 0, token = 0; i < count; ++i) {
      const int64_t left = in.tokens - token, tokens = tiles ? most : left / (count - i);
      multiply_tile(place, std::min(tokens, left));
      place.in += tokens * kStride, place.sums += tokens * 2 * kBlock;
      place.in_scales += tokens, place.in_sums += tokens;
      place.ahead += place.ahead_step * place.parts;
      token += tokens;
    }
  }

  void multiply_tile(const Place& place, int64_t tokens) const {
    const bool codes = in.size == 1;
#ifdef __AMX_INT8__
    if (tiles && tokens > kTileTokens) return codes ? amx<Vnni, 2>(place) : amx<Fma, 2>(place);
    if (tiles) return codes ? amx<Vnni, 1>(place) : amx<Fma, 1>(place);
#endif
#ifdef __AVX512BF16__
    if (in.size == 2) return kProducts<Pairs, Bf16, 2>[tokens - 1](place);
#endif
    const auto& products = codes ? kProducts<Decoder<8>, Vnni, 2> : kProducts<Floats, Fma, 2>;
    products[tokens - 1](place);
  }

  void write(const Scratch& s, int64_t count, int64_t block) const {
    const float* sums = s.sums.data();
    for (int64_t t = 0; t < in.tokens; ++t) {
      for (int64_t b = 0; b < count; ++b, sums += kBlock) {
        const int64_t row = (block + b) * kBlock;
        const __mmask16 mask = block::first(m.rows - row);
        __m512 value = _mm512_load_ps(sums);
        if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias + row));
        write_16(out, (first + t) * m.rows + row, mask, value, dtype);
      }
    }
  }
};

}  // namespace block

struct Functions {
  // Of as many tokens as the index and one, straight from memory.
  const block::Multiply *codes = nullptr, *floats = nullptr, *pairs = nullptr;
  block::Decode int8 = nullptr, bfloat16 = nullptr, float32 = nullptr;
  RowLookUp look_up = nullptr;
};

template <class Code, int... i>
void store_columns(const typename Code::Line& part, float (*values)[block::kBlock],
                   std::integer_sequence<int, i...>) {
  (_mm512_store_ps(values[i], block::Fma::factor<Code, i>(part)), ...);
}

template <class Code>
void look_up(const Matrix& m, int64_t row, int64_t cols, float* out) {
  constexpr int kBlock = block::kBlock, kColumns = block::kColumns;
  const int64_t block = row / kBlock, lane = row % kBlock;
  const int64_t step = m.group == 0 ? m.lines * kLine : m.group;
  const uint8_t* from = m.weights + block * m.lines * m.bytes;
  block::Cursor<Code> cursor(from, m.bytes, m.key_of(block * kBlock));
  float scale = 1, zero = 0;
  for (int64_t column = 0; column < cols; column += kColumns) {
    if (column % step == 0 && m.scales) {
      const int64_t at = (block * m.groups + column / step) * kBlock + lane;
      const int64_t shared = row / m.scale_rows * m.groups + column / step;
      read_floats(m.scales, m.scale_rows > 1 ? shared : at, 1, m.scale_dtype, &scale);
      scale *= m.factor_of(row);
      if (!m.sparse) zero = static_cast<float>(m.zeros ? m.zeros[at] : m.middle());
    }
    typename Code::Line part;
    cursor.next(part);
    alignas(64) float values[kColumns][kBlock];
    store_columns<Code>(part, values, std::make_integer_sequence<int, kColumns>());
    const int64_t count = std::min<int64_t>(kColumns, cols - column);
    for (int64_t i = 0; i < count; ++i) out[column + i] = scale * (values[i][lane] - zero);
  }
}

template <class Code>
Functions functions(const Matrix&) {
  Functions f;
  f.floats = block::kProducts<Code, block::Fma, 1, block::kMostFloats>.data();
  f.float32 = block::decode<Code, 4>, f.bfloat16 = block::decode<Code, 2>;
  f.look_up = look_up<Code>;
#ifdef __AVX512BF16__
  f.pairs = block::kProducts<Code, block::Bf16, 1>.data();
#endif
  if constexpr (std::is_same_v<typename Code::Line, Codes>) {
    f.codes = block::kProducts<Code, block::Vnni, 1>.data();
    f.int8 = block::decode<Code, 1>;
  } else if (std::is_same_v<Code, SparseFloats<false>> || std::is_same_v<Code, FloatTable>) {
    f.bfloat16 = nullptr;  // float16 does not fit, nor do float32
  }
  return f;
}

inline void multiply(const Request& r, const Functions& run) {
  using namespace block;
  const Matrix& m = r.m;
  const bool exact = r.how == Mode::kExact;
  const bool tiles = amx_takes(exact, r.dtype, r.tokens) && (!exact || run.bfloat16);
  const bool pairs = pairs_taken(exact, r.dtype, r.tokens) && run.bfloat16;
  const int64_t size = !exact ? 1 : tiles || pairs ? 2 : 4;
  const bool streams = !tiles && r.tokens <= (size == 4 ? kMostFloats : kMostStreamed);
  const Multiply* streamed = !exact ? run.codes : pairs ? run.pairs : run.floats;
  const Decode decode = size == 1 ? run.int8 : size == 2 ? run.bfloat16 : run.float32;
  static thread_local Inputs scratch;
  Inputs& in = scratch;
  Batch batch = {m, in, streamed, decode, tiles, r.bias, r.out, 0, r.dtype};
  const int64_t fitting = kMostBytes / (m.lines * kLine * size);
  const int64_t most = std::clamp<int64_t>(fitting / kMostAtOnce * kMostAtOnce, kMostAtOnce, 512);
  for (; batch.first < r.tokens; batch.first += most) {
    const int64_t count = std::min(most, r.tokens - batch.first);
    in.resize(count, m.lines, columns_of_step(m, r.how, size), size);
    if (tiles) in.clear_padding();
    parallel(
        count, std::max<int64_t>(1, kWork / 16 / (m.lines * kLine)), [&](int64_t a, int64_t b) {
          for (int64_t t = a; t < b; ++t) {
            const Row row{r.x, (batch.first + t) * r.stride, r.cols, r.dtype};
            exact ? fill_exact(in, t, row) : fill_int8(in, t, row, r.how == Mode::kInt8PerToken);
          }
        });
    const int64_t pairs = (m.rows + 2 * kBlock - 1) / (2 * kBlock);
    const int64_t work = 2 * kBlock * m.lines * kLine * count;
    parallel(pairs, std::max<int64_t>(1, kWork / work), [&](int64_t a, int64_t b) {
      const int64_t last = std::min(2 * b, (m.rows + kBlock - 1) / kBlock);
      streams ? batch.stream(2 * a, last) : batch.decode_first(2 * a, last);
    });
  }
}
