// Scores of a proxy router: integer sums over codes of gate and up, then a fixed order of fp32 operations, so that every
// ISA decides as ../proxy_reference.py does, bit for bit; the format of its codes: ../proxy_codes.py.
#pragma once

#include <limits>

#include "quantised.h"
#include "token_codes.h"

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

// z[k][0 .. n): hidden units of neurons [first, first + n) before the activation, for one token; n <= SCAN
inline void proxy_units(const Proxy& p, int64_t first, int64_t n, const char* x, float scale, float (*z)[SCAN]) {
  for (int64_t k = 0; k < p.k; k++) {
    int32_t sums[SCAN] = {};
    float scales[SCAN] = {}, biases[SCAN] = {};
    const int64_t row = k * p.d_ff + first;
    for (int64_t i = 0; i < n; i += LANES) {  // past the last row, the last one again
      const char* ahead = p.codes.data + (row + i) * p.codes.stride + SCAN_AHEAD;
      proxy_sums(p, [&](int64_t j) { return row + std::min(i + j, n - 1); }, x, ahead, sums + i);
    }
    std::copy(p.scales + row, p.scales + row + n, scales);
    if (p.biases) std::copy(p.biases + row, p.biases + row + n, biases);
    for (int64_t i = 0; i < SCAN; i += W) {
      vf v = product(to_float(*reinterpret_cast<const vi_mem*>(sums + i)), load(scales + i));
      v = product(v, splat(scale));
      store(z[k] + i, p.biases ? v + load(biases + i) : v);
    }
  }
}

// neurons[0 .. n): the sizes of those hidden units
inline void proxy_neurons(const Proxy& p, int64_t first, int64_t n, const float (*z)[SCAN], float* neurons) {
  float sizes[SCAN] = {};
  std::copy(p.sizes + first, p.sizes + first + n, sizes);
  for (int64_t i = 0; i < SCAN; i += W) {
    vf t = proxy_act(p.act, load(z[0] + i));
    if (p.k == 2) t = product(t, load(z[1] + i));
    t = reinterpret_cast<vf>(reinterpret_cast<vi>(t) & 0x7fffffff);
    t = product(t, load(sizes + i));
    store_part(neurons + i, t, std::clamp<int64_t>(n - i, 0, W));
  }
}

// A size that is no number is above every threshold.
inline vf proxy_logits(const Proxy& p, vf weights, vf sizes) {
  const vf logits = product(sizes, weights) + splat(p.bias);
  return select(logits == logits, logits, splat(std::numeric_limits<float>::infinity()));
}

inline float proxy_logit(const Proxy& p, int64_t expert, float size) {
  return proxy_logits(p, splat(p.weight[expert]), splat(size))[0];
}

// logits[token * stride + e] of experts [e0, e1), for tokens [t0, t1) of the inputs
inline void proxy_scan(const Proxy& p, const TokenCodes<2>& in, int64_t e0, int64_t e1, int64_t t0, int64_t t1, float* logits,
                       int64_t stride) {
  const int64_t end = e1 * p.group;
  for (int64_t first = e0 * p.group; first < end; first += SCAN) {
    const int64_t n = std::min(SCAN, end - first);
    for (int64_t token = t0; token < t1; token++) {
      float z[2][SCAN] = {}, neurons[SCAN];
      proxy_units(p, first, n, in.row(token), in.scale(token), z);
      proxy_neurons(p, first, n, z, neurons);
      float* out = logits + token * stride;
      for (int64_t i = 0; i < n; i++) {
        const int64_t e = (first + i) / p.group, j = (first + i) % p.group;
        // An expert's sum of squares grows where its logit will stand.
        const float square = product(splat(neurons[i]), splat(neurons[i]))[0];
        float& sum = out[e - e0];
        sum = p.group == 1 ? neurons[i] : j == 0 ? square : sum + square;
        if (j + 1 < p.group) continue;
        sum = proxy_logit(p, e, p.group == 1 ? sum : std::sqrt(sum));
      }
    }
  }
}

}  // namespace
