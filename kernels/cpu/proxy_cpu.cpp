// ltepass::proxy_scores and tiered_ffn on the CPU, through libtorch's stable ABI (see README.md).

#include "linear_tensors.h"
#include "proxy_tensors.h"
#include "tiers.h"

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

// Planes beside the proxy's own: what Kept holds while a call runs.
class KeptPlane {
 public:
  KeptPlane(const Tensor& codes, const Tensor& multipliers, const Tensor& scales, int64_t k, const Proxy& beside,
            const char* name)
      : codes_(dense(codes)), multipliers_(dense(multipliers)), scales_(dense(scales)) {
    const int64_t blocks = beside.blocks(), bytes = beside.codes.bytes;
    check(codes, ScalarType::Byte, {k, beside.d_ff, bytes}, name, "codes");
    check(multipliers, ScalarType::Byte, {k, beside.d_ff, blocks}, name, "multipliers");
    check(scales, ScalarType::Float, {k, beside.d_ff}, name, "scales");
    plane.codes = {static_cast<const char*>(codes_.data_ptr()), bytes, bytes, k * beside.d_ff};
    plane.multipliers = static_cast<const uint8_t*>(multipliers_.data_ptr());
    plane.scales = static_cast<const float*>(scales_.data_ptr());
  }
  Plane plane{};

 private:
  static void check(const Tensor& t, ScalarType dtype, const std::vector<int64_t>& sizes, const char* name,
                    const char* part) {
    std::string wanted;
    for (const int64_t n : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
    STD_TORCH_CHECK(is(t, dtype, sizes), name, "_", part, " is ", words_of(t), "; expected ", name_of(dtype), " [", wanted,
                    "]");
  }
  Tensor codes_, multipliers_, scales_;
};

Tensor in_fp32(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

float number(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(is(t, ScalarType::Float, {}), name, " is ", words_of(t), "; expected float32 []");
  return *static_cast<const float*>(t.data_ptr());
}

Tensor tiered_ffn_op(const Tensor& x_in, const Tensor& codes, const OptionalTensor& multipliers, const Tensor& scales,
                     const OptionalTensor& biases, const Tensor& sizes, const Tensor& weight, const Tensor& bias,
                     const Tensor& threshold, const Tensor& floor, const Tensor& down_codes,
                     const Tensor& down_multipliers, const Tensor& down_scales, const Tensor& low_codes,
                     const Tensor& low_multipliers, const Tensor& low_scales, const OptionalTensor& down_bias_in,
                     const std::string& activation) {
  STD_TORCH_CHECK(x_in.dim() >= 1 && (is_float(x_in.scalar_type()) || x_in.scalar_type() == ScalarType::Double), "x is ",
                  words_of(x_in), "; expected floats [..., d_model]");
  if (x_in.scalar_type() == ScalarType::Double) {
    check_bias(down_bias_in, x_in, x_in.size(-1));
    const OptionalTensor bias_32 = down_bias_in ? OptionalTensor(in_fp32(*down_bias_in)) : std::nullopt;
    return torch::stable::to(
        tiered_ffn_op(in_fp32(x_in), codes, multipliers, scales, biases, sizes, weight, bias, threshold, floor, down_codes,
                      down_multipliers, down_scales, low_codes, low_multipliers, low_scales, bias_32, activation),
        ScalarType::Double);
  }
  const Tensor x = dense(x_in), y = output_of(x, x.size(-1));
  const KeptProxy kept({codes, multipliers, scales, biases, sizes, weight, bias}, x.size(-1), act_from_name(activation.c_str()));
  const Proxy& proxy = kept.proxy;
  STD_TORCH_CHECK(proxy.group == 1, "router_weight is ", words_of(weight), "; expected one of each of the ", proxy.d_ff,
                  " neurons");
  const KeptPlane down(down_codes, down_multipliers, down_scales, 1, proxy, "down");
  const KeptPlane low(low_codes, low_multipliers, low_scales, proxy.k + 1, proxy, "low");
  check_bias(down_bias_in, x, proxy.d_model);
  const OptionalTensor down_bias = down_bias_in ? OptionalTensor(dense(*down_bias_in)) : std::nullopt;
  const Tiers tiers{proxy, down.plane, low.plane, number(threshold, "threshold"), number(floor, "floor")};
  const int64_t tokens = tokens_of(x);
  if (tokens == 0) return y;
  with_type(x, [&]<class E>() {
    using T = typename E::T;
    tiered_ffn<E>(tiers, static_cast<const T*>(x.data_ptr()), tokens, down_bias ? down_bias->data_ptr() : nullptr,
                  static_cast<T*>(y.data_ptr()), threads_here());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ltepass, CPU, m) {
  m.impl("proxy_scores", TORCH_BOX(&proxy_scores));
  m.impl("tiered_ffn", TORCH_BOX(&tiered_ffn_op));
  m.impl("_tiered_ffn_no_grad", TORCH_BOX(&tiered_ffn_op));
}
