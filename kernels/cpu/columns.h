// Sums of neurons' columns of down, which lie as rows of 4-bit codes, each times a number of its own.
#pragma once

#include "proxy.h"

namespace {

// What one neuron adds: factor times multiplier of its block times code, to each output.
struct Column {
  const char* codes;
  const uint8_t* multipliers;
  float factor;  // the hidden unit times the row's scale
};

constexpr int IN_A_LANE = 4;           // columns whose codes lie side by side in a lane
constexpr int64_t MOST_COLUMNS = 128;  // integer sums of these fit in 32 bits
constexpr int64_t MOST_BLOCKS = 64;    // whose factors are kept
constexpr int64_t LINE_BLOCKS = 4;     // in a cache line

// A whole number of IN_A_LANE.
struct Columns {
  Column at[MOST_COLUMNS];
  int64_t count = 0;
  void add(const Plane& p, int64_t row, float h) {
    at[count++] = {p.codes.data + row * p.codes.stride, p.multipliers + row * p.blocks(), h * p.scales[row]};
  }
  void fill() {
    for (; count % IN_A_LANE; count++) at[count] = at[count - 1], at[count].factor = 0.0f;
  }
};

// Asks for bytes [from, to) of columns, one after the other: a few lines each time, for in a burst each waits for the last.
class Ahead {
 public:
  Ahead(const Columns& columns, int64_t from, int64_t to) : columns_(columns), from_(from), to_(to), byte_(from) {}
  void ask() {
    for (int i = 0; i < LINES && column_ < columns_.count; i++) {
      __builtin_prefetch(columns_.at[column_].codes + byte_, 0, 3);
      byte_ += 64;
      if (byte_ >= to_) byte_ = from_, column_++;
    }
  }

 private:
  static constexpr int LINES = 4;
  const Columns& columns_;
  int64_t from_, to_, byte_, column_ = 0;
};

// W bytes, each in a lane.
inline vi widen_bytes(const void* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  typedef uint8_t bytes __attribute__((vector_size(W), aligned(1), may_alias));
  return __builtin_convertvector(*static_cast<const bytes*>(p), vi);
#endif
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
// In integers: factors times multipliers as fixed-point numbers of four signed bytes each, so that products of bytes are
// added, four columns at a time. The unit is 2^-23 of the largest factor: what a multiplier makes larger keeps its 24 bits.
#define COLUMNS_IN_INTEGERS
constexpr int64_t AT_ONCE = 16;  // blocks whose factors are made at a time; a vector of codes is a line
typedef __m512i vz;

// Bytes of four vectors' 128 bits, byte by byte: to[k] has bytes 4 k to 4 k + 3 of all four.
inline void side_by_side(const vz (&rows)[IN_A_LANE], vz* to) {
  const vz a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const vz c = _mm512_unpacklo_epi8(rows[2], rows[3]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
  to[0] = _mm512_unpacklo_epi16(a, c), to[1] = _mm512_unpackhi_epi16(a, c);
  to[2] = _mm512_unpacklo_epi16(b, d), to[3] = _mm512_unpackhi_epi16(b, d);
}

// Digit d of the factors of four blocks, in all lanes of a block.
inline vb digit(vz factors, int d) {
  switch (d) {
    case 0: return reinterpret_cast<vb>(_mm512_shuffle_epi32(factors, _MM_PERM_AAAA));
    case 1: return reinterpret_cast<vb>(_mm512_shuffle_epi32(factors, _MM_PERM_BBBB));
    case 2: return reinterpret_cast<vb>(_mm512_shuffle_epi32(factors, _MM_PERM_CCCC));
    default: return reinterpret_cast<vb>(_mm512_shuffle_epi32(factors, _MM_PERM_DDDD));
  }
}

// to[i]: of blocks [4 i, 4 i + 4) of `n`, four columns' factors in units: of each block a word for each digit.
inline void lay_factors(const Column* columns, int64_t b0, int64_t n, float inverse, vz* to) {
  // Block 4 i + j is laid where word i of 128 bits j is turned to: words of 128 bits become vectors.
  const __m128i turned = _mm_set_epi8(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  const vz middle = _mm512_set1_epi32(int32_t(0x80808080));  // makes signed digits of the bytes of a sum
  vz words[IN_A_LANE];
#pragma GCC unroll 4
  for (int r = 0; r < IN_A_LANE; r++) {
    const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16((1u << n) - 1), columns[r].multipliers + b0);
    const vf multipliers = to_float(reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_shuffle_epi8(bytes, turned))));
    const vi units = nearest(multipliers * splat(columns[r].factor * inverse));
    words[r] = _mm512_xor_si512(_mm512_add_epi32(reinterpret_cast<vz>(units), middle), middle);
  }
  side_by_side(words, to);
}

// Adds 16 outputs of each of four blocks, n of them: part k of them in 128 bits of sums[k].
inline void add_quarters(const vf (&sums)[4], int64_t n, float* y) {
  const auto part = [&](int k) INLINE { return reinterpret_cast<__m512>(sums[k]); };
  const __m512 a = _mm512_shuffle_f32x4(part(0), part(1), 0x44), b = _mm512_shuffle_f32x4(part(0), part(1), 0xee);
  const __m512 c = _mm512_shuffle_f32x4(part(2), part(3), 0x44), d = _mm512_shuffle_f32x4(part(2), part(3), 0xee);
  const __m512 blocks[LINE_BLOCKS] = {_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xdd),
                                        _mm512_shuffle_f32x4(b, d, 0x88), _mm512_shuffle_f32x4(b, d, 0xdd)};
#pragma GCC unroll 4
  for (int k = 0; k < LINE_BLOCKS; k++, y += BLOCK)
    if (k < n) store(y, load(y) + reinterpret_cast<vf>(blocks[k]));
}

