// Scores of a proxy router: integer sums over codes of gate and up, then a fixed order of fp32 operations, so that every
// ISA decides as ../proxy_reference.py does, bit for bit; the format of its codes: ../proxy_codes.py.
#pragma once

#include <limits>

#include "quantised.h"
#include "token_codes.h"
#include "turned_rows.h"

namespace {

// Rows of 4-bit codes: of one linear after the other, a row for each neuron.
struct Plane {
  Rows codes;
  const uint8_t* multipliers;  // [rows, blocks] or null: 1
  const float* scales;         // [rows]
  int64_t blocks() const { return codes.bytes / (BLOCK / 2); }
};

// Of k linears of d_ff neurons, gate's rows before up's.
struct Proxy : Plane {
  const float *biases, *sizes;  // [k, d_ff] or null, [d_ff]
  const float* weight;          // [n_experts]
  float bias;
  int64_t k, d_model, d_ff, group;
  Act act;
  const float* biases_of(int64_t row) const { return biases ? biases + row : nullptr; }
};

template <size_t N>
inline vf cdf(vf z, float limit, const float (&coefficients)[N]) {
  const vf c = select(z < splat(-limit), splat(-limit), select(z > splat(limit), splat(limit), z));  // a NaN stays one
  const vf w = product(c, c);
  vf p = splat(coefficients[N - 1]);
  for (int i = int(N) - 2; i >= 0; i--) p = product(p, w) + splat(coefficients[i]);
  return product(p, c) + splat(0.5f);
}

inline vf proxy_act(Act act, vf z) {
  constexpr float LOGISTIC[] = {0.24424246f, -0.016765588f, 9.9281338e-4f, -3.8960653e-5f,
                                9.5864896e-7f, -1.4124211e-8f, 1.1345992e-10f, -3.812188e-13f};
  constexpr float NORMAL[] = {0.39787027f, -0.064554414f, 0.0087636922f, -8.1218776e-4f,
                              4.7763918e-5f, -1.5888288e-6f, 2.258824e-8f};
  const vf positive = select(z < splat(0), splat(0), z);
  switch (act) {
    case Act::silu: return product(z, cdf(z, 8.0f, LOGISTIC));
    case Act::quick_gelu: return product(z, cdf(product(z, splat(1.702f)), 8.0f, LOGISTIC));
    case Act::gelu:
    case Act::gelu_tanh: return product(z, cdf(z, 4.0f, NORMAL));
    case Act::relu: return positive;
    case Act::relu2: return product(positive, positive);
    default: return z;
  }
}

constexpr int64_t SCAN = 16;            // neurons whose codes are read by all tokens before the next
constexpr int64_t SCAN_AHEAD = 8192;    // bytes of codes that are asked for ahead of their use

// Those of a row from block `from` on, its last ones, zeros behind them: no byte beyond the row is read.
inline Multipliers last_multipliers(const uint8_t* row, int64_t blocks, int64_t from) {
  constexpr int64_t N = sizeof(Multipliers);
  Multipliers m = 0;
  if (blocks >= N) {
    std::memcpy(&m, row + blocks - N, N);
    return Multipliers(m >> 8 * (from + N - blocks));
  }
  for (int64_t i = 0; i < blocks - from; i++) m = Multipliers(m | Multipliers(row[from + i]) << 8 * i);
  return m;
}

// sums[0 .. LANES): of the products of LANES rows, exactly; row(i) is the i-th of them, in ascending order. ahead: as many
// bytes to ask for, or null.
template <bool BLOCKS, class Row>
inline void proxy_sums(const Plane& p, Row&& row, const char* x, const char* ahead, int32_t* sums) {
  const char* codes[LANES];
  const uint8_t* multipliers[LANES];
#pragma GCC unroll 16
  for (int n = 0; n < LANES; n++) {
    codes[n] = p.codes.data + row(n) * p.codes.stride;
    multipliers[n] = p.multipliers + row(n) * p.blocks();
  }
  vi all[LANES] = {};
  auto add = [&](int64_t i, auto&& bytes, auto&& factors) INLINE {
    const vb x_low = load_bytes(x), x_high = load_bytes(x + VB), start = load_bytes(x + 2 * VB);
#pragma GCC unroll 16
    for (int n = 0; n < LANES; n++) {
      if (ahead) __builtin_prefetch(ahead + i * LANES + n * VB, 0, 3);
      all[n] = add_nibbles(all[n], start, bytes(n), x_low, x_high, factors(n));
    }
    x += TokenCodes<2>::CHUNK;
  };
  // Past a row's end x is 0, and what is read there adds nothing: only the plane's last rows end within a vector.
  constexpr int64_t EACH = sizeof(Multipliers);
  const int64_t chunks = (p.codes.bytes + VB - 1) / VB, rows_left = p.codes.count - row(LANES - 1);
  const bool whole = rows_left * p.codes.stride >= chunks * VB && rows_left * p.blocks() >= chunks * EACH;
  const int64_t end = whole ? chunks * VB : p.codes.bytes;
  int64_t i = 0, b = 0;
  for (; i + VB <= end; i += VB, b += EACH)
    add(
        i, [&](int n) INLINE { return load_bytes(codes[n] + i); },
        [&](int n) INLINE {
          Multipliers m = ONES;
          if (BLOCKS) std::memcpy(&m, multipliers[n] + b, sizeof m);
          return m;
        });
  if (const int64_t left = end - i; left > 0)
    add(
        i, [&](int n) INLINE { return load_last_bytes(codes[n] + i, left); },
        [&](int n) INLINE { return BLOCKS ? last_multipliers(multipliers[n], p.blocks(), b) : ONES; });
  std::fill(sums, sums + LANES, 0);
  add_hsum4(all, sums);
}

template <class Row>
inline void proxy_sums(const Plane& p, Row&& row, const char* x, const char* ahead, int32_t* sums) {
  if (p.multipliers) return proxy_sums<true>(p, row, x, ahead, sums);
  proxy_sums<false>(p, row, x, ahead, sums);
}

// to[0 .. SCAN): n numbers of each neuron, n <= SCAN, zeros behind them. Most often n is SCAN: no call copies them then.
inline void take(const float* from, int64_t n, float* to) {
  if (n == SCAN) {
    std::memcpy(to, from, SCAN * sizeof(float));
    return;
  }
  std::fill(to, to + SCAN, 0.0f);
  std::copy(from, from + n, to);
}

// z[0 .. n): hidden units before the activation, of n rows' sums, scales and biases (or null), for one token; n <= SCAN
inline void units_of_sums(const float* scales_in, const float* biases_in, int64_t n, const int32_t* sums, float scale,
                          float* z) {
  float scales[SCAN], biases[SCAN];
  take(scales_in, n, scales);
  if (biases_in) take(biases_in, n, biases);
  for (int64_t i = 0; i < SCAN; i += W) {
    vf v = product(to_float(*reinterpret_cast<const vi_mem*>(sums + i)), load(scales + i));
    v = product(v, splat(scale));
    store(z + i, biases_in ? v + load(biases + i) : v);
  }
}

constexpr int64_t SCANNED = 64;  // tokens at a time, of many

#if defined(__AVX512VNNI__)
// Of many tokens: rows lie in lanes, so that nothing is summed up across them and a code is unpacked once.
#define ROWS_IN_LANES
constexpr int64_t MANY_TOKENS_SCANNED = 8;  // from which on turning the rows pays
constexpr int64_t TURNED_BLOCKS = 16;       // at a time: their vectors stay in L1
static_assert(SCAN == W);

// A block of SCAN rows: four inputs of each in a lane, and its multipliers.
struct TurnedBlock {
  vi codes[BLOCK / 4], multipliers;
};

inline void turn_rows(const Plane& p, int64_t row, int64_t n, int64_t block, TurnedBlock& to) {
  typedef uint64_t parts_of_rows __attribute__((vector_size(VB)));
  auto at = [&](int64_t i) { return row + std::min(i, n - 1); };  // past the last row, the last one again
  const char* rows[SCAN];
  for (int64_t i = 0; i < SCAN; i++) rows[i] = p.codes.data + at(i) * p.codes.stride;
  vi words[4];
  for (int r = 0; r < 4; r++)
    words[r] = reinterpret_cast<vi>(gather<parts_of_rows>(rows, r, block * (BLOCK / 2), p.codes.bytes));
  turn(words);
  for (int i = 0; i < 4; i++) {
    to.codes[i] = words[i] & 0x0f0f0f0f;
    to.codes[4 + i] = words[i] >> 4 & 0x0f0f0f0f;
  }
  alignas(64) int32_t multipliers[SCAN];
  for (int64_t i = 0; i < SCAN; i++) multipliers[i] = p.multipliers ? p.multipliers[at(i) * p.blocks() + block] : 1;
  std::memcpy(&to.multipliers, multipliers, sizeof multipliers);
}

// sums[k][i][0 .. SCAN) of neurons [first, first + n) of K linears for `tokens` tokens from t0 on, exactly
template <int K>
inline void turned_sums(const Proxy& p, int64_t first, int64_t n, const TokenCodes<2>& in, int64_t t0, int64_t tokens,
                        int32_t (*sums)[SCANNED][SCAN]) {
  constexpr int M = 8 / K;
  TurnedBlock turned[TURNED_BLOCKS][K];
  for (int64_t b0 = 0; b0 < p.blocks(); b0 += TURNED_BLOCKS) {
    const int64_t blocks = std::min(TURNED_BLOCKS, p.blocks() - b0);
    for (int64_t b = 0; b < blocks; b++)
      for (int k = 0; k < K; k++) turn_rows(p, k * p.d_ff + first, n, b0 + b, turned[b][k]);
    for (int64_t token = 0; token < tokens; token += M) {
      const char* xs[M];
      vi all[M][K];
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const int64_t i = std::min(token + m, tokens - 1);  // past the last token, the last one again
        xs[m] = in.row(t0 + i);
#pragma GCC unroll 2
        for (int k = 0; k < K; k++) all[m][k] = b0 ? *reinterpret_cast<const vi_mem*>(sums[k][i]) : vi{};
      }
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t offset = (b0 + b) / 4 * TokenCodes<2>::CHUNK + (b0 + b) % 4 * (BLOCK / 2);
        vi w[BLOCK / 4][K];
#pragma GCC unroll 16
        for (int i = 0; i < BLOCK / 4; i++)
#pragma GCC unroll 2
          for (int k = 0; k < K; k++) w[i][k] = turned[b][k].codes[i];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
          const char* x = xs[m] + offset;
          const auto* start = reinterpret_cast<const int32_t*>(x + 2 * VB);
          vi sum[K];
          sum[0] = sum[K - 1] = vi{} + (start[0] + start[1] + start[2] + start[3]);
#pragma GCC unroll 16
          for (int i = 0; i < BLOCK / 4; i++) {
            int32_t four;
            std::memcpy(&four, x + i / 4 * VB + i % 4 * 4, 4);
            const vb inputs = reinterpret_cast<vb>(vi{} + four);
#pragma GCC unroll 2
            for (int k = 0; k < K; k++) sum[k] = add_products<false>(sum[k], reinterpret_cast<vb>(w[i][k]), inputs);
          }
#pragma GCC unroll 2
          for (int k = 0; k < K; k++) all[m][k] = add_times(all[m][k], sum[k], turned[b][k].multipliers);  // 8 * 32 * 127 < 2^15
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; m++)
        if (token + m < tokens)
#pragma GCC unroll 2
          for (int k = 0; k < K; k++) *reinterpret_cast<vi_mem*>(sums[k][token + m]) = all[m][k];
    }
  }
}
#endif

