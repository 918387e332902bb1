// With weights in int8, where too few pairs are skipped: all neurons as linears of few bits, then the mask.
#pragma once

#include "dense.h"
#include "linear_tensors.h"

namespace {

Tensor as_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// x [tokens, d_model] fp32 -> [tokens, rows of the codes] fp32
Tensor linear_of_codes(const Tensor& x, const Tensor& codes, const float* scale, const OptionalTensor& bias) {
  const Kept kept(codes);
  return apply(Int8Linear(kept.rows(), x.size(-1), scale), x, bias ? OptionalTensor(as_float(*bias)) : std::nullopt);
}

// p.mask is not null.
template <class E>
void dense_int8(const Problem& p, const Tensor& x, const Weights& w, int64_t first, int64_t tokens) {
  const Tensor rows = as_float(seen<E>(p, x, first, tokens));
  const Tensor h = linear_of_codes(rows, w.up, p.up_scale, w.up_bias);
  OptionalTensor gate;
  if (w.gate) gate = linear_of_codes(rows, *w.gate, p.gate_scale, w.gate_bias);
  activate_and_mask<F32>(p, static_cast<float*>(h.data_ptr()), gate ? static_cast<const float*>(gate->data_ptr()) : nullptr,
                         p.mask + first * p.n_experts, tokens);
  const Tensor sums = aten_linear(h, as_float(w.down), std::nullopt);
  by_pieces(tokens, p.threads, [&](int64_t i, int) {
    float* from = static_cast<float*>(sums.data_ptr()) + i * p.d_out;
    write_out<E>(p, from, 1, 0, 0, p.d_out, static_cast<typename E::T*>(p.y) + (first + i) * p.d_out);
  });
}

}  // namespace
