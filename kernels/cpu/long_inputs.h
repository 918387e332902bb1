// Linears of quantised weights over many tokens, where arithmetic takes the time: codes as pairs of 16 bits, rows of a
// weight side by side in the lanes of a vector. One instruction multiplies two codes of W rows with two of a token and adds
// them, exactly; a block's sum of 32 products is a lane, and is scaled as a whole.
// A piece is a strip of rows: a stretch of their inputs is turned into pairs once, and stays in L2 while all tokens go by.
#pragma once

#include "pool.h"
#include "quantised.h"
#include "token_codes.h"

namespace {

#if defined(__x86_64__) && !defined(__AVX512VNNI__)
constexpr bool HAS_LONG_INPUTS = true;
#else
constexpr bool HAS_LONG_INPUTS = false;  // sums of products of bytes are no slower, or nobody has measured them
#endif

constexpr int64_t LONG_FROM = 33;               // tokens
constexpr int64_t LONG_TOKENS = 512;            // whose codes and sums are kept at a time
constexpr int LONG_TILE = 6, LONG_VECTORS = 2;  // of a register tile: tokens, and vectors of rows
constexpr int64_t TILE_ROWS = LONG_VECTORS * W;
constexpr int64_t STRIP = 64;                   // rows of a piece: whole tiles
constexpr int64_t TOGETHER = 16;                // blocks of inputs that are turned into pairs at a time
constexpr int64_t PAIRS = BLOCK / 2;            // of a block

// sum + both products of 16 bits in each lane, exactly.
inline vi add_pairs(vi sum, vi a, vi b) {
#if defined(__AVX512BW__)
  return sum + reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sum + reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum + reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// A block of a token.
struct TokenBlock {
  int16_t codes[BLOCK];
  float scale, sum;  // sum: of the codes, scaled
};

// A stretch of a strip, tile by tile of its rows, and the sums of all tokens.
struct Strip {
  int32_t* pairs;          // [STRIP / TILE_ROWS, TOGETHER, PAIRS, TILE_ROWS]
  float *scale, *minimum;  // [STRIP / TILE_ROWS, TOGETHER, TILE_ROWS], where blocks have their own
  float* sums;             // [tokens, STRIP]
  static constexpr int64_t SCALES = STRIP * TOGETHER, CODES = SCALES * PAIRS;
  static size_t bytes(int64_t tokens) {
    return Scratch::bytes_for<int32_t>(CODES) + 2 * Scratch::bytes_for<float>(SCALES) + Scratch::bytes_for<float>(tokens * STRIP);
  }
  Strip(Scratch& s, int64_t tokens)
      : pairs(s.take<int32_t>(CODES)),
        scale(s.take<float>(SCALES)),
        minimum(s.take<float>(SCALES)),
        sums(s.take<float>(tokens * STRIP)) {}
};

// Eight codes of each of four vectors' rows, W / 4 rows to a vector, as four vectors of one pair of all W rows.
inline void turn(const vs (&rows)[4], int32_t* to, int64_t step) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  constexpr std::make_index_sequence<W> all{};
  vf v[4];
  for (int i = 0; i < 4; i++) v[i] = reinterpret_cast<vf>(rows[i]);
  const vf a = interleave<false, 0>(v[0], v[1], all), b = interleave<false, 2>(v[0], v[1], all);
  const vf c = interleave<false, 0>(v[2], v[3], all), d = interleave<false, 2>(v[2], v[3], all);
  const vf pairs[4] = {interleave<true, 0>(a, c, all), interleave<true, 2>(a, c, all), interleave<true, 0>(b, d, all),
                       interleave<true, 2>(b, d, all)};
  for (int i = 0; i < 4; i++) std::memcpy(to + i * step, pairs + i, sizeof(vf));
#else
  int32_t lanes[4][W];
  std::memcpy(lanes, rows, sizeof lanes);
  for (int i = 0; i < 4; i++)
    for (int r = 0; r < W; r++) to[i * step + r] = lanes[r % 4][r / 4 * 4 + i];
#endif
}

// Past the last row, the last one again: its sums are not used.
inline const char* row_at(const Rows& w, int64_t i) { return w.data + w.place(std::min(i, w.count - 1)) * w.stride; }

typedef int8_t eights __attribute__((vector_size(2 * W)));  // eight bytes of each of W / 4 rows

// Bytes [at, at + 8) of rows r, r + 4, r + 8 ... of W, zeros behind `size`.
inline eights gather(const char* const* rows, int r, int64_t at, int64_t size) {
  char bytes[2 * W] = {};
  for (int i = 0; i < W / 4; i++) {
    const char* from = rows[r + 4 * i] + at;
    if (at + 8 <= size)
      std::memcpy(bytes + 8 * i, from, 8);
    else if (at < size)
      std::memcpy(bytes + 8 * i, from, size_t(size - at));
  }
  eights out;
  std::memcpy(&out, bytes, sizeof out);
  return out;
}

// Block b of W rows as pairs, TILE_ROWS apart.
inline void turn_block(const Int8Linear& l, const char* const* rows, int64_t b, int32_t* to) {
  for (int64_t i = 0; i < BLOCK; i += 8) {
    vs codes[4];
    for (int r = 0; r < 4; r++) codes[r] = __builtin_convertvector(gather(rows, r, b * BLOCK + i, l.d_in), vs);
    turn(codes, to + i / 2 * TILE_ROWS, TILE_ROWS);
  }
}

template <bool MINIMUM>
inline void turn_block(const Int4Linear<MINIMUM>& l, const char* const* rows, int64_t b, int32_t* to) {
  for (int64_t i = 0; i < BLOCK / 2; i += 8) {
    vs low[4], high[4];
    for (int r = 0; r < 4; r++) {
      const vs both = __builtin_convertvector(gather(rows, r, b * (BLOCK / 2) + i, l.weight.bytes), vs);
      low[r] = (both & 15) - int16_t(MINIMUM ? 0 : 8);
      high[r] = (both >> 4 & 15) - int16_t(MINIMUM ? 0 : 8);
    }
    turn(low, to + i / 2 * TILE_ROWS, TILE_ROWS);
    turn(high, to + (BLOCK / 2 + i) / 2 * TILE_ROWS, TILE_ROWS);
  }
}

// Halves [b, b + n) of row r as fp32, TILE_ROWS apart.
inline void turn_halves(const Rows& from, int64_t r, int64_t b, int64_t n, float* to) {
  const auto* halves = reinterpret_cast<const uint16_t*>(row_at(from, r)) + b;
  for (int64_t i = 0; i < n; i += W) {
    const vf wide = i + W <= n ? F16::load(halves + i) : load_part<F16>(halves + i, n - i);
    for (int64_t k = 0; k < std::min<int64_t>(W, n - i); k++) to[(i + k) * TILE_ROWS] = wide[k];
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
    for (int64_t k = 0; k < n; k++) turn_block(l, rows, b + k, s.pairs + (tile + k) * PAIRS * TILE_ROWS + lane);
    for (int i = 0; i < W; i++) turn_scales(l, row + r + i, b, n, s, tile * TILE_ROWS + lane + i);
  }
}

// sums[LONG_TILE][STRIP] += the first n blocks of that many tokens times those of TILE_ROWS rows of a strip from `row` on.
template <int PER_BLOCK>
ALONE void add_blocks(const TokenBlock* x, int64_t x_stride, const Strip& strip, int64_t row, int64_t n, float* sums) {
  constexpr int M = LONG_TILE, N = LONG_VECTORS;
  const int32_t* pairs = strip.pairs + row * TOGETHER * PAIRS;
  const float *scale = strip.scale + row * TOGETHER, *minimum = strip.minimum + row * TOGETHER;
  for (int64_t b = 0; b < n; b++, x++) {
    vi acc[M][N] = {};
    for (int64_t p = 0; p < PAIRS; p++, pairs += TILE_ROWS) {
      vi w[N];
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) w[v] = *reinterpret_cast<const vi_mem*>(pairs + v * W);
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const vi two = reinterpret_cast<vi>(splat_word(reinterpret_cast<const float*>(x[m * x_stride].codes + 2 * p)));
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) acc[m][v] = add_pairs(acc[m][v], w[v], two);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const vf token = splat(x[m * x_stride].scale), sum = splat(x[m * x_stride].sum);
#pragma GCC unroll 16
      for (int v = 0; v < N; v++) {
        float* to = sums + m * STRIP + v * W;
        const int64_t at = b * TILE_ROWS + v * W;
        vf y = load(to) + to_float(acc[m][v]) * (PER_BLOCK ? token * load(scale + at) : token);
        if (PER_BLOCK == 2) y += sum * load(minimum + at);
        store(to, y);
      }
    }
  }
}

