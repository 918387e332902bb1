// What the ops need of libtorch, through its stable ABI.
#pragma once

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "element_types.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Straight to the allocator: torch::stable::empty looks its operator up by name, 1.5 us a call.
Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// y = x w^T + bias of fp32 by oneDNN; throws where torch was built without it.
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  const std::optional<std::string> no_algorithm;
  StableIValue stack[] = {from(x), from(weight), from(bias), from(std::string("none")), from(std::vector<double>{}),
                          from(no_algorithm)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Torch takes MKL for fp32, whose sums use half of the vector units of an AMD with AVX-512: 109 GFLOP/s of one core of
// Zen 5 where oneDNN does 249 (512 tokens, 576 x 1536).
bool onednn_is_faster() {
#if defined(__x86_64__)
  static const bool faster = [] {
    if (!__builtin_cpu_is("amd") || !__builtin_cpu_supports("avx512f")) return false;
    try {
      const Tensor one = torch::stable::new_zeros(empty({1, 1}, aoti_torch_dtype_float32()), {1, 1});
      onednn_linear(one, one, std::nullopt);
      return true;
    } catch (...) {
      return false;
    }
  }();
  return faster;
#else
  return false;
#endif
}

constexpr int64_t WORTH_A_COPY = 128;  // tokens from which on a weight that lies otherwise is copied for it: 1 ms of 8

Tensor aten_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  using torch::stable::detail::from;
  const bool fp32 = x.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float;
  if (fp32 && x.numel() && onednn_is_faster()) {
    if (weight.is_contiguous()) return onednn_linear(x, weight, bias);
    if (x.numel() >= WORTH_A_COPY * x.size(-1)) return onednn_linear(x, torch::stable::contiguous(weight), bias);
  }
  StableIValue stack[] = {from(x), from(weight), from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// Inside somebody's parallel region there are no further threads to take.
int threads_here() { return omp_in_parallel() ? 1 : int(torch::stable::get_num_threads()); }

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

// f<E>() for the element type of x, one that is_float
template <class F>
void with_type(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Float) return f.template operator()<F32>();
  if (x.scalar_type() == ScalarType::BFloat16) return f.template operator()<BF16>();
  f.template operator()<F16>();
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// ---- words for messages ----

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    default: return "another dtype";
  }
}

// "float32 [40, 64]"
std::string words_of(const Tensor& t) {
  std::string out = std::string(name_of(t.scalar_type())) + (t.is_cpu() ? " [" : " on another device [");
  for (int64_t i = 0; i < t.dim(); i++) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

}  // namespace
