// As tiers.h, of planes that were packed when a model was lowered (../packed_planes.py): what every token reads lies in one
// stream, in the order of its use, and a lane finds all of its bytes in one vector; what it reads for one of the best
// neurons lies in one place. All of down's high plane is read, whoever is kept: that is faster than finding its columns.
#pragma once

#include "tiers.h"

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t GROUP = 64, PANEL = 16, QUAD = 4;  // neurons
constexpr int64_t QUADS = GROUP / QUAD;
constexpr int64_t STREAM_AHEAD = 8192;  // bytes of the stream that are asked for ahead of their use
static_assert(PANEL == SCAN && QUAD == LINE_BLOCKS && GROUP == TIER_NEURONS);

struct PackedTiers {
  const Proxy& proxy;  // whose codes and scales are packed too
  const char *high, *low;
  float threshold, floor;
  int64_t blocks() const { return (proxy.d_model + BLOCK - 1) / BLOCK; }
  // Of a panel, and of a group's columns of down: where parts begin, and bytes.
  int64_t panel_multipliers() const { return blocks() * PANEL * (BLOCK / 2); }
  int64_t panel_scales() const { return panel_multipliers() + round_up(blocks() * PANEL, LINE); }
  int64_t panel_bytes() const { return panel_scales() + PANEL * 4; }
  int64_t down_multipliers() const { return blocks() * GROUP * (BLOCK / 2); }
  int64_t down_scales() const { return down_multipliers() + round_up(blocks(), QUAD) * GROUP; }
  int64_t panels_bytes() const { return GROUP / PANEL * proxy.k * panel_bytes(); }
  int64_t group_bytes() const { return panels_bytes() + down_scales() + GROUP * 4; }
  int64_t row_bytes() const { return round_up(blocks() * (BLOCK / 2 + 1) + 4, LINE); }
  const char* panel(int64_t group, int64_t i, int64_t k) const {
    return high + group * group_bytes() + (i * proxy.k + k) * panel_bytes();
  }
  // It is read while the next group is scanned, and lies behind that one's panels.
  const char* down(int64_t group) const {
    const int64_t groups = (proxy.d_ff + GROUP - 1) / GROUP;
    return high + (group + 1) % groups * group_bytes() + panels_bytes();
  }
  const char* low_rows(int64_t neuron) const { return low + neuron * (proxy.k + 1) * row_bytes(); }
  float low_scale(const char* row) const { return *reinterpret_cast<const float*>(row + row_bytes() - 4); }
};

// Of a group and a token: hidden units before the activation by the high planes, and who is chosen, a bit a neuron.
struct Scanned {
  float units[2][GROUP];
  uint64_t kept, best;
};

// Of n bytes of the stream that are being read: as many, STREAM_AHEAD bytes on.
inline void ask_ahead(const char* p, int64_t n) {
  for (int64_t i = 0; i < n; i += LINE) __builtin_prefetch(p + STREAM_AHEAD + i, 0, 3);
}

template <class F>
inline void for_bits(uint64_t bits, F&& f) {
  for (; bits; bits &= bits - 1) f(int64_t(__builtin_ctzll(bits)));
}

// Rows of the low plane that a group will read: asked for a line at a time, for in a burst each waits for the last.
class LowAhead {
 public:
  explicit LowAhead(int64_t bytes) : bytes_(bytes) {}
  void add(const char* rows) { rows_[count_++] = rows; }
  void ask() {
    if (at_ == count_) return;
    __builtin_prefetch(rows_[at_] + byte_, 0, 3);
    byte_ += LINE;
    if (byte_ >= bytes_) byte_ = 0, at_++;
  }
  void drop() { at_ = count_ = byte_ = 0; }

 private:
  int64_t bytes_, byte_ = 0, at_ = 0, count_ = 0;
  const char* rows_[GROUP];
};

