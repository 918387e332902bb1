// Linears of quantised weights over many tokens, where arithmetic takes the time: rows of a weight lie side by side in the
// lanes of a vector, as many of their codes in a lane as one instruction multiplies with a token's and adds, exactly. A
// block's sum of 32 products is a lane, and is scaled as a whole.
// A piece is a strip of rows: a stretch of their inputs is turned once, and stays in L2 while all tokens go by.
#pragma once

#include "pool.h"
#include "quantised.h"
#include "turned_rows.h"

namespace {

#if defined(__x86_64__)
constexpr bool HAS_LONG_INPUTS = true;
#else
constexpr bool HAS_LONG_INPUTS = false;  // nobody has measured them
#endif

constexpr int64_t LONG_FROM = 33;              // tokens
constexpr int64_t LONG_TOKENS = 512;            // whose codes and sums are kept at a time
constexpr int LONG_TILE = 6, LONG_VECTORS = 2;  // of a register tile: tokens, and vectors of rows
constexpr int64_t TILE_ROWS = LONG_VECTORS * W;
constexpr int64_t STRIP = 64;                   // rows of a piece: whole tiles
constexpr int64_t TOGETHER = 16;                // blocks of inputs that are turned at a time

// Codes of a token, RAISED higher than they are, and those of a weight; add_word: sum + the products in each lane, exactly.
#if defined(__AVX512VNNI__)
typedef uint8_t TokenCode;
typedef int8_t WeightCode;
constexpr int32_t RAISED = 128;
inline vi add_word(vi sum, vi token, vi weight) {
  return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(token),
                                                  reinterpret_cast<__m512i>(weight)));
}
#else
typedef int16_t TokenCode, WeightCode;
constexpr int32_t RAISED = 0;
inline vi add_word(vi sum, vi token, vi weight) {
#if defined(__AVX512BW__)
  return sum + reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(token), reinterpret_cast<__m512i>(weight)));
#elif defined(__AVX2__)
  return sum + reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(token), reinterpret_cast<__m256i>(weight)));
#elif defined(__SSE2__)
  return sum + reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(token), reinterpret_cast<__m128i>(weight)));
#else
  return sum + (token << 16 >> 16) * (weight << 16 >> 16) + (token >> 16) * (weight >> 16);
#endif
}
#endif
constexpr int64_t IN_A_WORD = 4 / sizeof(WeightCode);  // codes, of a lane
constexpr int64_t WORDS = BLOCK / IN_A_WORD;           // of a block

// A block of a token.
struct TokenBlock {
  TokenCode codes[BLOCK];
  float scale, sum;  // sum: of the codes, scaled
};

// A stretch of a strip, tile by tile of its rows, and the sums of all tokens.
struct Strip {
  int32_t* words;          // [STRIP / TILE_ROWS, TOGETHER, WORDS, TILE_ROWS]
  int32_t* starts;         // [STRIP / TILE_ROWS, TOGETHER, TILE_ROWS]: of a block's sum, where tokens' codes are raised
  float *scale, *minimum;  // likewise, where blocks have their own
  float* sums;             // [tokens, STRIP]
  static constexpr int64_t BLOCKS = STRIP * TOGETHER;
  static size_t bytes(int64_t tokens) {
    return Scratch::bytes_for<int32_t>(BLOCKS * WORDS) + 3 * Scratch::bytes_for<float>(BLOCKS) +
           Scratch::bytes_for<float>(tokens * STRIP);
  }
  Strip(Scratch& s, int64_t tokens)
      : words(s.take<int32_t>(BLOCKS * WORDS)),
        starts(s.take<int32_t>(BLOCKS)),
        scale(s.take<float>(BLOCKS)),
        minimum(s.take<float>(BLOCKS)),
        sums(s.take<float>(tokens * STRIP)) {}
};

constexpr int64_t IN_A_ROW = 4 * IN_A_WORD;  // codes of each of the W / 4 rows of a vector
typedef WeightCode codes_of_rows __attribute__((vector_size(VB)));
typedef int8_t bytes_of_rows __attribute__((vector_size(W / 4 * IN_A_ROW)));
typedef uint64_t parts_of_rows __attribute__((vector_size(W / 4 * IN_A_ROW)));
typedef uint64_t halves_of_rows __attribute__((vector_size(2 * W)));  // four of a row

// Turned, each vector TILE_ROWS words behind the one before.
inline void store_turned(vi (&v)[4], void* to) {
  turn(v);
  for (int i = 0; i < 4; i++) *reinterpret_cast<vi_mem*>(static_cast<int32_t*>(to) + i * TILE_ROWS) = v[i];
}

// Past the last row, the last one again: its sums are not used.
inline const char* row_at(const Rows& w, int64_t i) { return w.data + w.place(std::min(i, w.count - 1)) * w.stride; }

