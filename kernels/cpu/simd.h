// Vectors of fp32 for whatever ISA this file is compiled for.
// GCC/Clang vector extensions throughout: the same source builds for x86-64, AVX2, AVX-512 and aarch64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// An anonymous namespace: objects for several ISAs may live in one process, and must not share inline functions.
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_mem __attribute__((vector_size(W * 4), aligned(2), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));

inline vf splat(float s) { return vf{} + s; }
inline vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
inline vf splat_word(const float* p) {  // whatever the word holds: no arithmetic touches it
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return reinterpret_cast<vf>(vi{} + bits);
}

inline float hsum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float lane[W];
  std::memcpy(lane, &v, sizeof v);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
#endif
}

inline int32_t hsum(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v));
#else
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
#endif
}

// out[0..4) += the sums of four vectors, of floats or of integers: thirteen instructions where four hsums take forty.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
// Takes elements (i, W + i) or (i, i + 1, W + i, W + i + 1) of each group of four: P is the first, STEP the pair's shape.
template <bool PAIRS, int P, class V, size_t... I>
inline V interleave(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(PAIRS ? I / 4 * 4 + P + I % 2 + (I % 4 / 2) * W
                                                 : I / 4 * 4 + P + I % 4 / 2 + (I % 2) * W)...);
}

template <class V, class T>
inline void add_hsum4(const V* v, T* out) {
  constexpr std::make_index_sequence<W> all{};
  const V ab = interleave<false, 0>(v[0], v[1], all) + interleave<false, 2>(v[0], v[1], all);
  const V cd = interleave<false, 0>(v[2], v[3], all) + interleave<false, 2>(v[2], v[3], all);
  const V abcd = interleave<true, 0>(ab, cd, all) + interleave<true, 2>(ab, cd, all);
  typedef T four __attribute__((vector_size(16)));
  four groups[W / 4], sums;
  std::memcpy(groups, &abcd, sizeof abcd);
  std::memcpy(&sums, out, sizeof sums);
  for (const four& group : groups) sums += group;
  std::memcpy(out, &sums, sizeof sums);
}
#else
template <class V, class T>
inline void add_hsum4(const V* v, T* out) {
  for (int i = 0; i < 4; i++) out[i] += hsum(v[i]);
}
#endif

// Keeps a vector that several products use in a register: GCC would load it again from memory for each of them.
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(v) asm("" : "+v"(v))
#else
#define KEEP_IN_REGISTER(v)
#endif

}  // namespace