// The sum of a block's products, a lane a row: `four` adds those of four inputs, `times` makes it times a multiplier.
#if defined(SUMS_IN_16_BITS)
typedef vs BlockSum;  // of every other pair of inputs: 16 * 15 * 127 < 2^15
inline BlockSum four(BlockSum sum, vb codes, vb x) {
  return sum + reinterpret_cast<vs>(OF_BYTES(maddubs_epi16)(reinterpret_cast<vbits>(codes), reinterpret_cast<vbits>(x)));
}
inline vi times(vi all, BlockSum sum, vi multipliers) {
  return all + pairs_of(sum, reinterpret_cast<vbits>(multipliers | multipliers << 16));
}
#else
typedef vi BlockSum;
inline BlockSum four(BlockSum sum, vb codes, vb x) { return add_products<false>(sum, codes, x); }
inline vi times(vi all, BlockSum sum, vi multipliers) { return add_times(all, sum, multipliers); }  // 8 * 32 * 127 < 2^15
#endif

// starts[0 .. blocks): what a BlockSum begins with in each lane, for codes are stored 8 higher.
inline void block_starts(const char* x, int64_t blocks, int32_t* starts) {
  constexpr int64_t EACH = VB / (BLOCK / 2);
  for (int64_t b = 0; b < blocks; b++) {
    const char* at = x + b / EACH * TokenCodes<2>::CHUNK + b % EACH * (BLOCK / 2);
    int32_t sums[2] = {};  // of every other pair
    for (int64_t i = 0; i < BLOCK / 2; i++) sums[i / 2 % 2] += int8_t(at[i]) + int8_t(at[VB + i]);
#if defined(SUMS_IN_16_BITS)
    const int16_t pair[2] = {int16_t(-8 * sums[0]), int16_t(-8 * sums[1])};
    std::memcpy(starts + b, pair, sizeof pair);
#else
    starts[b] = -8 * (sums[0] + sums[1]);
#endif
  }
}

// sums[m][0 .. PANEL): of a panel's rows and M tokens, exactly
template <int M>
inline void panel_sums(const PackedTiers& t, const char* panel, const char* const* xs, const int32_t* const* starts,
                       LowAhead& low, int32_t (*sums)[PANEL]) {
  constexpr int64_t EACH = VB / (BLOCK / 2), WORDS = BLOCK / 2 / QUAD;
  const char* multipliers = panel + t.panel_multipliers();
  const int64_t blocks = t.blocks();
  ask_ahead(multipliers, t.panel_bytes() - t.panel_multipliers());
  for (int64_t part = 0; part < PANEL / W; part++) {
    vi all[M] = {};
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t at = b / EACH * TokenCodes<2>::CHUNK + b % EACH * (BLOCK / 2);
      if (M == 1) low.ask();
      vb codes[2][WORDS];
#pragma GCC unroll 4
      for (int64_t w = 0; w < WORDS; w++) {
        const char* from = panel + (b * WORDS + w) * PANEL * QUAD + part * VB;
        __builtin_prefetch(from + STREAM_AHEAD, 0, 3);
        const vb pairs = load_bytes(from);
        codes[0][w] = pairs & int8_t(15);
        codes[1][w] = reinterpret_cast<vb>(reinterpret_cast<vs>(pairs) >> 4) & int8_t(15);
      }
      const vi factors = widen_bytes(multipliers + b * PANEL + part * W);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        BlockSum sum[2] = {reinterpret_cast<BlockSum>(vi{} + starts[m][b]), {}};
#pragma GCC unroll 4
        for (int64_t w = 0; w < WORDS; w++)
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            int32_t inputs;
            std::memcpy(&inputs, xs[m] + at + half * VB + w * QUAD, 4);
            sum[half] = four(sum[half], codes[half][w], reinterpret_cast<vb>(vi{} + inputs));
          }
        all[m] = times(all[m], sum[0] + sum[1], factors);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) std::memcpy(sums[m] + part * W, &all[m], sizeof all[m]);
  }
}