// Block b of W rows as words, TILE_ROWS apart.
inline void turn_block(const Int8Linear& l, const char* const* rows, int64_t b, int32_t* to) {
  for (int64_t i = 0; i < BLOCK; i += IN_A_ROW) {
    vi words[4];
    for (int r = 0; r < 4; r++) {
      const auto bytes = reinterpret_cast<bytes_of_rows>(gather<parts_of_rows>(rows, r, b * BLOCK + i, l.d_in));
      words[r] = reinterpret_cast<vi>(__builtin_convertvector(bytes, codes_of_rows));
    }
    store_turned(words, to + i / IN_A_WORD * TILE_ROWS);
  }
}

template <bool MINIMUM>
inline void turn_block(const Int4Linear<MINIMUM>& l, const char* const* rows, int64_t b, int32_t* to) {
  constexpr int8_t ZERO = MINIMUM ? 0 : 8;
  for (int64_t i = 0; i < BLOCK / 2; i += IN_A_ROW) {
    vi low[4], high[4];
    for (int r = 0; r < 4; r++) {
      const auto both = reinterpret_cast<bytes_of_rows>(gather<parts_of_rows>(rows, r, b * (BLOCK / 2) + i, l.weight.bytes));
      low[r] = reinterpret_cast<vi>(__builtin_convertvector((both & 15) - ZERO, codes_of_rows));
      high[r] = reinterpret_cast<vi>(__builtin_convertvector((both >> 4 & 15) - ZERO, codes_of_rows));
    }
    store_turned(low, to + i / IN_A_WORD * TILE_ROWS);
    store_turned(high, to + (BLOCK / 2 + i) / IN_A_WORD * TILE_ROWS);
  }
}

// What takes off that tokens' codes are raised.
inline void start_sums(const int32_t* words, int32_t* to) {
  const vi ones = reinterpret_cast<vi>(codes_of_rows{} + WeightCode(1));
  vi sum = {};
  for (int64_t i = 0; i < WORDS; i++) sum = add_word(sum, ones, *reinterpret_cast<const vi_mem*>(words + i * TILE_ROWS));
  *reinterpret_cast<vi_mem*>(to) = sum * -RAISED;
}

// Halves [b, b + n) of W rows from `row` on as fp32, TILE_ROWS apart. Up to a multiple of four are written.
inline void turn_halves(const Rows& from, int64_t row, int64_t b, int64_t n, float* to) {
  const char* rows[W];
  for (int i = 0; i < W; i++) rows[i] = row_at(from, row + i);
  for (int64_t i = b; i < b + n; i += 4, to += 4 * TILE_ROWS) {
    vi words[4];
    for (int r = 0; r < 4; r++) {
      const auto four = gather<halves_of_rows>(rows, r, 2 * i, 2 * (b + n));
      words[r] = reinterpret_cast<vi>(F16::load(reinterpret_cast<const uint16_t*>(&four)));
    }
    store_turned(words, to);
  }
}

inline void turn_scales(const Int8Linear&, int64_t, int64_t, int64_t, const Strip&, int64_t) {}
template <bool MINIMUM>
inline void turn_scales(const Int4Linear<MINIMUM>& l, int64_t row, int64_t b, int64_t n, const Strip& s, int64_t at) {
  turn_halves(l.scale, row, b, n, s.scale + at);
  if (MINIMUM) turn_halves(l.minimum, row, b, n, s.minimum + at);
}

// Blocks [b, b + n) of the strip of rows from `row` on.
template <class L>
inline void turn_strip(const L& l, int64_t row, int64_t b, int64_t n, const Strip& s) {
  for (int64_t r = 0; r < STRIP; r += W) {
    const char* rows[W];
    for (int i = 0; i < W; i++) rows[i] = row_at(l.weight, row + r + i);
    const int64_t tile = r / TILE_ROWS * TOGETHER, lane = r % TILE_ROWS;
    // Meanwhile the next rows come, and at the strip's end the next stretch of its first ones.
    const int64_t bytes = n * l.weight.bytes / l.inputs.blocks, on = r + W < STRIP ? b : b + n;
    for (int i = 0; i < W; i++) {
      const char* next = row_at(l.weight, row + (r + W < STRIP ? r + W : 0) + i) + on * l.weight.bytes / l.inputs.blocks;
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(next + at, 0, 3);
    }
    for (int64_t k = 0; k < n; k++) {
      int32_t* words = s.words + (tile + k) * WORDS * TILE_ROWS + lane;
      turn_block(l, rows, b + k, words);
      if (RAISED) start_sums(words, s.starts + (tile + k) * TILE_ROWS + lane);
    }
    turn_scales(l, row + r, b, n, s, tile * TILE_ROWS + lane);
  }
}

