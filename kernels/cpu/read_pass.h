// Reads memory and computes next to nothing: the speed that a kernel over the same weights could reach.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"

namespace {

constexpr int STREAMS = 4;  // read side by side by each thread: one alone reached 76 % of it on Zen 4

struct Piece {
  const char* data;
  int64_t bytes;
};

// XOR of n vectors from p on; the streams are a fixed distance apart.
inline uint64_t fold(const char* p, int64_t bytes) {
  typedef uint64_t V __attribute__((vector_size(64)));
  const int64_t each = bytes / STREAMS / int64_t(sizeof(V)) * int64_t(sizeof(V));
  V sum[STREAMS] = {};
  for (int64_t i = 0; i < each; i += sizeof(V))
    for (int s = 0; s < STREAMS; s++) {
      V v;
      std::memcpy(&v, p + s * each + i, sizeof(V));
      sum[s] ^= v;
    }
  uint64_t all = 0;
  for (const V& v : sum)
    for (int k = 0; k < 8; k++) all ^= v[k];
  for (int64_t i = STREAMS * each; i < bytes; i++) all ^= uint8_t(p[i]);
  return all;
}

constexpr int64_t PASS = 1 << 20;  // bytes that a thread takes at a time

inline uint64_t read_pass(const std::vector<Piece>& pieces, int threads) {
  std::vector<Piece> passes;
  for (const Piece& piece : pieces)
    for (int64_t from = 0; from < piece.bytes; from += PASS)
      passes.push_back({piece.data + from, std::min(PASS, piece.bytes - from)});
  std::atomic<uint64_t> all{0};
  by_pieces(int64_t(passes.size()), threads, [&](int64_t i, int) {
    all.fetch_xor(fold(passes[size_t(i)].data, passes[size_t(i)].bytes), std::memory_order_relaxed);
  });
  return all;
}

}  // namespace