// Of a row of the low plane and a token, exactly. Behind its codes stand bytes that x is 0 for.
inline int32_t low_sum(const PackedTiers& t, const char* row, const char* x) {
  const char* multipliers = row + t.blocks() * (BLOCK / 2);
  vi sum = {};
  for (int64_t i = 0; i < t.blocks() * (BLOCK / 2); i += VB, x += TokenCodes<2>::CHUNK, multipliers += sizeof(Multipliers)) {
    Multipliers m;
    std::memcpy(&m, multipliers, sizeof m);
    sum = add_nibbles(sum, load_bytes(x + 2 * VB), load_bytes(row + i), load_bytes(x), load_bytes(x + VB), m);
  }
  return hsum(sum);
}

// The tokens of a call as codes, with the starts of their blocks.
class PackedTokens {
 public:
  PackedTokens(const PackedTiers& t, int64_t tokens)
      : codes(t.proxy.d_model, t.blocks() * (BLOCK / 2), tokens), blocks_(t.blocks()), tokens_(tokens) {}
  size_t bytes() const { return codes.bytes() + Scratch::bytes_for<int32_t>(tokens_ * blocks_); }
  void reserve(Scratch& s) {
    codes.reserve(s);
    starts_ = s.take<int32_t>(tokens_ * blocks_);
  }
  template <class E>
  void lay(int64_t token, const typename E::T* x) const {
    codes.lay<E>(token, x);
    block_starts(codes.row(token), blocks_, starts_ + token * blocks_);
  }
  const int32_t* starts(int64_t token) const { return starts_ + token * blocks_; }
  TokenCodes<2> codes;

 private:
  int64_t blocks_, tokens_;
  int32_t* starts_ = nullptr;
};

// Decides neurons [at, at + n) of the group from neuron `first` on, n <= PANEL, by units z.
inline void choose(const PackedTiers& t, int64_t first, int64_t at, int64_t n, const float (*z)[SCAN], Scanned& to) {
  const Proxy& p = t.proxy;
  float sizes[SCAN] = {}, logits[SCAN];
  proxy_neurons(p, first + at, n, z, sizes);
  single_logits(p, first + at, n, sizes, logits);
  uint32_t best = 0, kept = 0;
  for (int64_t j = 0; j < n; j++) {
    best |= uint32_t(logits[j] > t.threshold) << j;
    kept |= uint32_t(logits[j] > t.floor) << j;
  }
  to.best |= uint64_t(best) << at;
  to.kept |= uint64_t(best | kept) << at;
}

// Of tokens [token, token + M), to[0 .. M)
template <int M>
inline void scan_group(const PackedTiers& t, const PackedTokens& in, int64_t group, int64_t token, LowAhead& low, Scanned* to) {
  const Proxy& p = t.proxy;
  const char* xs[M];
  const int32_t* starts[M];
  for (int m = 0; m < M; m++) {
    xs[m] = in.codes.row(token + m), starts[m] = in.starts(token + m);
    to[m].kept = to[m].best = 0;
  }
  const int64_t first = group * GROUP;
  for (int64_t at = 0; at < std::min(GROUP, p.d_ff - first); at += PANEL) {
    const int64_t n = std::min(PANEL, p.d_ff - first - at);
    float z[M][2][SCAN] = {};
    for (int64_t k = 0; k < p.k; k++) {
      const char* panel = t.panel(group, at / PANEL, k);
      int32_t sums[M][PANEL];
      panel_sums<M>(t, panel, xs, starts, low, sums);
      const auto* scales = reinterpret_cast<const float*>(panel + t.panel_scales());
      const float* biases = p.biases_of(k * p.d_ff + first + at);
      for (int m = 0; m < M; m++) {
        units_of_sums(scales, biases, n, sums[m], in.codes.scale(token + m), z[m][k]);
        std::memcpy(to[m].units[k] + at, z[m][k], sizeof z[m][k]);
      }
    }
    for (int m = 0; m < M; m++) choose(t, first, at, n, z[m], to[m]);
  }
  low.drop();
  for_bits(to[0].best, [&](int64_t j) { low.add(t.low_rows(first + j)); });
}

