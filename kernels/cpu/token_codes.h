// Whole tokens as int8 with one scale, as ../weight_formats.py has it: sums over all of d_model are integers, and what
// decides by them decides alike on every machine.
#pragma once

#include "quantised_inputs.h"

namespace {

// A product that no compiler may contract with the sum after it.
inline vf product(vf a, vf b) {
  vf p = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(p));
#elif defined(__aarch64__)
  asm("" : "+w"(p));
#else
  asm("" : "+m"(p));
#endif
  return p;
}

// Tokens as codes, for rows of codes of 8 / PARTS bits: of each vector of weights its inputs, in two parts for low and
// high halves of bytes, and each lane's start of the sum, which takes off what codes are stored higher: of two parts as
// `start_of_nibbles` has it.
template <int PARTS>
class TokenCodes {
 public:
  TokenCodes(int64_t d_model, int64_t row_bytes, int64_t tokens)
      : d_model_(d_model), chunks_((row_bytes + VB - 1) / VB), tokens_(tokens) {}
  size_t bytes() const { return Scratch::bytes_for<char>(tokens_ * chunks_ * CHUNK) + Scratch::bytes_for<float>(tokens_); }
  void reserve(Scratch& s) {
    data_ = s.take<char>(tokens_ * chunks_ * CHUNK);
    scales_ = s.take<float>(tokens_);
  }
  float scale(int64_t token) const { return scales_[token]; }
  const char* row(int64_t token) const { return data_ + token * chunks_ * CHUNK; }

  template <class E>
  void lay(int64_t token, const typename E::T* x) const {
    char* to = data_ + token * chunks_ * CHUNK;
    std::memset(to, 0, size_t(chunks_ * CHUNK));
    auto value = [&](int64_t i) { return i + W <= d_model_ ? E::load(x + i) : load_part<E>(x + i, d_model_ - i); };
    vi most = {};  // sizes of floats are ordered as their bits are, NaN above all
    for (int64_t i = 0; i < d_model_; i += W) {
      const vi size = reinterpret_cast<vi>(value(i)) & 0x7fffffff;
      most = size > most ? size : most;
    }
    const int32_t bits = most_of(most);
    float size;
    std::memcpy(&size, &bits, 4);
    const float scale = scales_[token] = size / 127;
    if (!(scale >= 0x1p-126f && scale <= 0x1.fffffep127f)) return;  // codes stay 0
    const vf inverse = splat(1 / scale);
    constexpr int64_t SPAN = BLOCK / PARTS;
    for (int64_t i = 0; i < d_model_; i += W) {
      const narrow codes = __builtin_convertvector(nearest(product(value(i), inverse)), narrow);
      const int64_t at = i / BLOCK * SPAN + i % SPAN, part = i / SPAN % PARTS;
      std::memcpy(to + at / VB * CHUNK + part * VB + at % VB, &codes, W);
    }
    for (int64_t c = 0; c < chunks_; c++, to += CHUNK) {
      const vb first = load_bytes(to), ones = vb{} + int8_t(1);
      const vb start = PARTS == 2 ? start_of_nibbles(first, load_bytes(to + VB))
                                  : reinterpret_cast<vb>(add_products<false>(vi{}, ones, first) * -ADDED<true>);
      std::memcpy(to + PARTS * VB, &start, VB);
    }
  }
  static constexpr int64_t CHUNK = (PARTS + 1) * VB;

 private:
  int64_t d_model_, chunks_, tokens_;
  char* data_ = nullptr;
  float* scales_ = nullptr;
};

}  // namespace
