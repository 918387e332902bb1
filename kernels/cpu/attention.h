// Attention of few tokens over a cache of keys and values: each key and each value is read once, by one thread, for all
// queries that share its head.
// A piece is a run of keys of one head. Its sums are joined with those of the head's other pieces by the caller, in one
// order: pieces are the same for any number of threads, and so are the bits of the result.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "pool.h"
#include "problem.h"

namespace {

constexpr int64_t KEYS = 64;                    // of a piece
constexpr int64_t KEYS_AT_ONCE = 4;             // summed together, see add_hsum4
constexpr int64_t QUERIES_AT_ONCE = 4;          // sums of these times those keys stay in registers
constexpr int64_t CACHE_A_THREAD = 32 << 10;    // bytes of keys and values: less takes less time than to wake one

// Tokens' queries and one layer's cache: strides are in elements, and each head's numbers lie together.
struct Attention {
  int64_t batch, tokens, heads, kv_heads, size;     // size: of a head
  const void* q;
  int64_t q_stride[3];                              // of batch, head, token
  const void *keys, *values;                        // [batch, kv_heads, length, size]
  int64_t batch_stride, length;                     // batch_stride: of keys and of values
  int64_t position, window;                         // of the first token; keys that a token sees, itself among them
  float scale;
  void* y;                                          // [batch, tokens, heads, size]
  int threads;
  int64_t group() const { return heads / kv_heads; }
  int64_t last(int64_t token) const { return position + token + 1; }
  int64_t first(int64_t token) const { return std::max<int64_t>(0, last(token) - window); }
  int threads_for(int64_t bytes_of_number) const {
    const int64_t numbers = 2 * batch * kv_heads * (last(tokens - 1) - first(0)) * size * tokens;
    return int(std::clamp<int64_t>(numbers * bytes_of_number / CACHE_A_THREAD, 1, threads));
  }
};

// scores[g * KEYS + i] = q[g] . key[i] for the keys of a piece; q: [group, size] fp32.
template <class C>
inline void scores_of(const typename C::T* keys, int64_t n, const float* q, int64_t group, int64_t size, float* scores) {
  for (int64_t g0 = 0; g0 < group; g0 += QUERIES_AT_ONCE)
    for (int64_t i = 0; i < n; i += KEYS_AT_ONCE) {
      const typename C::T* rows[KEYS_AT_ONCE];
      const float* qs[QUERIES_AT_ONCE];
      // Past the last one the last one again: its sums are not used.
      for (int64_t j = 0; j < KEYS_AT_ONCE; j++) rows[j] = keys + std::min(i + j, n - 1) * size;
      for (int64_t g = 0; g < QUERIES_AT_ONCE; g++) qs[g] = q + std::min(g0 + g, group - 1) * size;
      vf sums[QUERIES_AT_ONCE][KEYS_AT_ONCE] = {};
      auto add = [&](auto&& key, auto&& query) {
        vf part[KEYS_AT_ONCE];
#pragma GCC unroll 16
        for (int j = 0; j < KEYS_AT_ONCE; j++) part[j] = key(rows[j]);
#pragma GCC unroll 16
        for (int g = 0; g < QUERIES_AT_ONCE; g++) {
          const vf of_query = query(qs[g]);
#pragma GCC unroll 16
          for (int j = 0; j < KEYS_AT_ONCE; j++) sums[g][j] += of_query * part[j];
        }
      };
      int64_t d = 0;
      for (; d + W <= size; d += W)
        add([&](const typename C::T* p) { return C::load(p + d); }, [&](const float* p) { return load(p + d); });
      if (d < size)
        add([&](const typename C::T* p) { return load_part<C>(p + d, size - d); },
            [&](const float* p) { return load_part<F32>(p + d, size - d); });
      for (int64_t g = 0; g < std::min(QUERIES_AT_ONCE, group - g0); g++) {
        float four[KEYS_AT_ONCE] = {};
        add_hsum4(sums[g], four);
        for (int64_t j = 0; j < std::min(KEYS_AT_ONCE, n - i); j++) scores[(g0 + g) * KEYS + i + j] = four[j];
      }
    }
}

// sums[g * room + d] = sum over i of weights[g * KEYS + i] * value[i][d]
template <class C>
inline void weigh(const typename C::T* values, int64_t n, const float* weights, int64_t group, int64_t size, float* sums,
                  int64_t room) {
  for (int64_t g0 = 0; g0 < group; g0 += QUERIES_AT_ONCE)
    for (int64_t d = 0; d < size; d += W) {
      const int64_t here = std::min<int64_t>(W, size - d), some = std::min(QUERIES_AT_ONCE, group - g0);
      vf acc[QUERIES_AT_ONCE] = {};
      auto add = [&](int64_t i, vf value) {
#pragma GCC unroll 16
        for (int g = 0; g < QUERIES_AT_ONCE; g++)
          acc[g] += splat(weights[std::min(g0 + g, group - 1) * KEYS + i]) * value;
      };
      if (here == W)
        for (int64_t i = 0; i < n; i++) add(i, C::load(values + i * size + d));
      else
        for (int64_t i = 0; i < n; i++) add(i, load_part<C>(values + i * size + d, here));
      for (int64_t g = 0; g < some; g++) store_part(sums + (g0 + g) * room + d, acc[g], here);
    }
}

// scores -> exp(score * scale - the largest), in place; returns {the largest, the sum}.
inline std::pair<float, float> exponentials(float* scores, int64_t n, float scale) {
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < n; i++) {
    scores[i] *= scale;
    most = scores[i] > most || std::isnan(scores[i]) ? scores[i] : most;  // a NaN stays
  }
  float sum = 0;
  for (int64_t i = 0; i < n; i += W) {
    const int64_t here = std::min<int64_t>(W, n - i);
    const vf e = exp_v(load_part<F32>(scores + i, here) - splat(most));
    store_part(scores + i, e, here);
  }
  for (int64_t i = 0; i < n; i++) sum += scores[i];
  return {most, sum};
}

