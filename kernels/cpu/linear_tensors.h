// A linear over few tokens on tensors: its weight's rows as they lie, the check of its bias, and the call.
#pragma once

#include "linear.h"
#include "long_inputs.h"
#include "tensors.h"

namespace {

int64_t tokens_of(const Tensor& x) {
  int64_t n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) n *= x.size(i);
  return n;
}

Tensor output_of(const Tensor& x, int64_t d_out) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = d_out;
  return empty(sizes, dtype_code(x));
}

bool is(const Tensor& t, ScalarType dtype, const std::vector<int64_t>& sizes) {
  return t.scalar_type() == dtype && t.is_cpu() && std::ranges::equal(t.sizes(), sizes);
}

void check_bias(const OptionalTensor& bias, const Tensor& x, int64_t d_out) {
  STD_TORCH_CHECK(!bias || is(*bias, x.scalar_type(), {d_out}), "bias is ", words_of(*bias), "; expected ",
                  name_of(x.scalar_type()), " [", d_out, "], x's dtype and one for each output");
}

// Rows as they lie; copied only where they are not dense.
struct Kept {
  Tensor tensor;
  explicit Kept(const Tensor& t) : tensor(t.stride(1) == 1 || t.size(1) <= 1 ? t : torch::stable::contiguous(t)) {}
  Rows rows() const {
    const int64_t bytes = tensor.element_size();
    return {static_cast<const char*>(tensor.data_ptr()), tensor.stride(0) * bytes, tensor.size(1) * bytes, tensor.size(0)};
  }
};

template <class L>
Tensor apply(L l, const Tensor& x_in, const OptionalTensor& bias_in) {
  check_bias(bias_in, x_in, l.weight.count);
  const Tensor x = dense(x_in), y = output_of(x, l.weight.count);
  const OptionalTensor bias = bias_in ? OptionalTensor(dense(*bias_in)) : std::nullopt;
  const int64_t tokens = tokens_of(x);
  if (tokens == 0 || l.weight.count == 0) return y;
  with_type(x, [&]<class E>() {
    using T = typename E::T;
    const auto* from = static_cast<const T*>(x.data_ptr());
    auto* to = static_cast<T*>(y.data_ptr());
    const void* b = bias ? bias->data_ptr() : nullptr;
    if constexpr (HAS_LONG_INPUTS && std::is_void_v<typename L::Input>)
      if (tokens >= LONG_FROM) return long_linear<E>(l, from, tokens, b, to, threads_here());
    if constexpr (std::is_same_v<E, typename L::Input> || std::is_void_v<typename L::Input>)
      linear<E>(l, from, tokens, b, to, threads_here());
  });
  return y;
}

}  // namespace