// h[0 .. GROUP): what the group's hidden units are, 0 where a neuron is not kept
inline void finish_units(const PackedTiers& t, const PackedTokens& in, int64_t group, int64_t token, Scanned& of, float* h) {
  const Proxy& p = t.proxy;
  const int64_t first = group * GROUP, n = std::min(GROUP, p.d_ff - first);
  for_bits(of.best, [&](int64_t j) {
    const char* row = t.low_rows(first + j);
    for (int64_t k = 0; k < p.k; k++, row += t.row_bytes())
      of.units[k][j] += float(low_sum(t, row, in.codes.row(token))) * t.low_scale(row) * in.codes.scale(token);
  });
  float* up = of.units[p.k - 1];
  activate_row(p.act, p.k == 2 ? of.units[0] : nullptr, up, n);
  for (int64_t j = 0; j < GROUP; j++) h[j] = of.kept >> j & 1 ? up[j] : 0.0f;
}

// Bytes of each 128 bits: word k of the result has byte k of all four words.
inline vb words_of_bytes(vi words) {
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
  const __m128i turned = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
#if defined(__AVX512BW__)
  return reinterpret_cast<vb>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(words), _mm512_broadcast_i32x4(turned)));
#else
  return reinterpret_cast<vb>(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(words), _mm256_broadcastsi128_si256(turned)));
#endif
#else
  char from[VB], to[VB];
  std::memcpy(from, &words, VB);
  for (int64_t i = 0; i < VB; i++) to[i] = from[i / 16 * 16 + i % 4 * 4 + i / 4 % 4];
  return load_bytes(to);
#endif
}

// Sums of a group's columns of down, each times a factor. In integers: factors times multipliers are fixed-point numbers
// of four signed bytes each, so that a lane adds products of bytes of four neurons. The unit is 2^-23 of the largest
// factor: what a multiplier makes larger keeps its 24 bits.
class DownColumns {
 public:
  // h: [GROUP]
  DownColumns(const PackedTiers& t, int64_t group, const float* h)
      : codes_(t.down(group)), multipliers_(codes_ + t.down_multipliers()), blocks_(t.blocks()) {
    const auto* scales = reinterpret_cast<const float*>(codes_ + t.down_scales());
    int32_t bits = 0;  // sizes of floats are ordered as their bits are, NaN above all
    for (int64_t j = 0; j < GROUP; j++) {
      factors_[j] = h[j] * scales[j];
      int32_t size;
      std::memcpy(&size, &factors_[j], 4);
      bits = std::max(bits, size & 0x7fffffff);
    }
    float most;
    std::memcpy(&most, &bits, 4);
    empty_ = bits == 0;
    unit_ = most * (255 / MOST_UNITS);
    in_range_ = unit_ >= 0x1p-100f && unit_ <= 0x1p100f;
  }

