// Tokens and blocks of weights as operands of a product (see element_types.h): fp32, or pairs of bf16 where the CPU
// multiplies those, in whole vectors. Depths and strides are in their words.
#pragma once

#include "problem.h"

namespace {

// Tokens as operands O, cut into stretches of `block` words that lie together: rows of a whole number of pages would meet
// in the same few cache sets. Every row is padded with zeros to whole vectors, and by one more against the same effect.
template <class O>
struct Blocked {
  float* data;
  int64_t tokens, depth, block;  // depth in elements
  int64_t stride() const { return std::min(block, round_up(words<O>(depth), W)) + W; }
  int64_t size() const { return (words<O>(depth) + block - 1) / block * tokens * stride(); }
  const float* row(int64_t i) const { return data + i * stride(); }
  int64_t next_block() const { return tokens * stride(); }
  template <class E>
  void fill(int64_t i, const typename E::T* from) const {
    float* to = data + i * stride();
    for (int64_t k = 0; k < depth; k += block * O::PER_WORD, to += next_block())
      lay<E, O>(from + k, to, std::min(block * O::PER_WORD, depth - k), stride());
  }
};

struct Block {
  const float* data;
  int64_t stride;
};

// Whether a weight's rows can be read as operands where they lie.
template <class E>
inline bool lies_ready(const Matrix& m) {
  return std::is_same_v<E, typename E::Operand> && m.data && m.col == 1 && m.row % E::Operand::PER_WORD == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % sizeof(float) == 0;
}

template <class E>
inline const float* words_at(const Matrix& m, int64_t r, int64_t c) {
  return reinterpret_cast<const float*>(m.at<E>(r, c));
}

// A block [rows, cols] of a weight as rows of operands in whole vectors: where it lies, or copied together, widened or
// turned into `buffer`, zeros behind each row.
template <class E>
inline Block operand_rows(const Matrix& m, int64_t r0, int64_t rows, int64_t c0, int64_t cols, float* buffer) {
  using O = typename E::Operand;
  if (lies_ready<E>(m) && cols % (W * O::PER_WORD) == 0) return {words_at<E>(m, r0, c0), m.row / O::PER_WORD};
  const int64_t padded = round_up(words<O>(cols), W), ld = padded + W;
  for (int64_t r = 0; r < rows; r++) {
    if (m.col == 1)
      lay<E, O>(m.at<E>(r0 + r, c0), buffer + r * ld, cols, padded);
    else
      std::fill(buffer + r * ld, buffer + r * ld + padded, 0.0f);
  }
  if (m.col != 1)
    for (int64_t c = 0; c < cols; c++)
      for (int64_t r = 0; r < rows; r++) put<E, O>(m.at<E>(r0 + r, c0 + c), buffer + r * ld, c);
  return {buffer, ld};
}

// The same for sums over rows: a word holds the elements of PER_WORD rows of a column, zeros after the last row. While
// pairs are made, the rows `ahead` of them are asked for.
template <class E>
inline Block operand_columns(const Matrix& m, int64_t r0, int64_t rows, int64_t c0, int64_t cols, float* buffer,
                             int64_t ahead) {
  using O = typename E::Operand;
  if constexpr (O::PER_WORD == 1) {
    return operand_rows<E>(m, r0, rows, c0, cols, buffer);
  } else {
    const int64_t padded = round_up(cols, W), ld = padded + W;
    for (int64_t r = 0; r < rows; r += 2) {
      const auto *row = m.at<E>(r0 + r, c0), *next = r + 1 < rows ? row + m.row : nullptr;
      float* to = buffer + r / 2 * ld;
      if (m.col == 1)
        lay_pairs<O>(row, next, to, cols, padded, ahead * m.row);
      else
        std::fill(to, to + padded, 0.0f);
    }
    if (m.col != 1)
      for (int64_t c = 0; c < cols; c++)
        for (int64_t r = 0; r < rows; r++) put<E, O>(m.at<E>(r0 + r, c0 + c), buffer + r / 2 * ld, 2 * c + r % 2);
    return {buffer, ld};
  }
}

}  // namespace
