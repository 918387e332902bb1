// x as int8 in blocks of 32, and products of bytes: integer sums within a block, exact on every machine.
#pragma once

#include "problem.h"

namespace {

constexpr int64_t BLOCK = 32;  // inputs that share a scale
constexpr int64_t VB = W * 4;  // bytes of a vector
typedef int8_t vb __attribute__((vector_size(VB)));
typedef int8_t vb_mem __attribute__((vector_size(VB), aligned(1), may_alias));
typedef int8_t narrow __attribute__((vector_size(W)));  // a byte for each lane
typedef int16_t vs __attribute__((vector_size(VB)));
typedef int32_t vi_mem __attribute__((vector_size(VB), aligned(4), may_alias));

inline vb load_bytes(const void* p) { return *reinterpret_cast<const vb_mem*>(p); }

// The last n < VB bytes of a row, zeros behind them.
inline vb load_last_bytes(const void* p, int64_t n) {
#if defined(__AVX512BW__)
  return reinterpret_cast<vb>(_mm512_maskz_loadu_epi8((uint64_t(1) << n) - 1, p));
#else
  char bytes[VB] = {};
  std::memcpy(bytes, p, size_t(n));
  return load_bytes(bytes);
#endif
}

// sum + four products of bytes in each lane, exactly. Signed weights: any byte; others: 0 to 15. x is in [-127, 127].
// Where bytes are multiplied as unsigned ones, a signed weight is stored as `raised` has it, ADDED more than it is.
#if defined(__AVX512VNNI__)
template <bool SIGNED>
constexpr int ADDED = SIGNED ? 128 : 0;
template <bool SIGNED>
inline vb raised(vb w) {
  return SIGNED ? w ^ int8_t(-128) : w;
}
template <bool SIGNED>
inline vi add_products(vi sum, vb w, vb x) {
  return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(w),
                                                  reinterpret_cast<__m512i>(x)));
}
#else
template <bool SIGNED>
constexpr int ADDED = 0;
template <bool SIGNED>
inline vb raised(vb w) {
  return w;
}
template <bool SIGNED>
inline vi add_products(vi sum, vb w, vb x) {
#if defined(__AVX512BW__)
  auto a = reinterpret_cast<__m512i>(w), b = reinterpret_cast<__m512i>(x);
  if (SIGNED) b = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b), a = _mm512_abs_epi8(a);
  return sum + reinterpret_cast<vi>(_mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
  auto a = reinterpret_cast<__m256i>(w), b = reinterpret_cast<__m256i>(x);
  if (SIGNED) b = _mm256_sign_epi8(b, a), a = _mm256_abs_epi8(a);
  return sum + reinterpret_cast<vi>(_mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#else
  // Two products fit in 16 bits: 2 * 128 * 127 < 2^15.
  const vs a = reinterpret_cast<vs>(w), b = reinterpret_cast<vs>(x);
  const vi pairs = reinterpret_cast<vi>((a << 8 >> 8) * (b << 8 >> 8) + (a >> 8) * (b >> 8));
  return sum + (pairs << 16 >> 16) + (pairs >> 16);
#endif
}
#endif

// Two vectors of weights that are 0 to 15: four products of a block fit in 16 bits, 4 * 15 * 127 < 2^15, so that one
// instruction of AVX2 adds the pairs of both, and multiplies them.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && (defined(__AVX512BW__) || !defined(__AVX512F__))
#define SUMS_IN_16_BITS
#if defined(__AVX512BW__)
typedef __m512i vbits;
#define OF_BYTES(name) _mm512_##name
#else
typedef __m256i vbits;
#define OF_BYTES(name) _mm256_##name
#endif
inline vs four_products(vb low, vb x_low, vb high, vb x_high) {
  const vbits lows = OF_BYTES(maddubs_epi16)(reinterpret_cast<vbits>(low), reinterpret_cast<vbits>(x_low));
  const vbits highs = OF_BYTES(maddubs_epi16)(reinterpret_cast<vbits>(high), reinterpret_cast<vbits>(x_high));
  return reinterpret_cast<vs>(lows) + reinterpret_cast<vs>(highs);
}
// Both products of 16 bits of each lane, added.
inline vi pairs_of(vs a, vbits b) { return reinterpret_cast<vi>(OF_BYTES(madd_epi16)(reinterpret_cast<vbits>(a), b)); }
#endif

// sum + eight products of bytes in each lane, exactly.
inline vi add_products_of_nibbles(vi sum, vb low, vb x_low, vb high, vb x_high) {
#if defined(SUMS_IN_16_BITS)
  return sum + pairs_of(four_products(low, x_low, high, x_high), OF_BYTES(set1_epi16)(1));
#else
  return add_products<false>(add_products<false>(sum, low, x_low), high, x_high);
#endif
}

// A multiplier for each block of a vector of 4-bit codes.
#if defined(__AVX512F__)
typedef uint32_t Multipliers;
#elif defined(__AVX2__)
typedef uint16_t Multipliers;
#else
typedef uint8_t Multipliers;
#endif
static_assert(sizeof(Multipliers) == VB / (BLOCK / 2));
constexpr Multipliers ONES = Multipliers(0x01010101);  // of codes that have none

// start_of_nibbles: what takes off that codes are stored 8 higher. add_nibbles: sum + what a vector of codes adds to each
// lane, times the multiplier of its block, exactly.
#if defined(SUMS_IN_16_BITS)
inline vbits spread_multipliers(Multipliers m) {
#if defined(__AVX512BW__)
  const __m256i low = _mm256_set_m128i(_mm_set1_epi16(int16_t(0x8001)), _mm_set1_epi16(int16_t(0x8000)));
  const __m512i lanes = _mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_add_epi16(low, _mm256_set1_epi16(2)), 1);
  return _mm512_shuffle_epi8(_mm512_set1_epi32(int32_t(m)), lanes);
#else
  const __m256i lanes = _mm256_set_m128i(_mm_set1_epi16(int16_t(0x8001)), _mm_set1_epi16(int16_t(0x8000)));
  return _mm256_shuffle_epi8(_mm256_set1_epi16(int16_t(m)), lanes);
#endif
}
inline vb start_of_nibbles(vb x_low, vb x_high) {
  const vb ones = vb{} + int8_t(1);
  return reinterpret_cast<vb>(four_products(ones, x_low, ones, x_high) * int16_t(-8));
}
inline vi add_nibbles(vi sum, vb start, vb pairs, vb x_low, vb x_high, Multipliers m) {
  const vb low = pairs & int8_t(15), high = reinterpret_cast<vb>(reinterpret_cast<vs>(pairs) >> 4) & int8_t(15);
  const vs products = four_products(low, x_low, high, x_high) + reinterpret_cast<vs>(start);
  return sum + pairs_of(products, spread_multipliers(m));
}
#else
inline vi spread_multipliers(Multipliers m) {
#if defined(__AVX512BW__)
  // A byte of the four that each 128 bits hold, zeros in the other three of its lane.
  const __m512i lanes = _mm512_add_epi32(
      _mm512_set1_epi32(int32_t(0x80808000)), _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0));
  return reinterpret_cast<vi>(_mm512_shuffle_epi8(_mm512_set1_epi32(int32_t(m)), lanes));