  // y[0 .. 32 n) += blocks [b0, b0 + n) of outputs, b0 a multiple of QUAD
  ALONE void add(int64_t b0, int64_t n, float* y) const {
    if (empty_) return;
    if (!in_range_) return add_in_floats(b0, n, y);
    vf factors[QUADS];  // a quad's, again and again
    for (int64_t q = 0; q < QUADS; q++) {
      float again[W];
      for (int64_t i = 0; i < W; i++) again[i] = factors_[q * QUAD + i % QUAD] * (1 / unit_);
      factors[q] = load(again);
    }
    ask_ahead(multipliers_ + round_up(blocks_, QUAD) * GROUP, GROUP * 4);
    for (int64_t b = b0; b < b0 + n; b += QUAD) {
      ask_ahead(multipliers_ + b * GROUP, QUAD * GROUP);
      constexpr int64_t PARTS = QUAD * QUAD / W;
      alignas(VB) int32_t words[QUADS][QUAD * QUAD];  // of each quad: of each block a word for each digit
      vi starts[PARTS] = {};                          // codes are stored 8 higher
      for (int64_t q = 0; q < QUADS; q++)
        for (int64_t part = 0; part < PARTS; part++) {
          const vf multipliers = to_float(widen_bytes(multipliers_ + (b * QUADS / QUAD + q) * QUAD * QUAD + part * W));
          // Signed bytes whose sum, each 2^8 times the one before, is the number.
          const vu middle = vu{} + 0x80808080u;
          const vb digits = words_of_bytes(
              reinterpret_cast<vi>((reinterpret_cast<vu>(nearest(multipliers * factors[q])) + middle) ^ middle));
          starts[part] = add_products<false>(starts[part], vb{} + int8_t(8), digits);
          std::memcpy(words[q] + part * W, &digits, VB);
        }
      int32_t start[QUAD * QUAD];
      std::memcpy(start, starts, sizeof start);
      for (int64_t i = 0; i < std::min(QUAD, b0 + n - b); i++) add_block(b + i, words, i * QUAD, start, y + (b + i - b0) * BLOCK);
    }
  }

 private:
  static constexpr float MOST_UNITS = 127 << 24;
  static constexpr int DIGITS = 4;

  // words, start: the block's digits from `at` on
  void add_block(int64_t block, const int32_t (*words)[QUAD * QUAD], int64_t at, const int32_t* start, float* y) const {
    for (int64_t part = 0; part < PANEL / W; part++) {
      vi sums[DIGITS][2];
#pragma GCC unroll 4
      for (int d = 0; d < DIGITS; d++) sums[d][0] = sums[d][1] = vi{} - start[at + d];
#pragma GCC unroll 4
      for (int64_t q = 0; q < QUADS; q++) {
        const char* from = codes_ + (block * QUADS + q) * LINE + part * VB;
        __builtin_prefetch(from + STREAM_AHEAD, 0, 3);
        const vb pairs = load_bytes(from);
        const vb codes[2] = {pairs & int8_t(15), reinterpret_cast<vb>(reinterpret_cast<vs>(pairs) >> 4) & int8_t(15)};
#pragma GCC unroll 4
        for (int d = 0; d < DIGITS; d++) {
          const vb digits = reinterpret_cast<vb>(vi{} + words[q][at + d]);
          for (int half = 0; half < 2; half++) sums[d][half] = add_products<false>(sums[d][half], codes[half], digits);
        }
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const vf upper = to_float(sums[3][half]) * splat(0x1p24f) + to_float(sums[2][half]) * splat(0x1p16f);
        float* to = y + half * (BLOCK / 2) + part * W;
        store(to, load(to) + (upper + to_float(sums[1][half] * 256 + sums[0][half])) * splat(unit_));
      }
    }
  }

  // One by one: factors that are no numbers, or out of range.
  void add_in_floats(int64_t b0, int64_t n, float* y) const {
    for (int64_t j = 0; j < GROUP; j++) {
      if (factors_[j] == 0.0f) continue;
      for (int64_t b = b0; b < b0 + n; b++) {
        const int64_t q = j / QUAD, i = j % QUAD;
        const auto* multipliers = reinterpret_cast<const uint8_t*>(multipliers_) + (b / QUAD * QUADS + q) * QUAD * QUAD;
        const float factor = factors_[j] * float(multipliers[b % QUAD * QUAD + i]);
        for (int64_t o = 0; o < BLOCK / 2; o++) {
          const int pair = uint8_t(codes_[(b * QUADS + q) * LINE + o * QUAD + i]);
          float* to = y + (b - b0) * BLOCK + o;
          to[0] += factor * float((pair & 15) - 8);
          to[BLOCK / 2] += factor * float((pair >> 4) - 8);
        }
      }
    }
  }

  const char *codes_, *multipliers_;
  int64_t blocks_;
  float factors_[GROUP], unit_;
  bool empty_, in_range_;
};