// sums[LONG_TILE][STRIP] += the first n blocks of that many tokens times those of TILE_ROWS rows of a strip from `row` on.
template <int PER_BLOCK>
ALONE void add_blocks(const TokenBlock* x, int64_t x_stride, const Strip& strip, int64_t row, int64_t n, float* sums) {
  constexpr int M = LONG_TILE, N = LONG_VECTORS;
  const int32_t *words = strip.words + row * TOGETHER * WORDS, *starts = strip.starts + row * TOGETHER;
  const float *scale = strip.scale + row * TOGETHER, *minimum = strip.minimum + row * TOGETHER;
  vf all[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int v = 0; v < N; v++) all[m][v] = load(sums + m * STRIP + v * W);
  for (int64_t b = 0; b < n; b++, x++, starts += TILE_ROWS, scale += TILE_ROWS, minimum += TILE_ROWS) {
    vi acc[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) acc[m][v] = RAISED ? *reinterpret_cast<const vi_mem*>(starts + v * W) : vi{};
    for (int64_t i = 0; i < WORDS; i++, words += TILE_ROWS) {
      vi w[N];
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) w[v] = *reinterpret_cast<const vi_mem*>(words + v * W);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const vi token =
            reinterpret_cast<vi>(splat_word(reinterpret_cast<const float*>(x[m * x_stride].codes + IN_A_WORD * i)));
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) acc[m][v] = add_word(acc[m][v], token, w[v]);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const vf token = splat(x[m * x_stride].scale), sum = splat(x[m * x_stride].sum);
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) {
        all[m][v] += to_float(acc[m][v]) * (PER_BLOCK ? token * load(scale + v * W) : token);
        if (PER_BLOCK == 2) all[m][v] += sum * load(minimum + v * W);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int v = 0; v < N; v++) store(sums + m * STRIP + v * W, all[m][v]);
}

// Values of block b of a token, n of them, zeros behind.
template <class E>
inline void lay_block(const typename E::T* x, int64_t n, bool with_sum, TokenBlock& to) {
  typedef TokenCode wide __attribute__((vector_size(sizeof(TokenCode) * W)));
  vi sum = {};
  to.scale = quantise_block<E>(x, n, [&](int64_t i, narrow codes) {
    const wide raised = __builtin_convertvector(codes, wide) + TokenCode(RAISED);
    std::memcpy(to.codes + i, &raised, sizeof raised);
    sum += __builtin_convertvector(codes, vi);
  });
  if (with_sum) to.sum = to.scale * float(hsum(sum));
}

// y[tokens, rows] = the sums of all tokens and rows, and the bias. E: the type of y and the bias; X: of x.
template <class E, class X = E, class L>
void long_linear(const L& l, const typename X::T* x, int64_t tokens, const void* bias, typename E::T* y, int threads) {
  const int64_t count = l.weight.count, blocks = l.inputs.blocks, strips = (count + STRIP - 1) / STRIP;
  const int64_t stretches = std::max<int64_t>((blocks + TOGETHER - 1) / TOGETHER, 1);
  const int64_t stretch = (blocks + stretches - 1) / stretches;  // of equal length
  const int64_t most = round_up(std::min(tokens, LONG_TOKENS), LONG_TILE);  // the last tile may have empty places
  const int64_t x_stride = blocks + 1;  // rows of a power of two would meet in the same cache sets
  Scratch& s = scratch();
  s.reserve(Scratch::bytes_for<TokenBlock>(most * x_stride) + size_t(threads) * Strip::bytes(most));
  auto* inputs = s.take<TokenBlock>(most * x_stride);
  std::vector<Strip> locals;
  for (int t = 0; t < threads; t++) locals.emplace_back(s, most);
  for (int64_t first = 0; first < tokens; first += LONG_TOKENS, x += LONG_TOKENS * l.d_in, y += LONG_TOKENS * count) {
    const int64_t here = std::min(LONG_TOKENS, tokens - first);
    by_pieces(here, threads, [&](int64_t i, int) {
      for (int64_t b = 0; b < blocks; b++)
        lay_block<X>(x + i * l.d_in + b * BLOCK, l.d_in - b * BLOCK, L::PER_BLOCK == 2, inputs[i * x_stride + b]);
    });
    by_pieces(strips, threads, [&](int64_t piece, int slot) {
      const Strip& local = locals[size_t(slot)];
      const int64_t row = piece * STRIP, rows = std::min(STRIP, count - row);
      std::fill(local.sums, local.sums + most * STRIP, 0.0f);
      for (int64_t b = 0; b < blocks; b += stretch) {
        const int64_t n = std::min(stretch, blocks - b);
        turn_strip(l, row, b, n, local);
        for (int64_t token = 0; token < here; token += LONG_TILE)
          for (int64_t r = 0; r < rows; r += TILE_ROWS)
            add_blocks<L::PER_BLOCK>(inputs + token * x_stride + b, x_stride, local, r, n, local.sums + token * STRIP + r);
      }
      float factors[STRIP], biases[STRIP];
      for (int64_t r = 0; r < rows; r++) factors[r] = l.finish(1.0f, row + r), biases[r] = bias_at<E>(bias, row + r);
      for (int64_t i = 0; i < here; i++) {
        const float* from = local.sums + i * STRIP;
        typename E::T* to = y + i * count + row;
        for (int64_t r = 0; r < rows; r++) to[r] = E::from_float(from[r] * factors[r] + biases[r]);
      }
    });
  }
}

}  // namespace
