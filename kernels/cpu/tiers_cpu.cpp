// ltepass::tiered_ffn and packed_tiered_ffn on the CPU, through libtorch's stable ABI (see README.md).

#include "linear_tensors.h"
#include "packed_tiers.h"
#include "proxy_tensors.h"

namespace {

void check_part(const Tensor& t, ScalarType dtype, const std::vector<int64_t>& sizes, const char* name,
                const char* part = "") {
  if (is(t, dtype, sizes)) return;
  std::string wanted;
  for (const int64_t n : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
  STD_TORCH_CHECK(false, name, part, " is ", words_of(t), "; expected ", name_of(dtype), " [", wanted, "]");
}

void check_floats(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && (is_float(x.scalar_type()) || x.scalar_type() == ScalarType::Double), "x is ",
                  words_of(x), "; expected floats [..., d_model]");
}

// Planes beside the proxy's own: what Kept holds while a call runs.
class KeptPlane {
 public:
  KeptPlane(const Tensor& codes, const Tensor& multipliers, const Tensor& scales, int64_t k, const Proxy& beside,
            const char* name)
      : codes_(dense(codes)), multipliers_(dense(multipliers)), scales_(dense(scales)) {
    const int64_t blocks = beside.blocks(), bytes = beside.codes.bytes;
    check_part(codes, ScalarType::Byte, {k, beside.d_ff, bytes}, name, "_codes");
    check_part(multipliers, ScalarType::Byte, {k, beside.d_ff, blocks}, name, "_multipliers");
    check_part(scales, ScalarType::Float, {k, beside.d_ff}, name, "_scales");
    plane.codes = {static_cast<const char*>(codes_.data_ptr()), bytes, bytes, k * beside.d_ff};
    plane.multipliers = static_cast<const uint8_t*>(multipliers_.data_ptr());
    plane.scales = static_cast<const float*>(scales_.data_ptr());
  }
  Plane plane{};

 private:
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
  check_floats(x_in);
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

Tensor packed_tiered_ffn_op(const Tensor& x_in, const Tensor& high_in, const Tensor& low_in, const OptionalTensor& biases_in,
                            const Tensor& sizes_in, const Tensor& weight_in, const Tensor& bias, const Tensor& threshold,
                            const Tensor& floor, const OptionalTensor& down_bias_in, const std::string& activation) {
  check_floats(x_in);
  if (x_in.scalar_type() == ScalarType::Double) {
    check_bias(down_bias_in, x_in, x_in.size(-1));
    const OptionalTensor bias_32 = down_bias_in ? OptionalTensor(in_fp32(*down_bias_in)) : std::nullopt;
    return torch::stable::to(packed_tiered_ffn_op(in_fp32(x_in), high_in, low_in, biases_in, sizes_in, weight_in, bias,
                                                  threshold, floor, bias_32, activation),
                             ScalarType::Double);
  }
  const Tensor x = dense(x_in), y = output_of(x, x.size(-1));
  STD_TORCH_CHECK(low_in.dim() == 3 && (low_in.size(1) == 2 || low_in.size(1) == 3), "low is ", words_of(low_in),
                  "; expected uint8 [d_ff, 2 or 3, bytes]");
  STD_TORCH_CHECK(low_in.size(0) > 0, "low is of no neurons");
  const Tensor high = dense(high_in), low = dense(low_in), sizes = dense(sizes_in), weight = dense(weight_in);
  const OptionalTensor biases = biases_in ? OptionalTensor(dense(*biases_in)) : std::nullopt;
  Proxy proxy{};
  proxy.k = low.size(1) - 1, proxy.d_model = x.size(-1), proxy.d_ff = low.size(0), proxy.group = 1;
  proxy.act = act_from_name(activation.c_str());
  STD_TORCH_CHECK(proxy.act != Act::unknown, "unknown activation ", activation);
  PackedTiers t{proxy, nullptr, nullptr, number(threshold, "threshold"), number(floor, "floor")};
  check_part(high, ScalarType::Byte, {(proxy.d_ff + GROUP - 1) / GROUP, t.group_bytes()}, "high");
  check_part(low, ScalarType::Byte, {proxy.d_ff, proxy.k + 1, t.row_bytes()}, "low");
  check_part(sizes, ScalarType::Float, {proxy.d_ff}, "sizes");
  check_part(weight, ScalarType::Float, {proxy.d_ff}, "router_weight");
  if (biases) check_part(*biases, ScalarType::Float, {proxy.k, proxy.d_ff}, "biases");
  check_bias(down_bias_in, x, proxy.d_model);
  const OptionalTensor down_bias = down_bias_in ? OptionalTensor(dense(*down_bias_in)) : std::nullopt;
  t.high = static_cast<const char*>(high.data_ptr()), t.low = static_cast<const char*>(low.data_ptr());
  proxy.sizes = static_cast<const float*>(sizes.data_ptr()), proxy.weight = static_cast<const float*>(weight.data_ptr());
  proxy.bias = number(bias, "router_bias");
  if (biases) proxy.biases = static_cast<const float*>(biases->data_ptr());
  const int64_t tokens = tokens_of(x);
  if (tokens == 0) return y;
  with_type(x, [&]<class E>() {
    using T = typename E::T;
    packed_tiered_ffn<E>(t, static_cast<const T*>(x.data_ptr()), tokens, down_bias ? down_bias->data_ptr() : nullptr,
                         static_cast<T*>(y.data_ptr()), threads_here());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ltepass, CPU, m) {
  m.impl("tiered_ffn", TORCH_BOX(&tiered_ffn_op));
  m.impl("_tiered_ffn_no_grad", TORCH_BOX(&tiered_ffn_op));
  m.impl("packed_tiered_ffn", TORCH_BOX(&packed_tiered_ffn_op));
  m.impl("_packed_tiered_ffn_no_grad", TORCH_BOX(&packed_tiered_ffn_op));
}
