// Reads memory and computes next to nothing: the speed that a kernel over the same weights could reach.
#pragma once

#include <cstdint>
#include <cstring>

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

// Every thread reads its share of each piece, one piece after the other; nobody waits before the end.
inline uint64_t read_pass(const std::vector<Piece>& pieces, int threads) {
  uint64_t all = 0;
#pragma omp parallel num_threads(threads) reduction(^ : all)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    for (const Piece& piece : pieces) {
      const int64_t from = piece.bytes * i / n, to = piece.bytes * (i + 1) / n;
      all ^= fold(piece.data + from, to - from);
    }
  }
  return all;
}

}  // namespace
