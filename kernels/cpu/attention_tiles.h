// Attention of many tokens over a cache: queries that share keys lie side by side in the lanes of a vector, so that keys and
// values are read where they lie, a number for all lanes at once, and nothing is summed up across lanes. Softmax goes block
// by block of keys (FlashAttention, arXiv 2205.14135). Blocks begin at the same keys for every token and no lane sees
// another: a token's bits depend neither on the number of threads nor on the other tokens.
#pragma once

#include "attention.h"

namespace {

constexpr int ROW_VECTORS = 2;                  // of queries, in a tile
constexpr int64_t TILE_QUERIES = ROW_VECTORS * W;
constexpr int NUMBERS = W == 16 ? 8 : 4;        // of keys or values times those vectors: sums that stay in registers

// out[j] = out[j] * factor + sum over i of numbers[j * j_step + i * i_step] * vectors[i], j < n, i < terms; rows of
// TILE_QUERIES. factor: null for 0
inline void add_products(const float* numbers, int64_t j_step, int64_t i_step, int64_t n, int64_t terms, const float* vectors,
                         const vf* factor, float* out) {
  auto tile = [&]<int N>(int64_t j) {
    vf sums[N][ROW_VECTORS];
#pragma GCC unroll 16
    for (int k = 0; k < N; k++)
#pragma GCC unroll 16
      for (int v = 0; v < ROW_VECTORS; v++)
        sums[k][v] = factor ? load(out + (j + k) * TILE_QUERIES + v * W) * factor[v] : vf{};
    const float* from = numbers + j * j_step;
    for (int64_t i = 0; i < terms; i++, from += i_step) {
      vf rows[ROW_VECTORS];
#pragma GCC unroll 16
      for (int v = 0; v < ROW_VECTORS; v++) rows[v] = load(vectors + i * TILE_QUERIES + v * W);
#pragma GCC unroll 16
      for (int k = 0; k < N; k++) {
        const vf number = splat(from[k * j_step]);
#pragma GCC unroll 16
        for (int v = 0; v < ROW_VECTORS; v++) sums[k][v] += number * rows[v];
      }
    }
#pragma GCC unroll 16
    for (int k = 0; k < N; k++)
#pragma GCC unroll 16
      for (int v = 0; v < ROW_VECTORS; v++) store(out + (j + k) * TILE_QUERIES + v * W, sums[k][v]);
  };
  int64_t j = 0;
  for (; j + NUMBERS <= n; j += NUMBERS) tile.template operator()<NUMBERS>(j);
  for (; j < n; j++) tile.template operator()<1>(j);
}

// What a thread needs for a tile.
struct QueryTile {
  float *queries, *sums;  // [size, TILE_QUERIES]
  float* scores;          // [KEYS, TILE_QUERIES]
  float* wide;            // [KEYS, size]: of a cache that is not fp32
  static size_t bytes(int64_t size) {
    return 2 * Scratch::bytes_for<float>(size * TILE_QUERIES) + Scratch::bytes_for<float>(KEYS * TILE_QUERIES) +
           Scratch::bytes_for<float>(KEYS * size);
  }
  QueryTile(Scratch& s, int64_t size)
      : queries(s.take<float>(size * TILE_QUERIES)),
        sums(s.take<float>(size * TILE_QUERIES)),
        scores(s.take<float>(KEYS * TILE_QUERIES)),
        wide(s.take<float>(KEYS * size)) {}
};

// Scores of n keys from k0 on -> weights, in place. first, last: keys that each lane sees, [first, last). most, total: the
// largest score so far and the sum of all weights; returns by what earlier weights are too large.
inline void weights_of(float* scores, int64_t k0, int64_t n, bool masked, const vi* first, const vi* last, vf* most, vf* total,
                       vf* factor) {
  const vf least = splat(-std::numeric_limits<float>::infinity());
  for (int v = 0; v < ROW_VECTORS; v++) {
    vf now = most[v];
    for (int64_t i = 0; i < n; i++) {
      float* at = scores + i * TILE_QUERIES + v * W;
      vf score = load(at);
      if (masked) {
        const vi key = vi{} + int32_t(k0 + i);
        score = select((key >= first[v]) & (key < last[v]), score, least);
        store(at, score);
      }
      now = select((score > now) | (score != score), score, now);  // a NaN stays
    }
    const vf base = select(now == least, vf{}, now);  // of a lane that has seen no key yet
    vf sum = {};
    for (int64_t i = 0; i < n; i++) {
      float* at = scores + i * TILE_QUERIES + v * W;
      const vf score = load(at), weight = select(score == least, vf{}, exp_v(score - base));
      store(at, weight);
      sum += weight;
    }
    factor[v] = exp_v(most[v] - base);
    total[v] = total[v] * factor[v] + sum;
    most[v] = now;
  }
}

// As `attend`, of many tokens: each key and value is read once for a tile of queries.
template <class E, class C>
void attend_tiles(const Attention& a) {
  const int64_t group = a.group(), size = a.size, rows = a.tokens * group, tiles = (rows + TILE_QUERIES - 1) / TILE_QUERIES;
  const int threads = a.threads_for(sizeof(typename C::T));
  Scratch& s = scratch();
  s.reserve(size_t(threads) * QueryTile::bytes(size));
  std::vector<QueryTile> locals;
  for (int t = 0; t < threads; t++) locals.emplace_back(s, size);
  const int64_t heads = a.batch * a.kv_heads;
  by_pieces(heads * tiles, threads, [&](int64_t piece, int slot) {
    const QueryTile& tile = locals[size_t(slot)];
    const int64_t b = piece % heads / a.kv_heads, head = piece % a.kv_heads;
    const int64_t row0 = (tiles - 1 - piece / heads) * TILE_QUERIES;  // what sees most keys first: threads end together
    auto token_of = [&](int64_t lane) { return std::min(row0 + lane, rows - 1) / group; };  // past the end the last one
    auto query_of = [&](int64_t lane) { return head * group + std::min(row0 + lane, rows - 1) % group; };
    vi first[ROW_VECTORS], last[ROW_VECTORS];
    vf most[ROW_VECTORS], total[ROW_VECTORS] = {};
    for (int64_t lane = 0; lane < TILE_QUERIES; lane++) {
      const auto* q = static_cast<const typename E::T*>(a.q) + b * a.q_stride[0] + query_of(lane) * a.q_stride[1] +
                      token_of(lane) * a.q_stride[2];
      for (int64_t d = 0; d < size; d++) tile.queries[d * TILE_QUERIES + lane] = E::to_float(q[d]) * a.scale;
      first[lane / W][lane % W] = int32_t(a.first(token_of(lane)));
      last[lane / W][lane % W] = int32_t(a.last(token_of(lane)));
    }
    for (vf& m : most) m = splat(-std::numeric_limits<float>::infinity());
    std::fill(tile.sums, tile.sums + size * TILE_QUERIES, 0.0f);
    const int64_t end = a.last(token_of(TILE_QUERIES - 1));
    for (int64_t k0 = a.first(token_of(0)) / KEYS * KEYS; k0 < end; k0 += KEYS) {
      const int64_t n = std::min(KEYS, end - k0), at = b * a.batch_stride + (head * a.length + k0) * size;
      auto floats = [&](const void* cache) -> const float* {
        const auto* from = static_cast<const typename C::T*>(cache) + at;
        if constexpr (std::is_same_v<C, F32>) return from;
        widen<C>(from, tile.wide, n * size);
        return tile.wide;
      };
      vf factor[ROW_VECTORS];
      add_products(floats(a.keys), size, 1, n, size, tile.queries, nullptr, tile.scores);
      const bool masked = k0 + n > a.last(token_of(0)) || k0 < a.first(token_of(TILE_QUERIES - 1));
      weights_of(tile.scores, k0, n, masked, first, last, most, total, factor);
      add_products(floats(a.values), 1, size, size, n, tile.scores, factor, tile.sums);
    }
    for (int64_t lane = 0; lane < std::min(TILE_QUERIES, rows - row0); lane++) {
      auto* y = static_cast<typename E::T*>(a.y) + ((b * a.tokens + token_of(lane)) * a.heads + query_of(lane)) * size;
      const float sum = total[lane / W][lane % W];
      for (int64_t d = 0; d < size; d++) y[d] = E::from_float(tile.sums[d * TILE_QUERIES + lane] / sum);
    }
  });
}

}  // namespace
