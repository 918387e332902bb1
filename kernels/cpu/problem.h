// One call of the op as plain pointers and strides, and the scratch memory it works in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <numeric>
#include <vector>

#include "activations.h"
#include "element_types.h"

namespace {

// A weight [rows, cols]: nn.Linear's row-major has col == 1; a transposed view has row == 1.
struct Matrix {
  const void* data = nullptr;
  int64_t row = 0, col = 0;
  template <class E>
  const typename E::T* at(int64_t r, int64_t c) const {
    return static_cast<const typename E::T*>(data) + r * row + c * col;
  }
};

struct Proxy;
struct Int8Router;

struct Problem {
  int64_t tokens, d_model, d_ff, d_out, n_experts, group;
  const void* x;             // [tokens, d_model], rows contiguous
  int64_t x_stride;          // elements from one token to the next
  Matrix router;             // fp32 [n_experts, d_model], col == 1
  const float* router_bias;  // or null
  // What decides in its place, or null both.
  const Proxy* proxy;
  const Int8Router* int8_router;
  float threshold;
  Matrix up, gate, down;  // [d_ff, d_model] twice, [d_out, d_ff]; gate.data is null in a plain FFN
  const void *up_bias, *gate_bias, *down_bias;
  const float *up_scale, *gate_scale, *down_scale;  // of weights in int8, one an output
  // Of weights in 4 bits, whose matrices above are of bytes, and down's [d_out / 2, d_ff]: halves, one a block of 32.
  Matrix up_scales, gate_scales, down_scales;  // [d_ff, d_model / 32] twice, [d_out / 32, d_ff]
  Act act;
  float cut;        // hidden units of a size up to it are 0; negative: none are
  float input_cut;  // the same for x, as up and gate see it
  void* y;        // [tokens, d_out] contiguous
  uint8_t* mask;  // [tokens, n_experts] or null
  int threads;
  double dense_above;  // active share from which many tokens go to the library's own GEMMs
};

// Memory of one calling thread, kept between its calls up to KEEP bytes: a fresh mmap per token would cost page faults.
class Scratch {
 public:
  static constexpr size_t KEEP = size_t(16) << 20;
  ~Scratch() { std::free(block_); }
  // Starts a call that will take at most `bytes` in all.
  void reserve(size_t bytes) {
    used_ = 0;
    if (bytes <= size_ && size_ <= std::max(bytes, KEEP)) return;
    std::free(block_);
    size_ = (std::max(bytes, size_t(1) << 16) + 4095) / 4096 * 4096;
    block_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (!block_) {
      size_ = 0;
      throw std::bad_alloc();
    }
  }
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(block_ + used_);
    used_ += bytes_for<T>(n);
    return p;
  }
  template <class T>
  static size_t bytes_for(int64_t n) {
    return (size_t(n) * sizeof(T) + 127) / 128 * 128;  // two lines: threads' buffers never share one
  }

 private:
  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Piece t of n items cut into equal runs of whole `unit`s.
inline std::pair<int64_t, int64_t> share(int64_t n, int64_t unit, int t, int of) {
  const int64_t units = (n + unit - 1) / unit;
  return {std::min(n, units * t / of * unit), std::min(n, units * (t + 1) / of * unit)};
}

constexpr int ROWS = 8;  // weight rows read side by side where memory is the limit: one stream does not keep it busy
constexpr int64_t AHEAD = 3072;  // bytes that each of them is asked for ahead of the arithmetic: a new stream starts slowly

// Down over few tokens goes by parts of the experts, so that its rows are read whole, times blocks of output columns where
// threads would not share the parts evenly. Parts are as many for any number of threads: so are the bits of the result.
constexpr int DOWN_PARTS = 4;
inline int64_t down_blocks(int threads) { return std::lcm(threads, DOWN_PARTS) / DOWN_PARTS; }

// sums[0 .. n) += the same of the other parts, `step` apart
inline void add_parts(float* sums, int parts, int64_t step, int64_t n) {
  for (int q = 1; q < parts; q++)
    for (int64_t k = 0; k < n; k++) sums[k] += sums[q * step + k];
}

template <class E>
inline float bias_at(const void* bias, int64_t i) {
  return bias ? E::to_float(static_cast<const typename E::T*>(bias)[i]) : 0.0f;
}

// act(gate) * up or act(up), in place into `up`, n values; `gate` is null in a plain FFN.
inline void activate_row(Act act, const float* gate, float* up, int64_t n) {
  float buffer[2][W] = {};
  for (int64_t i = 0; i < n; i += W) {
    const bool part = i + W > n;
    const float *u = up + i, *g = gate ? gate + i : nullptr;
    if (part) {
      std::memcpy(buffer[0], u, size_t(n - i) * 4);
      u = buffer[0];
      if (g) {
        std::memcpy(buffer[1], g, size_t(n - i) * 4);
        g = buffer[1];
      }
    }
    const vf h = g ? activate(act, load(g)) * load(u) : activate(act, load(u));
    if (part)
      store_part(up + i, h, n - i);
    else
      store(up + i, h);
  }
}

// 0 for hidden units, or inputs, up to the cut; NaN stays, so that a fault stays visible.
inline void leave_out_small(float cut, float* h, int64_t n) {
  if (cut < 0.0f) return;
  for (int64_t i = 0; i < n; i++) h[i] = std::fabs(h[i]) <= cut ? 0.0f : h[i];
}

}  // namespace