// y[0 .. 32 blocks) += columns' blocks [b0, b0 + blocks), blocks <= LINE_BLOCKS. factors: [count / 4] of these blocks,
// AT_ONCE / LINE_BLOCKS apart; start: what their sums begin with, for codes are stored 8 higher.
inline void add_vector(const Columns& columns, Ahead& next, const vz* factors, vi start, int64_t b0,
                       int64_t blocks, float unit, float* y) {
  constexpr int DIGITS = 4;
  const int64_t first = b0 * (BLOCK / 2);
  const __mmask64 bytes = ~uint64_t(0) >> (64 - blocks * (BLOCK / 2));
  const vz low = _mm512_set1_epi8(15);
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    vi sums[DIGITS][4];
#pragma GCC unroll 4
    for (int d = 0; d < DIGITS; d++)
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) sums[d][k] = reinterpret_cast<vi>(digit(reinterpret_cast<vz>(start), d));
    const vz* factor = factors;
    for (int64_t i = 0; i < columns.count; i += IN_A_LANE, factor += AT_ONCE / LINE_BLOCKS) {
      if (half == 0) next.ask();
      vz rows[IN_A_LANE], codes[4];
#pragma GCC unroll 4
      for (int r = 0; r < IN_A_LANE; r++) {
        const vz pairs = _mm512_maskz_loadu_epi8(bytes, columns.at[i + r].codes + first);
        rows[r] = _mm512_and_si512(half ? _mm512_srli_epi16(pairs, 4) : pairs, low);
      }
      side_by_side(rows, codes);
#pragma GCC unroll 4
      for (int d = 0; d < DIGITS; d++) {
        const vb factors_of_digit = digit(*factor, d);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++)
          sums[d][k] = add_products<false>(sums[d][k], reinterpret_cast<vb>(codes[k]), factors_of_digit);
      }
    }
    vf total[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      const vf upper = to_float(sums[3][k]) * splat(0x1p24f) + to_float(sums[2][k]) * splat(0x1p16f);
      total[k] = (upper + to_float(sums[1][k] * 256 + sums[0][k])) * splat(unit);
    }
    add_quarters(total, blocks, y + half * (BLOCK / 2));
  }
}

