// A proxy router as an op's arguments: checked, and kept while a call runs.
#pragma once

#include "proxy.h"
#include "tensors.h"

namespace {

struct ProxyArguments {
  const Tensor& codes;
  const OptionalTensor& multipliers;
  const Tensor& scales;
  const OptionalTensor& biases;
  const Tensor &sizes, &weight, &bias;
};

class KeptProxy {
 public:
  KeptProxy(const ProxyArguments& a, int64_t d_model, Act act) {
    const int64_t blocks = (d_model + BLOCK - 1) / BLOCK;
    STD_TORCH_CHECK(a.codes.dim() == 3 && (a.codes.size(0) == 1 || a.codes.size(0) == 2), "codes should be [1 or 2, d_ff, ",
                    blocks * (BLOCK / 2), "]");
    STD_TORCH_CHECK(a.weight.dim() == 1, "router_weight should be [n_experts]");
    const int64_t k = a.codes.size(0), d_ff = a.codes.size(1), n_experts = a.weight.size(0);
    STD_TORCH_CHECK(n_experts > 0 && d_ff % n_experts == 0, "d_ff is ", d_ff, " and there are ", n_experts,
                    " experts; expected a whole number of neurons each");
    proxy.codes.data = keep<char>(a.codes, ScalarType::Byte, {k, d_ff, blocks * (BLOCK / 2)}, "codes");
    proxy.codes.stride = proxy.codes.bytes = blocks * (BLOCK / 2), proxy.codes.count = k * d_ff;
    if (a.multipliers) proxy.multipliers = keep<uint8_t>(*a.multipliers, ScalarType::Byte, {k, d_ff, blocks}, "multipliers");
    proxy.scales = keep<float>(a.scales, ScalarType::Float, {k, d_ff}, "scales");
    if (a.biases) proxy.biases = keep<float>(*a.biases, ScalarType::Float, {k, d_ff}, "biases");
    proxy.sizes = keep<float>(a.sizes, ScalarType::Float, {d_ff}, "sizes");
    proxy.weight = keep<float>(a.weight, ScalarType::Float, {n_experts}, "router_weight");
    proxy.bias = *keep<float>(a.bias, ScalarType::Float, {}, "router_bias");
    proxy.k = k, proxy.d_model = d_model, proxy.d_ff = d_ff, proxy.group = d_ff / n_experts;
    STD_TORCH_CHECK(act != Act::unknown, "unknown activation");
    proxy.act = act;
  }
  KeptProxy(const KeptProxy&) = delete;
  int64_t n_experts() const { return proxy.d_ff / proxy.group; }
  Proxy proxy{};

 private:
  template <class T>
  const T* keep(const Tensor& t, ScalarType dtype, std::vector<int64_t> sizes, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.is_cpu() && std::ranges::equal(t.sizes(), sizes), name,
                    " of a proxy is of another shape, dtype or device than its codes and x say");
    kept_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return static_cast<const T*>(kept_.back().data_ptr());
  }
  std::vector<Tensor> kept_;
};

}  // namespace
