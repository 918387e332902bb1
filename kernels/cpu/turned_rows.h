// Rows of a weight side by side in the lanes of a vector: bytes of several rows in one, turned round.
#pragma once

#include "linear.h"

namespace {

// Of W / 4 rows eight bytes or sixteen each, as V: bytes from `at` on of rows r, r + 4, r + 8 ..., zeros behind `size`.
template <class V>
inline V gather(const char* const* rows, int r, int64_t at, int64_t size) {
  constexpr int PARTS = sizeof(V) / 8 / (W / 4);  // of a row
  // In registers: what is written in parts and then read as a whole waits for the writes.
  const bool whole = at + 8 * PARTS <= size;
#if defined(__AVX512F__)
  if constexpr (PARTS == 2) if (whole) {
    auto of = [&](int i) INLINE { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4 * i] + at)); };
    __m512i out = _mm512_castsi128_si512(of(0));
    out = _mm512_inserti32x4(out, of(1), 1);
    out = _mm512_inserti32x4(out, of(2), 2);
    return reinterpret_cast<V>(_mm512_inserti32x4(out, of(3), 3));
  }
#endif
  V out = {};
#pragma GCC unroll 4
  for (int i = 0; i < W / 4; i++)
#pragma GCC unroll 2
    for (int part = 0; part < PARTS; part++) {
      const int64_t from = at + 8 * part;
      uint64_t bytes = 0;
      if (whole)
        std::memcpy(&bytes, rows[r + 4 * i] + from, 8);
      else if (from < size)
        std::memcpy(&bytes, rows[r + 4 * i] + from, size_t(std::min<int64_t>(8, size - from)));
      out[i * PARTS + part] = bytes;
    }
  return out;
}

// Four words of each of four vectors' rows as four vectors of one word of all W rows.
inline void turn(vi (&v)[4]) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  constexpr std::make_index_sequence<W> all{};
  vf f[4];
  for (int i = 0; i < 4; i++) f[i] = reinterpret_cast<vf>(v[i]);
  const vf a = interleave<false, 0>(f[0], f[1], all), b = interleave<false, 2>(f[0], f[1], all);
  const vf c = interleave<false, 0>(f[2], f[3], all), d = interleave<false, 2>(f[2], f[3], all);
  v[0] = reinterpret_cast<vi>(interleave<true, 0>(a, c, all)), v[1] = reinterpret_cast<vi>(interleave<true, 2>(a, c, all));
  v[2] = reinterpret_cast<vi>(interleave<true, 0>(b, d, all)), v[3] = reinterpret_cast<vi>(interleave<true, 2>(b, d, all));
#else
  vi to[4];
  for (int i = 0; i < 4; i++)
    for (int r = 0; r < W; r++) to[i][r] = v[r % 4][r / 4 * 4 + i];
  std::copy(to, to + 4, v);
#endif
}

}  // namespace