// False, and nothing done, where the largest factor is out of range or no number.
inline bool add_in_integers(const Columns& columns, Ahead& next, int64_t b0, int64_t blocks, float* y) {
  constexpr float MOST_UNITS = 127 << 24;
  constexpr int VECTORS = AT_ONCE / LINE_BLOCKS;
  int32_t bits = 0;  // sizes of floats are ordered as their bits are, NaN above all
  for (int64_t i = 0; i < columns.count; i++) {
    int32_t size;
    std::memcpy(&size, &columns.at[i].factor, 4);
    bits = std::max(bits, size & 0x7fffffff);
  }
  if (bits == 0) return true;
  float most;
  std::memcpy(&most, &bits, 4);
  const float unit = most * (255 / MOST_UNITS), inverse = 1 / unit;
  if (!(unit >= 0x1p-100f && unit <= 0x1p100f)) return false;
  vz factors[MOST_COLUMNS / IN_A_LANE][VECTORS];
  for (int64_t b = 0; b < blocks; b += AT_ONCE) {
    const int64_t some = std::min(AT_ONCE, blocks - b);
    vi eights[VECTORS] = {};
    for (int64_t i = 0; i < columns.count; i += IN_A_LANE) {
      vz* to = factors[i / IN_A_LANE];
      lay_factors(columns.at + i, b0 + b, some, inverse, to);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        eights[v] = add_products<false>(eights[v], vb{} + int8_t(8), reinterpret_cast<vb>(to[v]));
    }
    for (int64_t v = 0; v * LINE_BLOCKS < some; v++) {
      const int64_t at = b + v * LINE_BLOCKS, here = std::min(LINE_BLOCKS, blocks - at);
      add_vector(columns, next, factors[0] + v, -eights[v], b0 + at, here, unit, y + at * BLOCK);
    }
  }
  return true;
}
#endif

// Sums of codes times factors for BLOCKS blocks, of columns that are added one by one.
#if defined(__AVX2__) && !defined(__AVX512F__)
// No code is converted: what it stands for is a bfloat16, whose two bytes come out of tables; with zeros behind, a float.
class ColumnSums {
 public:
  static constexpr int BLOCKS = 2;
  void add(const char* codes, int64_t blocks, const float* factors) {
    const __m128i upper = _mm_set_epi64x(0x4040404040403f00, int64_t(0xbfc0c0c0c0c0c0c1));  // of 7 .. 0, of -1 .. -8
    const __m128i lower = _mm_set_epi64x(int64_t(0xe0c0a08040008000), int64_t(0x80004080a0c0e000));
    const vb pairs = blocks == BLOCKS ? load_bytes(codes) : load_last_bytes(codes, BLOCK / 2);
    const vb halves[] = {pairs & int8_t(15), reinterpret_cast<vb>(reinterpret_cast<vs>(pairs) >> 4) & int8_t(15)};
    double both;  // factors, as bits
    std::memcpy(&both, factors, sizeof both);
    const __m256i block_of_lane = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    const vf factor = reinterpret_cast<vf>(_mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), block_of_lane));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const auto at = reinterpret_cast<__m256i>(halves[half]);
      const __m256i bits = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(lower), at);
      const __m256i over = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(upper), at);
      const __m256i low = _mm256_unpacklo_epi8(bits, over), high = _mm256_unpackhi_epi8(bits, over);
      const __m256i zero = _mm256_setzero_si256();
      vf* sums = sums_ + 4 * half;
      sums[0] += factor * reinterpret_cast<vf>(_mm256_unpacklo_epi16(zero, low));
      sums[1] += factor * reinterpret_cast<vf>(_mm256_unpackhi_epi16(zero, low));
      sums[2] += factor * reinterpret_cast<vf>(_mm256_unpacklo_epi16(zero, high));
      sums[3] += factor * reinterpret_cast<vf>(_mm256_unpackhi_epi16(zero, high));
    }
  }
  void add_to(float* y, int64_t blocks) const {
    for (int64_t b = 0; b < blocks; b++)
      for (int part = 0; part < PARTS; part++) {
        const auto sum = reinterpret_cast<__m256>(sums_[part]);
        float* to = y + b * BLOCK + 4 * part;
        _mm_storeu_ps(to, _mm_loadu_ps(to) + (b == 0 ? _mm256_castps256_ps128(sum) : _mm256_extractf128_ps(sum, 1)));
      }
  }

 private:
  static constexpr int PARTS = 8;  // four numbers of each block
  vf sums_[PARTS] = {};
};
#else
class ColumnSums {
 public:
  static constexpr int BLOCKS = 1;
  void add(const char* codes, int64_t, const float* factors) {
    const vf factor = splat(factors[0]);
    for (int part = 0; part < PARTS; part++) {
      const vi pairs = widen_bytes(codes + part * W);
      sums_[0][part] += factor * to_float((pairs & 15) - 8);
      sums_[1][part] += factor * to_float((pairs >> 4) - 8);
    }
  }
  void add_to(float* y, int64_t) const {
    for (int half = 0; half < 2; half++)
      for (int part = 0; part < PARTS; part++, y += W) store(y, load(y) + sums_[half][part]);
  }