#elif defined(__AVX512F__)
  const __m128i lanes = _mm_set_epi8(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_cvtsi32_si128(int32_t(m)), lanes)));
#else
  return vi{} + int32_t(m);
#endif
}
// sum + values * factors, of values that fit in 16 bits and factors that are not negative and fit too
inline vi add_times(vi sum, vi values, vi factors) {
#if defined(__AVX512VNNI__)
  // The upper half of a lane, which is the value's sign, is times 0.
  return reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(values),
                                                  reinterpret_cast<__m512i>(factors)));
#else
  return sum + values * factors;
#endif
}
inline vb start_of_nibbles(vb x_low, vb x_high) {
  const vb ones = vb{} + int8_t(1);
  return reinterpret_cast<vb>(add_products<false>(add_products<false>(vi{}, ones, x_low), ones, x_high) * -8);
}
inline vi add_nibbles(vi sum, vb start, vb pairs, vb x_low, vb x_high, Multipliers m) {
  const vb low = pairs & int8_t(15), high = reinterpret_cast<vb>(reinterpret_cast<vs>(pairs) >> 4) & int8_t(15);
  const vi products = add_products_of_nibbles(reinterpret_cast<vi>(start), low, x_low, high, x_high);
  return add_times(sum, products, spread_multipliers(m));  // 8 * 8 * 127 < 2^15
}
#endif

// To the nearest integer, a tie to the even one.
inline vi nearest(vf v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(v)));
#elif defined(__SSE2__)
  return reinterpret_cast<vi>(_mm_cvtps_epi32(reinterpret_cast<__m128>(v)));
#else
  vi out;
  for (int i = 0; i < W; i++) out[i] = int32_t(std::rint(v[i]));
  return out;
#endif
}

inline int32_t most_of(vi v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v));
#else
  int32_t lanes[W];
  std::memcpy(lanes, &v, sizeof v);
  return *std::max_element(lanes, lanes + W);
#endif
}