// f(token, z): hidden units z[k][0 .. n) of neurons [first, first + n), n <= SCAN, for tokens [t0, t1) one after the other
template <class F>
inline void proxy_units(const Proxy& p, int64_t first, int64_t n, const TokenCodes<2>& in, int64_t t0, int64_t t1, F&& f) {
  float z[2][SCAN] = {};
#if defined(ROWS_IN_LANES)
  if (t1 - t0 >= MANY_TOKENS_SCANNED) {
    int32_t sums[2][SCANNED][SCAN];
    for (int64_t t = t0; t < t1; t += SCANNED) {
      const int64_t tokens = std::min(SCANNED, t1 - t);
      p.k == 2 ? turned_sums<2>(p, first, n, in, t, tokens, sums) : turned_sums<1>(p, first, n, in, t, tokens, sums);
      for (int64_t i = 0; i < tokens; i++) {
        for (int64_t k = 0; k < p.k; k++) {
          const int64_t row = k * p.d_ff + first;
          units_of_sums(p.scales + row, p.biases_of(row), n, sums[k][i], in.scale(t + i), z[k]);
        }
        f(t + i, z);
      }
    }
    return;
  }
#endif
  for (int64_t t = t0; t < t1; t++) {
    for (int64_t k = 0; k < p.k; k++) {
      int32_t sums[SCAN] = {};
      const int64_t row = k * p.d_ff + first;
      for (int64_t i = 0; i < n; i += LANES) {  // past the last row, the last one again
        const char* ahead = p.codes.data + (row + i) * p.codes.stride + SCAN_AHEAD;
        proxy_sums(p, [&](int64_t j) { return row + std::min(i + j, n - 1); }, in.row(t), ahead, sums + i);
      }
      units_of_sums(p.scales + row, p.biases_of(row), n, sums, in.scale(t), z[k]);
    }
    f(t, z);
  }
}