 private:
  static constexpr int PARTS = int(BLOCK / 2 / W);
  vf sums_[2][PARTS] = {};
};
#endif

// to[i] = factor * from[i], for i < n; what a whole vector holds beyond is not of these
inline void scale_bytes(const uint8_t* from, int64_t n, float factor, float* to) {
  auto scaled = [&](const uint8_t* bytes) INLINE { return to_float(widen_bytes(bytes)) * splat(factor); };
  if (n < W) {
    uint8_t bytes[W] = {};
    std::memcpy(bytes, from, size_t(n));
    return store(to, scaled(bytes));
  }
  for (int64_t i = 0; i < n; i += W) {
    const int64_t at = std::min(i, n - W);  // the last ones of whole vectors: some are stored twice
    store(to + at, scaled(from + at));
  }
}

// As add_columns, of MOST_BLOCKS at most, one by one.
inline void add_in_floats(const Columns& columns, Ahead& next, int64_t b0, int64_t blocks, float* y) {
  constexpr int64_t SUMMED = 2 * IN_A_LANE;
  float factors[SUMMED][MOST_BLOCKS + W] = {};
  for (int64_t i = 0; i < columns.count; i += SUMMED) {
    const Column* c = columns.at + i;
    const int64_t n = std::min(columns.count - i, SUMMED);
    for (int64_t r = 0; r < n; r++) scale_bytes(c[r].multipliers + b0, blocks, c[r].factor, factors[r]);
    for (int64_t b = 0; b < blocks; b += ColumnSums::BLOCKS) {
      const int64_t some = std::min<int64_t>(blocks - b, ColumnSums::BLOCKS);
      ColumnSums sums;  // of these columns alone: fewer roundings than one sum over all
      for (int64_t r = 0; r < n; r++) {
        if (b % LINE_BLOCKS == 0 && r % IN_A_LANE == 0) next.ask();
        sums.add(c[r].codes + (b0 + b) * (BLOCK / 2), some, factors[r] + b);
      }
      sums.add_to(y + b * BLOCK, some);
    }
  }
}

// y[0 .. 32 blocks) += columns' blocks [b0, b0 + blocks); asks for the same of those that come next.
inline void add_columns(const Columns& columns, const Columns& next, int64_t b0, int64_t blocks, float* y) {
  Ahead ahead(next, b0 * (BLOCK / 2), (b0 + blocks) * (BLOCK / 2));
#if defined(COLUMNS_IN_INTEGERS)
  if (add_in_integers(columns, ahead, b0, blocks, y)) return;
#endif
  for (int64_t b = 0; b < blocks; b += MOST_BLOCKS)
    add_in_floats(columns, ahead, b0 + b, std::min(MOST_BLOCKS, blocks - b), y + b * BLOCK);
}

}  // namespace
