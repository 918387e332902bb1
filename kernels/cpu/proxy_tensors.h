// A proxy router as an op's arguments: checked, kept while a call runs, and its scores as an op of their own.
#pragma once

#include "pool.h"
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

constexpr int64_t SCORED = 32;      // experts that a thread takes at a time
constexpr int64_t SCORED_TOKENS = 64;  // and tokens

template <class E>
void score(const Proxy& p, const void* x, int64_t tokens, int64_t n_experts, float* logits) {
  Scratch& s = scratch();
  TokenCodes<2> in(p.d_model, p.codes.bytes, tokens);
  s.reserve(in.bytes());
  in.reserve(s);
  const int threads = threads_here();
  const auto* rows = static_cast<const typename E::T*>(x);
  by_pieces(tokens, tokens > SCORED_TOKENS ? threads : 1, [&](int64_t i, int) { in.lay<E>(i, rows + i * p.d_model); });
  const int64_t parts = (n_experts + SCORED - 1) / SCORED, spans = (tokens + SCORED_TOKENS - 1) / SCORED_TOKENS;
  by_pieces(parts * spans, threads, [&](int64_t i, int) {
    const int64_t e = i / spans * SCORED, t = i % spans * SCORED_TOKENS;
    proxy_scan(p, in, e, std::min(e + SCORED, n_experts), t, std::min(t + SCORED_TOKENS, tokens), logits + e, n_experts);
  });
}

Tensor proxy_scores(const Tensor& x_in, const Tensor& codes, const OptionalTensor& multipliers, const Tensor& scales,
                    const OptionalTensor& biases, const Tensor& sizes, const Tensor& weight, const Tensor& bias,
                    const std::string& activation) {
  STD_TORCH_CHECK(x_in.dim() >= 1, "x should be [..., d_model]");
  Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  if (x.scalar_type() == ScalarType::Double) x = torch::stable::to(x, ScalarType::Float);
  const int64_t d_model = x.size(-1);
  const KeptProxy kept({codes, multipliers, scales, biases, sizes, weight, bias}, d_model, act_from_name(activation.c_str()));
  int64_t tokens = 1;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  for (size_t i = 0; i + 1 < shape.size(); i++) tokens *= shape[i];
  shape.back() = kept.n_experts();
  const Tensor out = empty(shape, aoti_torch_dtype_float32());
  if (tokens == 0) return out;
  auto run = [&]<class E>() { score<E>(kept.proxy, x.data_ptr(), tokens, kept.n_experts(), static_cast<float*>(out.data_ptr())); };
  switch (x.scalar_type()) {
    case ScalarType::Float: run.template operator()<F32>(); break;
    case ScalarType::BFloat16: run.template operator()<BF16>(); break;
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "x should be fp32, fp64, bf16 or fp16");
      run.template operator()<F16>();
  }
  return out;
}

}  // namespace