// y[0 .. 32 n) += what a group writes to blocks [b0, b0 + n): high of the kept, low of the best; h: [GROUP]
inline void add_group(const PackedTiers& t, int64_t group, uint64_t best, const float* h, int64_t b0, int64_t n, float* y) {
  DownColumns(t, group, h).add(b0, n, y);
  Columns low, none;
  for_bits(best, [&](int64_t j) {
    const char* row = t.low_rows(group * GROUP + j) + t.proxy.k * t.row_bytes();
    const auto* multipliers = reinterpret_cast<const uint8_t*>(row + t.blocks() * (BLOCK / 2));
    low.at[low.count++] = {row, multipliers, h[j] * t.low_scale(row)};
  });
  low.fill();
  Ahead nothing(none, 0, 0);
  for (int64_t b = 0; b < n; b += MOST_BLOCKS)
    add_in_floats(low, nothing, b0 + b, std::min(MOST_BLOCKS, n - b), y + b * BLOCK);
}

// y: [tokens, d_model] of E, dense, as x is; bias: of E, or null
template <class E>
void packed_tiered_ffn(const PackedTiers& t, const typename E::T* x, int64_t tokens, const void* bias, typename E::T* y,
                       int threads) {
  const int64_t most = std::min(tokens, TIER_TOKENS), d_model = t.proxy.d_model;
  const TierRuns runs(t.proxy, t.blocks());
  const int64_t groups = runs.groups();
  PackedTokens in(t, most);
  Scratch& s = scratch();
  s.reserve(in.bytes() + Scratch::bytes_for<float>(most * groups * GROUP) + Scratch::bytes_for<uint64_t>(most * groups) +
            runs.bytes());
  in.reserve(s);
  if (tokens == 1) {
    in.lay<E>(0, x);
    return runs.one_token<E>(threads, s, bias, y, [&](int64_t begin, int64_t end, auto&& sums_of) {
      LowAhead low((t.proxy.k + 1) * t.row_bytes());
      Scanned scanned[2];  // of one group, and of the next: meanwhile rows of the low plane come that were asked for
      for (int64_t g = begin; g <= end; g++) {
        if (g < end) scan_group<1>(t, in, g, 0, low, scanned + g % 2);
        if (g == begin) continue;
        float h[GROUP];
        finish_units(t, in, g - 1, 0, scanned[(g - 1) % 2], h);
        add_group(t, g - 1, scanned[(g - 1) % 2].best, h, 0, t.blocks(), sums_of(g - 1));
      }
    });
  }
  float* h = s.take<float>(most * groups * GROUP);
  uint64_t* best = s.take<uint64_t>(most * groups);
  for (int64_t from = 0; from < tokens; from += most, x += most * d_model, y += most * d_model) {
    const int64_t here = std::min(most, tokens - from);
    by_pieces(here, threads, [&](int64_t i, int) { in.lay<E>(i, x + i * d_model); });
    by_runs(groups, threads, [&](int64_t g) {
      constexpr int M = 8;
      Scanned scanned[M];
      LowAhead low(0);
      for (int64_t token = 0; token < here;) {
        const int64_t n = here - token >= M ? M : 1;
        n == M ? scan_group<M>(t, in, g, token, low, scanned) : scan_group<1>(t, in, g, token, low, scanned);
        for (int64_t m = 0; m < n; m++, token++) {
          finish_units(t, in, g, token, scanned[m], h + (token * groups + g) * GROUP);
          best[token * groups + g] = scanned[m].best;
        }
      }
    });
    runs.many_tokens<E>(here, threads, bias, y, [&](int64_t begin, int64_t end, int64_t token, int64_t b0, int64_t n, float* sum) {
      for (int64_t g = begin; g < end; g++)
        add_group(t, g, best[token * groups + g], h + (token * groups + g) * GROUP, b0, n, sum);
    });
  }
}

}  // namespace