// neurons[0 .. n): the sizes of those hidden units; SCAN numbers are written
inline void proxy_neurons(const Proxy& p, int64_t first, int64_t n, const float (*z)[SCAN], float* neurons) {
  float sizes[SCAN];
  take(p.sizes + first, n, sizes);
  for (int64_t i = 0; i < SCAN; i += W) {
    vf t = proxy_act(p.act, load(z[0] + i));
    if (p.k == 2) t = product(t, load(z[1] + i));
    t = reinterpret_cast<vf>(reinterpret_cast<vi>(t) & 0x7fffffff);
    t = product(t, load(sizes + i));
    store(neurons + i, t);
  }
}

// A size that is no number is above every threshold.
inline vf proxy_logits(const Proxy& p, vf weights, vf sizes) {
  const vf logits = product(sizes, weights) + splat(p.bias);
  return select(logits == logits, logits, splat(std::numeric_limits<float>::infinity()));
}

// logits[0 .. n) of neurons [first, first + n), which are experts each; n <= SCAN
inline void single_logits(const Proxy& p, int64_t first, int64_t n, const float* sizes, float* logits) {
  float weights[SCAN];
  take(p.weight + first, n, weights);
  for (int64_t i = 0; i < n; i += W)
    store_part(logits + i, proxy_logits(p, load(weights + i), load(sizes + i)), std::min<int64_t>(n - i, W));
}