// y = softmax(scale * q keys^T) values for each token, over the keys that it sees. E: of q and y, C: of the cache.
template <class E, class C>
void attend(const Attention& a) {
  const int64_t group = a.group(), size = a.size, room = size + 2;  // of a partial result: the sums, most, sum
  const int64_t begin = a.first(0) / KEYS, pieces = (a.last(a.tokens - 1) + KEYS - 1) / KEYS - begin;
  const int64_t lines = a.batch * a.tokens * a.kv_heads;
  Scratch& s = scratch();
  s.reserve(Scratch::bytes_for<float>(lines * pieces * group * room));
  float* partial = s.take<float>(lines * pieces * group * room);
  const int threads = a.threads_for(sizeof(typename C::T));
  auto of_line = [&](int64_t line) {  // kv heads of a token one after the other
    return std::tuple{line / (a.tokens * a.kv_heads), line / a.kv_heads % a.tokens, line % a.kv_heads};
  };
  by_pieces(lines * pieces, threads, [&](int64_t piece, int) {
    const auto [b, token, head] = of_line(piece / pieces);
    const int64_t k0 = std::max((begin + piece % pieces) * KEYS, a.first(token));
    const int64_t n = std::min((begin + piece % pieces + 1) * KEYS, a.last(token)) - k0;
    float* out = partial + piece * group * room;
    if (n <= 0) {
      for (int64_t g = 0; g < group; g++) out[g * room + size] = -std::numeric_limits<float>::infinity();
      return;
    }
    thread_local std::vector<float> mine;
    mine.resize(size_t(group * (size + KEYS)));
    float *q = mine.data(), *scores = q + group * size;
    for (int64_t g = 0; g < group; g++)
      widen<E>(static_cast<const typename E::T*>(a.q) + b * a.q_stride[0] + (head * group + g) * a.q_stride[1] +
                   token * a.q_stride[2],
               q + g * size, size);
    const int64_t at = b * a.batch_stride + (head * a.length + k0) * size;
    scores_of<C>(static_cast<const typename C::T*>(a.keys) + at, n, q, group, size, scores);
    for (int64_t g = 0; g < group; g++)
      std::tie(out[g * room + size], out[g * room + size + 1]) = exponentials(scores + g * KEYS, n, a.scale);
    weigh<C>(static_cast<const typename C::T*>(a.values) + at, n, scores, group, size, out, room);
  });
  for (int64_t line = 0; line < lines; line++) {
    const auto [b, token, head] = of_line(line);
    for (int64_t g = 0; g < group; g++) {
      const float* parts = partial + (line * pieces * group + g) * room;
      const int64_t step = group * room;
      float most = -std::numeric_limits<float>::infinity(), sum = 0;
      for (int64_t p = 0; p < pieces; p++)
        if (const float m = parts[p * step + size]; m > most || std::isnan(m)) most = m;
      typename E::T* y = static_cast<typename E::T*>(a.y) + ((b * a.tokens + token) * a.heads + head * group + g) * size;
      thread_local std::vector<float> joined;
      joined.assign(size_t(size), 0.0f);
      for (int64_t p = 0; p < pieces; p++) {
        if (std::isinf(parts[p * step + size]) && parts[p * step + size] < 0) continue;  // sees none of these keys
        const float factor = std::exp(parts[p * step + size] - most);
        sum += factor * parts[p * step + size + 1];
        for (int64_t d = 0; d < size; d++) joined[size_t(d)] += factor * parts[p * step + d];
      }
      for (int64_t d = 0; d < size; d++) y[d] = E::from_float(joined[size_t(d)] / sum);
    }
  }
}

}  // namespace