// n values of a block, zeros behind them, as int8 in [-127, 127]; put(i, codes) takes W from the i-th on. NaN and Inf
// stay in the scale that is returned: the codes of such a block are 0.
template <class E, class Put>
inline float quantise_block(const typename E::T* x, int64_t n, Put&& put) {
  vf values[BLOCK / W];
  vi most = {};  // sizes of floats are ordered as their bits are, NaN above all
  for (int64_t i = 0; i < BLOCK; i += W) {
    values[i / W] = i + W <= n ? E::load(x + i) : i < n ? load_part<E>(x + i, n - i) : vf{};
    const vi size = reinterpret_cast<vi>(values[i / W]) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const int32_t bits = most_of(most);
  float size;
  std::memcpy(&size, &bits, 4);
  const float scale = size / 127;
  const bool usable = scale >= 0x1p-126f && scale <= 0x1.fffffep127f;
  const vf inverse = splat(usable ? 1 / scale : 0.0f);
  for (int64_t i = 0; i < BLOCK; i += W) {
    const vi rounded = usable ? nearest(values[i / W] * inverse) : vi{};
    put(i, __builtin_convertvector(rounded, narrow));
  }
  return scale;
}

// The n values of a block, as what their codes stand for.
inline void round_block(float* x, int64_t n) {
  float codes[BLOCK];
  const float scale = quantise_block<F32>(x, n, [&](int64_t i, narrow c) { store(codes + i, __builtin_convertvector(c, vf)); });
  for (int64_t i = 0; i < n; i++) x[i] = scale * codes[i];
}

// The same for units of listed neurons, in ascending order: a block is 32 neurons, whichever of them are listed.
inline void round_units(const int32_t* neurons, int64_t n, float* h) {
  for (int64_t i = 0, end = 0; i < n; i = end) {
    while (end < n && neurons[end] / BLOCK == neurons[i] / BLOCK) end++;
    round_block(h + i, end - i);
  }
}

// Tokens as vectors of codes, PARTS at a time, each lane's start of the sum, and the scale of each lane's block.
template <int PARTS>
struct Inputs {
  static constexpr int64_t CHUNK = (PARTS + 2) * VB;  // bytes
  char* data;
  int64_t chunks, blocks;
  float* sums;  // [tokens, sums_stride()]: of each block, scaled, where there are two parts
  int64_t sums_stride() const { return round_up(blocks, W); }
  size_t bytes(int64_t tokens) const {
    return Scratch::bytes_for<char>(tokens * chunks * CHUNK) + Scratch::bytes_for<float>(tokens * sums_stride());
  }
  void reserve(int64_t tokens) {
    data = scratch().take<char>(tokens * chunks * CHUNK);
    sums = scratch().take<float>(tokens * sums_stride());
  }
  const char* row(int64_t token) const { return data + token * chunks * CHUNK; }
  const float* sums_of(const char* row) const { return sums + (row - data) / (chunks * CHUNK) * sums_stride(); }

  // n values; `start` times the sum of a lane's codes is what its sum begins with.
  template <class E>
  void lay(int64_t token, const typename E::T* from, int64_t n, int start) const {
    if (chunks == 0) return;
    char* to = data + token * chunks * CHUNK;
    std::memset(to + (chunks - 1) * CHUNK, 0, size_t(CHUNK));
    std::fill(sums + token * sums_stride(), sums + (token + 1) * sums_stride(), 0.0f);
    // Blocks lie one after the other; with two parts, the first halves of all of a chunk before the second ones.
    constexpr int64_t LANES = std::min(8 / PARTS, W);  // of a block in one vector
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t lane = b * (8 / PARTS);
      const float scale = quantise_block<E>(from + b * BLOCK, n - b * BLOCK, [&](int64_t i, narrow codes) {
        const int64_t at = 4 * lane + i % (BLOCK / PARTS);
        std::memcpy(to + at / VB * CHUNK + i / (BLOCK / PARTS) * VB + at % VB, &codes, W);
      });
      float scales[LANES];
      std::fill(scales, scales + LANES, scale);
      for (int64_t i = lane; i < lane + 8 / PARTS; i += LANES)
        std::memcpy(to + i / W * CHUNK + (PARTS + 1) * VB + i % W * 4, scales, sizeof scales);
    }
    for (int64_t c = 0; c < chunks; c++, to += CHUNK) {
      vi sum = {};
      for (int part = 0; part < PARTS; part++) sum = add_products<false>(sum, vb{} + int8_t(1), load_bytes(to + part * VB));
      const vi begin = sum * start;
      std::memcpy(to + PARTS * VB, &begin, VB);
      if (PARTS == 2) keep_sums(sum, load(reinterpret_cast<const float*>(to + 3 * VB)), sums + token * sums_stride(), c);
    }
  }

  // Of the blocks of chunk c, which have four lanes each.
  static void keep_sums(vi sum, vf scale, float* to, int64_t c) {
    for (int64_t b = 0; b < W / 4; b++) {
      const int32_t total = sum[4 * b] + sum[4 * b + 1] + sum[4 * b + 2] + sum[4 * b + 3];
      to[c * (W / 4) + b] = scale[4 * b] * float(total);
    }
  }
};

}  // namespace
