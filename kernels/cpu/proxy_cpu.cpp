// ltepass::proxy_scores on the CPU, through libtorch's stable ABI (see README.md).

#include "linear_tensors.h"
#include "proxy_tensors.h"
#include "pool.h"

namespace {

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
  STD_TORCH_CHECK(is_float(x.scalar_type()), "x should be fp32, fp64, bf16 or fp16");
  with_type(x, [&]<class E>() {
    score<E>(kept.proxy, x.data_ptr(), tokens, kept.n_experts(), static_cast<float*>(out.data_ptr()));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ltepass, CPU, m) {
  m.impl("proxy_scores", TORCH_BOX(&proxy_scores));
}