// Values of block b of a token, n of them, zeros behind.
template <class E>
inline void lay_block(const typename E::T* x, int64_t n, bool with_sum, TokenBlock& to) {
  typedef int16_t wide __attribute__((vector_size(2 * W)));
  vi sum = {};
  to.scale = quantise_block<E>(x, n, [&](int64_t i, narrow codes) {
    const wide pairs = __builtin_convertvector(codes, wide);
    std::memcpy(to.codes + i, &pairs, sizeof pairs);
    sum += __builtin_convertvector(codes, vi);
  });
  if (with_sum) to.sum = to.scale * float(hsum(sum));
}

// y[tokens, rows] = the sums of all tokens and rows, and the bias.
template <class E, class L>
void long_linear(const L& l, const typename E::T* x, int64_t tokens, const void* bias, typename E::T* y, int threads) {
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
        lay_block<E>(x + i * l.d_in + b * BLOCK, l.d_in - b * BLOCK, L::PER_BLOCK == 2, inputs[i * x_stride + b]);
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
      for (int64_t i = 0; i < here; i++)
        for (int64_t r = 0; r < rows; r++) {
          const float sum = l.finish(local.sums[i * STRIP + r], row + r);
          y[i * count + row + r] = E::from_float(sum + bias_at<E>(bias, row + r));
        }
    });
  }
}

}  // namespace
