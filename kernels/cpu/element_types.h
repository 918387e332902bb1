// Element types: T as stored, load() W of them as fp32, from_float() rounds to nearest even.
// Stream: the type as long rows of it are read, PARTS vectors at a time in the order that costs least (see `place`).
// Operand: the type that many tokens' products take, itself where the CPU multiplies it. Operands lie in words of 32
// bits, PER_WORD to each: multiply_add adds the products of all that are in a word to one fp32 sum.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace {

struct F32 {
  using T = float;
  using Stream = F32;
  using Operand = F32;
  static constexpr int PARTS = 1, PER_WORD = 1;
  static vf load(const T* p) { return ::load(p); }
  static void load_parts(const T* p, vf* out) { out[0] = load(p); }
  static float to_float(T v) { return v; }
  static T from_float(float v) { return v; }
  static vf multiply_add(vf sum, vf a, vf b) { return sum + a * b; }
};

struct PairedBF16;

struct BF16 {
  using T = uint16_t;
  using Stream = PairedBF16;
  static constexpr int PARTS = 1;
#if defined(__AVX512BF16__)
  using Operand = BF16;
  static constexpr int PER_WORD = 2;
  static vf multiply_add(vf sum, vf a, vf b) {
    return reinterpret_cast<vf>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
#else
  using Operand = F32;
#endif
  static vf load(const T* p) {
    return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu) << 16);
  }
  static void load_parts(const T* p, vf* out) { out[0] = load(p); }
  static float to_float(T v) {
    uint32_t bits = uint32_t(v) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
  static T from_float(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return T((bits >> 16) | 0x40);  // NaN stays NaN
    return T((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
};

// bf16 in twos: a shift and a mask widen the even and the odd elements of 2 W, where widening in order takes a
// shuffle for each W.
struct PairedBF16 : BF16 {
  static constexpr int PARTS = 2;
  static void load_parts(const T* p, vf* out) {
    const vu pairs = *reinterpret_cast<const vu_mem*>(p);
    const bool little = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
    out[little ? 0 : 1] = reinterpret_cast<vf>(pairs << 16);
    out[little ? 1 : 0] = reinterpret_cast<vf>(pairs & 0xffff0000u);
  }
};

// fp16 by integer arithmetic: the exponent is moved by a multiplication, so that subnormals come out right as well.
inline vf widen_half(vu h) {
  const vf scale = splat(0x1p112f);
  vf magnitude = reinterpret_cast<vf>((h & 0x7fff) << 13) * scale;
  vu bits = reinterpret_cast<vu>(magnitude);
  vu is_special = reinterpret_cast<vu>((h & 0x7c00) == 0x7c00);  // Inf and NaN: all exponent bits set
  bits |= is_special & 0x7f800000;
  return reinterpret_cast<vf>(bits | ((h & 0x8000) << 16));
}

struct F16 {
  using T = uint16_t;
  using Stream = F16;
  using Operand = F32;
  static constexpr int PARTS = 1;
  static vf load(const T* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    return widen_half(__builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu));
#endif
  }
  static void load_parts(const T* p, vf* out) { out[0] = load(p); }
  static float to_float(T v) { return widen_half(vu{} + v)[0]; }
  static T from_float(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return T(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return T(sign | 0x7c00);  // rounds to 65536 or more
    if (magnitude < 0x38800000) {                          // subnormal: let one fp32 addition do the rounding
      float shifted;
      std::memcpy(&shifted, &magnitude, 4);
      shifted += 0.5f;
      uint32_t s;
      std::memcpy(&s, &shifted, 4);
      return T(sign | (s - 0x3f000000));
    }
    return T(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
  }
};

// Codes of a weight, without their scale.
struct I8 {
  using T = int8_t;
  using Stream = I8;
  using Operand = F32;
  static constexpr int PARTS = 1;
  static vf load(const T* p) {
#if defined(__AVX512F__)
    const vi wide = reinterpret_cast<vi>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    const vi wide = reinterpret_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    typedef T codes __attribute__((vector_size(W), aligned(1), may_alias));
    const vi wide = __builtin_convertvector(*reinterpret_cast<const codes*>(p), vi);
#endif
    return __builtin_convertvector(wide, vf);
  }
  static void load_parts(const T* p, vf* out) { out[0] = load(p); }
  static float to_float(T v) { return v; }
};

// 4-bit codes, two a byte; what reads them is in nibble_rows.h.
struct I4 {
  using T = uint8_t;
  using Stream = I4;
  using Operand = F32;
  static constexpr int PARTS = 1;
};

template <class Q>
constexpr bool IN_CODES = std::is_same_v<Q, I8> || std::is_same_v<Q, I4>;

// The last n < W elements of a row, zeros behind them: never reads past the end of a tensor.
template <class E>
inline vf load_part(const typename E::T* p, int64_t n) {
  typename E::T buffer[W] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(buffer[0]));
  return E::load(buffer);
}

// Elements that load_parts takes, and where it leaves element i of a row among them.
template <class E>
constexpr int64_t STEP = E::PARTS * W;
template <class E>
inline int64_t place(int64_t i) {
  return i / STEP<E> * STEP<E> + i % E::PARTS * W + i % STEP<E> / E::PARTS;
}

// As load_parts of the last n < STEP elements of a row, zeros behind them.
template <class E>
inline void load_last_parts(const typename E::T* p, int64_t n, vf* out) {
  typename E::T buffer[STEP<E>] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(buffer[0]));
  E::load_parts(buffer, out);
}

inline void store_part(float* p, vf v, int64_t n) {
  if (n == W) return store(p, v);  // no call for a whole one
  std::memcpy(p, &v, size_t(n) * 4);
}

template <class E>
inline void widen(const typename E::T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, E::load(from + i));
  if (i < n) store_part(to + i, load_part<E>(from + i, n - i), n - i);
}

template <class O>
constexpr int64_t words(int64_t elements) {
  return (elements + O::PER_WORD - 1) / O::PER_WORD;
}

// n elements as operands O, zeros behind them up to `size` words.
template <class E, class O>
inline void lay(const typename E::T* from, float* to, int64_t n, int64_t size) {
  std::fill(to + n / O::PER_WORD, to + size, 0.0f);
  if constexpr (std::is_same_v<O, F32>)
    widen<E>(from, to, n);
  else if constexpr (std::is_same_v<E, F32>)
    for (int64_t i = 0; i < n; i++) reinterpret_cast<typename O::T*>(to)[i] = O::from_float(from[i]);
  else
    std::memcpy(to, from, size_t(n) * sizeof(from[0]));
}

// Element i of those.
template <class E, class O>
inline void put(const typename E::T* from, float* to, int64_t i) {
  reinterpret_cast<typename O::T*>(to)[i] = O::from_float(E::to_float(*from));
}

// Words of a[i] and b[i] in pairs, 0 for b[i] where b is null; zeros behind them up to `size` words. What lies `ahead`
// of the elements is asked for.
template <class O>
inline void lay_pairs(const typename O::T* a, const typename O::T* b, float* to, int64_t n, int64_t size,
                      int64_t ahead) {
  const vu keep = vu{} - (b ? 1 : 0);
  auto pair = [&](vf first, vf second) {
    return reinterpret_cast<vf>(reinterpret_cast<vu>(first) >> 16 | (reinterpret_cast<vu>(second) & keep));
  };
  if (!b) b = a;
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    if (i % 32 == 0) {  // once a line
      __builtin_prefetch(a + i + ahead, 0, 2);
      __builtin_prefetch(b + i + ahead, 0, 2);
    }
    store(to + i, pair(O::load(a + i), O::load(b + i)));
  }
  if (i < n) store_part(to + i, pair(load_part<O>(a + i, n - i), load_part<O>(b + i, n - i)), n - i);
  std::fill(to + n, to + size, 0.0f);
}

}  // namespace
