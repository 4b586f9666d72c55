// The cheapest path through a bit-shift trellis that ends where it began, as `formats/fitting/viterbi.py`
// has it, to the bit: sums are taken in the same order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "call.h"

namespace viterbi {

// Sequences [count, places] in the order that states move in, that is the last place first.
struct Problem {
  const float *targets, *weights;
  const float* values;  // of 2^window states
  int64_t count, places;
  int32_t bits, window;
};

// What a thread keeps from one sequence to the next.
struct Scratch {
  std::vector<float> total, before, least;
  std::vector<uint8_t> came;  // [places, groups]: which of the states that lead to a group
  std::vector<uint32_t> path;
};

// States [places] of one sequence, from place `first` on and around. `seam` >= 0 is what comes
// before it, and what the last place ends in.
template <int bits>
void run(const Problem& p, int64_t sequence, int64_t first, int64_t seam, Scratch& s) {
  constexpr int kWays = 1 << bits;
  const int64_t states = int64_t{1} << p.window, groups = states >> bits;
  const float *targets = p.targets + sequence * p.places, *weights = p.weights + sequence * p.places;
  const float* values = p.values;
  s.total.resize(states), s.before.resize(states), s.least.resize(groups);
  s.came.resize(p.places * groups), s.path.resize(p.places);
  constexpr float kNever = std::numeric_limits<float>::infinity();
  float* total = s.total.data();
  for (int64_t i = 0; i < states; ++i) {
    const float missed = targets[first] - values[i];
    total[i] = seam < 0 || i >> bits == seam ? missed * missed * weights[first] : kNever;
  }
  for (int64_t place = 1; place < p.places; ++place) {
    const int64_t at = (first + place) % p.places;
    const float target = targets[at], weight = weights[at];
    uint8_t* came = s.came.data() + place * groups;
    float *least = s.least.data(), *before = total;
    std::copy(before, before + groups, least);
    std::fill(came, came + groups, uint8_t{0});
    for (int way = 1; way < kWays; ++way) {
      const float* some = before + way * groups;
      for (int64_t g = 0; g < groups; ++g) {
        const bool better = some[g] < least[g];
        least[g] = better ? some[g] : least[g];
        came[g] = better ? static_cast<uint8_t>(way) : came[g];
      }
    }
    total = total == s.total.data() ? s.before.data() : s.total.data();
    for (int64_t g = 0; g < groups; ++g) {
      for (int way = 0; way < kWays; ++way) {
        const float missed = target - values[g * kWays + way];
        total[g * kWays + way] = missed * missed * weight + least[g];
      }
    }
  }
  int64_t state = seam < 0 ? std::min_element(total, total + states) - total : seam;
  for (int64_t way = 1; seam >= 0 && way < kWays; ++way) {
    if (total[way * groups + seam] < total[state]) state = way * groups + seam;
  }
  for (int64_t place = p.places; place-- > 0;) {
    s.path[place] = static_cast<uint32_t>(state);
    const int64_t group = state >> bits;
    if (place) state = s.came[place * groups + group] * groups + group;
  }
}

// The bits of every place, uint8 [count, places].
template <int bits>
void encode(const Problem& p, uint8_t* out) {
  parallel(p.count, 1, [&](int64_t from, int64_t to) {
    static thread_local Scratch scratch;
    for (int64_t i = from; i < to; ++i) {
      const int64_t half = p.places / 2;
      run<bits>(p, i, half, -1, scratch);
      run<bits>(p, i, 0, scratch.path[p.places - half] >> bits, scratch);
      for (int64_t place = 0; place < p.places; ++place) {
        out[i * p.places + place] = static_cast<uint8_t>(scratch.path[place] & ((1 << bits) - 1));
      }
    }
  });
}

}  // namespace viterbi
