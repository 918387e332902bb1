// FFNs whose weights lie in two planes of 4 bits, as ../tiers_reference.py defines them. A group of neurons at a time: the
// scan of gate's and up's high plane makes scores, hidden units, and what the low plane adds to the best; then their
// columns of down are added, high of the kept and low of the best. Sums of runs of groups are added at the end.
// Each number is computed by one thread in one order: a token's result is the same beside any others.
#pragma once

#include "tier_runs.h"

namespace {

struct Tiers {
  const Proxy& high;  // of gate and up
  Plane down, low;    // high of down's columns, as rows; low of gate, up and down
  float threshold, floor;
};

// Neurons of a group, in ascending order.
struct Chosen {
  uint8_t n_kept, n_best, kept[TIER_NEURONS], best[TIER_NEURONS];
};

inline void prefetch_row(const Plane& p, int64_t row) {
  const char* codes = p.codes.data + row * p.codes.stride;
  for (int64_t i = 0; i < p.codes.bytes; i += 64) __builtin_prefetch(codes + i, 0, 3);
  __builtin_prefetch(p.multipliers + row * p.blocks(), 0, 3);
}

// Adds neurons [i, i + n) of the group from neuron `first` on, n <= SCAN, by their sizes, and asks for the low rows of gate
// and up; with_down: for both of down.
inline void choose(const Tiers& t, int64_t first, int64_t i, int64_t n, const float* sizes, bool with_down, Chosen& to) {
  const Proxy& p = t.high;
  float logits[SCAN];
  single_logits(p, first + i, n, sizes, logits);
  for (int64_t j = 0; j < n; j++) {
    const bool best = logits[j] > t.threshold;
    if (!best && !(logits[j] > t.floor)) continue;
    const int64_t neuron = first + i + j;
    to.kept[to.n_kept++] = uint8_t(i + j);
    if (with_down) prefetch_row(t.down, neuron);
    if (!best) continue;
    to.best[to.n_best++] = uint8_t(i + j);
    for (int64_t k = 0; k < p.k + with_down; k++) prefetch_row(t.low, k * p.d_ff + neuron);
  }
}

// Of neurons [first, first + n), n <= TIER_NEURONS, and each token: who is chosen, into chosen[token * stride], and hidden
// units h[token * d_ff + neuron].
inline void tiered_units(const Tiers& t, const TokenCodes<2>& in, int64_t first, int64_t n, int64_t tokens, bool with_down,
                         Chosen* chosen, int64_t stride, float* h) {
  const Proxy& p = t.high;
  float z[TIER_TOKENS][2][TIER_NEURONS];
  for (int64_t token = 0; token < tokens; token++) chosen[token * stride].n_kept = chosen[token * stride].n_best = 0;
  for (int64_t i = 0; i < n; i += SCAN) {
    const int64_t some = std::min(SCAN, n - i);
    proxy_units(p, first + i, some, in, 0, tokens, [&](int64_t token, const float (*units)[SCAN]) {
      float sizes[SCAN] = {};
      proxy_neurons(p, first + i, some, units, sizes);
      for (int64_t k = 0; k < p.k; k++) std::copy(units[k], units[k] + some, z[token][k] + i);
      choose(t, first, i, some, sizes, with_down, chosen[token * stride]);
    });
  }
  for (int64_t token = 0; token < tokens; token++) {
    const Chosen& c = chosen[token * stride];
    for (int64_t k = 0; k < p.k; k++)
      for (int64_t i = 0; i < c.n_best; i += LANES) {
        const int64_t base = k * p.d_ff + first;
        auto at = [&](int64_t j) { return c.best[std::min<int64_t>(i + j, c.n_best - 1)]; };
        int32_t sums[LANES];
        proxy_sums(t.low, [&](int64_t j) { return base + at(j); }, in.row(token), nullptr, sums);
        for (int64_t j = 0; j < std::min<int64_t>(c.n_best - i, LANES); j++)
          z[token][k][at(j)] += float(sums[j]) * t.low.scales[base + at(j)] * in.scale(token);
      }
    float* up = z[token][p.k - 1];
    activate_row(p.act, p.k == 2 ? z[token][0] : nullptr, up, n);
    std::copy(up, up + n, h + token * p.d_ff + first);
  }
}

// What the chosen neurons of the group from `first` on write; h: [d_ff]
inline void collect(const Tiers& t, const Chosen& chosen, int64_t first, const float* h, Columns& to) {
  static_assert(2 * TIER_NEURONS <= MOST_COLUMNS);
  to.count = 0;
  for (int i = 0; i < chosen.n_kept; i++) to.add(t.down, first + chosen.kept[i], h[first + chosen.kept[i]]);
  for (int i = 0; i < chosen.n_best; i++)
    to.add(t.low, t.high.k * t.high.d_ff + first + chosen.best[i], h[first + chosen.best[i]]);
  to.fill();
}

// y: [tokens, d_model] of E, dense, as x is; bias: of E, or null
template <class E>
void tiered_ffn(const Tiers& t, const typename E::T* x, int64_t tokens, const void* bias, typename E::T* y, int threads) {
  const Proxy& p = t.high;
  const int64_t most = std::min(tokens, TIER_TOKENS), blocks = t.down.blocks();
  const TierRuns runs(p, blocks);
  const int64_t groups = runs.groups();
  TokenCodes<2> in(p.d_model, p.codes.bytes, most);
  Scratch& s = scratch();
  s.reserve(in.bytes() + Scratch::bytes_for<Chosen>(most * groups) + Scratch::bytes_for<float>(most * p.d_ff) + runs.bytes());
  in.reserve(s);
  Chosen* chosen = s.take<Chosen>(most * groups);
  float* h = s.take<float>(most * p.d_ff);
  auto units = [&](int64_t group, int64_t here, bool with_down) {
    const int64_t first = group * TIER_NEURONS, n = std::min(TIER_NEURONS, p.d_ff - first);
    tiered_units(t, in, first, n, here, with_down, chosen + group, groups, h);
  };
  // to(g)[0 .. 32 n) += what groups [begin, end) write to blocks [b0, b0 + n)
  auto add_groups = [&](int64_t begin, int64_t end, int64_t token, int64_t b0, int64_t n, auto&& to) {
    Columns columns[2];  // of one group, and of the next, which are asked for meanwhile
    for (int64_t g = begin; g <= end; g++) {
      Columns &now = columns[(g + 1) % 2], &next = columns[g % 2];
      next.count = 0;
      if (g < end) collect(t, chosen[token * groups + g], g * TIER_NEURONS, h + token * p.d_ff, next);
      if (g > begin) add_columns(now, next, b0, n, to(g - 1));
    }
  };
  if (tokens == 1) {
    in.lay<E>(0, x);
    return runs.one_token<E>(threads, s, bias, y, [&](int64_t begin, int64_t end, auto&& sums_of) {
      for (int64_t g = begin; g < end; g++) units(g, 1, g == begin);
      add_groups(begin, end, 0, 0, blocks, sums_of);
    });
  }
  for (int64_t from = 0; from < tokens; from += most, x += most * p.d_model, y += most * p.d_model) {
    const int64_t here = std::min(most, tokens - from);
    by_pieces(here, threads, [&](int64_t i, int) { in.lay<E>(i, x + i * p.d_model); });
    by_runs(groups, threads, [&](int64_t g) { units(g, here, false); });
    runs.many_tokens<E>(here, threads, bias, y, [&](int64_t begin, int64_t end, int64_t token, int64_t b0, int64_t n, float* sum) {
      add_groups(begin, end, token, b0, n, [&](int64_t) { return sum; });
    });
  }
}

}  // namespace