// logits[token * stride + e] of experts [e0, e1), for tokens [t0, t1) of the inputs
inline void proxy_scan(const Proxy& p, const TokenCodes<2>& in, int64_t e0, int64_t e1, int64_t t0, int64_t t1, float* logits,
                       int64_t stride) {
  const int64_t end = e1 * p.group;
  for (int64_t first = e0 * p.group; first < end; first += SCAN) {
    const int64_t n = std::min(SCAN, end - first);
    proxy_units(p, first, n, in, t0, t1, [&](int64_t token, const float (*z)[SCAN]) {
      float neurons[SCAN];
      proxy_neurons(p, first, n, z, neurons);
      float* out = logits + token * stride;
      if (p.group == 1) return single_logits(p, first, n, neurons, out + first - e0);
      for (int64_t i = 0; i < n; i++) {
        const int64_t e = (first + i) / p.group, j = (first + i) % p.group;
        // An expert's sum of squares grows where its logit will stand.
        const float square = product(splat(neurons[i]), splat(neurons[i]))[0];
        float& sum = out[e - e0];
        sum = j == 0 ? square : sum + square;
        if (j + 1 == p.group) sum = proxy_logits(p, splat(p.weight[e]), splat(std::sqrt(sum)))[0];
      }
    });
  }
}

}  // namespace
