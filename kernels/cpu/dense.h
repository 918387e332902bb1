// Where too few pairs are skipped: the library's own GEMMs over all neurons, then the mask; and where that line lies.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <exception>

#include "batch.h"
#include "tensors.h"

namespace {

// The weights as tensors, for the dense path.
struct Weights {
  const Tensor& up;
  const OptionalTensor &up_bias, &gate, &gate_bias;
  const Tensor& down;
  const OptionalTensor& down_bias;
};

// h = act(gate) * up * mask, in place; of parts that hold no active neuron nothing is computed.
template <class E>
void activate_and_mask(const Problem& p, typename E::T* h, const typename E::T* gate, const uint8_t* mask, int64_t tokens) {
  constexpr int64_t PART = 64;
  const int64_t d_ff = p.n_experts * p.group;
  by_pieces(tokens, p.threads, [&](int64_t token, int) {
    for (int64_t j = 0; j < d_ff; j += PART) {
      const int64_t n = std::min(PART, d_ff - j), at = token * d_ff + j;
      uint8_t active[PART], any = 0;
      const uint8_t* expert = mask + token * p.n_experts + j / p.group;
      for (int64_t i = 0, left = p.group - j % p.group; i < n; i++, left--) {  // no division for each neuron
        if (left == 0) expert++, left = p.group;
        any |= active[i] = *expert;
      }
      if (!any) {
        std::fill(h + at, h + at + n, typename E::T(0));
        continue;
      }
      float wide[2][PART];
      widen<E>(h + at, wide[0], n);
      if (gate) widen<E>(gate + at, wide[1], n);
      activate_row(p.act, gate ? wide[1] : nullptr, wide[0], n);
      leave_out_small(p.cut, wide[0], n);
      for (int64_t i = 0; i < n; i++) h[at + i] = active[i] ? E::from_float(wide[0][i]) : typename E::T(0);
    }
  });
}

// Tokens of x as up and gate see them.
template <class E>
Tensor seen(const Problem& p, const Tensor& x, int64_t first, int64_t tokens) {
  Tensor rows = torch::stable::view(x, {p.tokens, p.d_model});
  rows = torch::stable::narrow(rows, 0, first, tokens);
  if (p.input_cut >= 0.0f) {
    rows = torch::stable::clone(rows);
    auto* v = static_cast<typename E::T*>(rows.data_ptr());
    for (int64_t i = 0; i < tokens * p.d_model; i++)
      if (std::fabs(E::to_float(v[i])) <= p.input_cut) v[i] = 0;
  }
  return rows;
}

template <class E>
void dense(const Problem& p, const Tensor& x, const Weights& w, const Tensor& y, int64_t first, int64_t tokens,
           const uint8_t* mask) {
  const Tensor rows = seen<E>(p, x, first, tokens);
  const Tensor h = aten_linear(rows, w.up, w.up_bias);
  const OptionalTensor gate = w.gate ? OptionalTensor(aten_linear(rows, *w.gate, w.gate_bias)) : std::nullopt;
  activate_and_mask<E>(p, static_cast<typename E::T*>(h.data_ptr()),
                       gate ? static_cast<const typename E::T*>(gate->data_ptr()) : nullptr, mask, tokens);
  Tensor flat = torch::stable::view(y, {p.tokens, p.d_out});
  flat = torch::stable::narrow(flat, 0, first, tokens);
  torch::stable::copy_(flat, aten_linear(h, w.down, w.down_bias));
}

#if defined(__x86_64__)
bool has_amx() {
  // Asked once: a virtual machine answers CPUID in the host, which takes 10 us.
  static const bool amx_bf16 = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1;
  }();
  return amx_bf16;
}
#endif

// The active share from which PyTorch's own GEMMs are faster, 2 where they never are (Ice Lake Xeon, 2 threads, see
// README.md, break-even). At its best PyTorch does 1.2 times our tiles' fp32 rate; without units for 16 bits it does far
// less than they do, and with them far more, unless they use the same units (Zen 4, 1 thread); AMX has better ones.
double dense_above(ScalarType dtype, int64_t tokens, int64_t group) {
  // Codes, where all neurons are linears of few bits: 576 x 1536, 2 to 32 tokens, 1 thread of a Xeon with VNNI, and 512 of
  // Zen 5. Down in 4 bits is a product of floats.
  const bool codes = dtype == ScalarType::Char || dtype == ScalarType::Byte;
  if (codes && group < SMALL_GROUP) return tokens < 8 ? 2.0 : tokens < DENSE_TOKENS ? 0.35 : 0.15;
  if (codes) return tokens < DENSE_TOKENS ? 2.0 : dtype == ScalarType::Char ? 0.25 : 0.45;
  // A GEMM of one neuron's rows keeps neither memory nor the units busy: 576 x 1536, 4 to 512 tokens, 1 thread of Zen 4.
  if (dtype == ScalarType::Float && group < SMALL_GROUP && tokens >= 4) return 0.22;
  // oneDNN is at its best with few tokens already: 40 and 64 of them, 2048 x 8192 and 576 x 1536, 1 thread of Zen 5.
  const double few = onednn_is_faster() ? 0.6 : 0.8;
  if (dtype == ScalarType::Float) return tokens < DENSE_TOKENS ? 2.0 : tokens < 128 ? few : tokens < MANY_TOKENS ? 0.8 : 0.68;
#if defined(__x86_64__)
  const bool units = __builtin_cpu_supports("avx512bf16"), ours = BF16::Operand::PER_WORD == 2 && !has_amx();
  if (dtype == ScalarType::BFloat16 && units && tokens >= DENSE_TOKENS) return ours ? 0.9 : 0.2;
#endif
  return 2.0;
}

// The same for which_path.py: x is any tensor of the dtype.
double dense_above_op(const Tensor& x, int64_t tokens, int64_t group) {
  return dense_above(x.scalar_type(), tokens, group);
}

// Columns below which the library's products get one thread: MKL deals columns out to threads, and sums otherwise where
// one gets few (24 of them and fewer). From here 16 threads give the bits of one.
constexpr int64_t NARROW = 512;

// Inside a parallel region libraries take no threads of their own; the caller's thread does the work.
template <class Work>
void in_one_thread(Work&& work) {
  std::exception_ptr thrown;
#pragma omp parallel num_threads(2)
#pragma omp master
  try {
    work();
  } catch (...) {
    thrown = std::current_exception();
  }
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace
