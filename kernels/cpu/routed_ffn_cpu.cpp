// ltepass::routed_ffn on the CPU, through libtorch's stable ABI: built by g++ alone, one object per ISA (see README.md).

#include <string>
#include <tuple>

#include "batch.h"
#include "decode.h"
#include "dense.h"
#include "dense_codes.h"
#include "read_pass.h"
#include "routed_tensors.h"

namespace {

template <class E, class Q>
void batch_of_codes(const Problem& p, const Tensor& x, const Weights& w) {
  std::vector<std::pair<int64_t, int64_t>> spans;  // afterwards: linears work in the scratch memory that a batch holds
  batch<E, Q>(p, [&](int64_t first, int64_t tokens, const uint8_t*) { spans.emplace_back(first, tokens); });
  for (const auto& [first, tokens] : spans) dense_codes<E, Q>(p, x, w, first, tokens);
}

template <class E>
void run(const Problem& p, const Tensor& x, const Weights& w, const Tensor& y) {
  const bool nibbles = p.up_scales.data;
  if (p.tokens == 1) return nibbles ? decode<E, I4>(p) : p.up_scale ? decode<E, I8>(p) : decode<E>(p);
  if (nibbles) return batch_of_codes<E, I4>(p, x, w);
  if (p.up_scale) return batch_of_codes<E, I8>(p, x, w);
  const bool narrow = std::min(p.d_ff, p.d_out) < NARROW && p.threads > 1;
  batch<E, E>(p, [&](int64_t first, int64_t tokens, const uint8_t* mask) {
    auto work = [&] { dense<E>(p, x, w, y, first, tokens, mask); };
    narrow ? in_one_thread(work) : work();
  });
}

// fp64 (gradient checks) and anything else without a kernel: the few lines of PyTorch that ../routed_ffn.py registers.
std::tuple<Tensor, OptionalTensor> plain(const Tensor& x, const Deciding& router, const Tensor& threshold, const Weights& w,
                                         const std::string& activation, const OptionalTensor& cut,
                                         const OptionalTensor& input_cut) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::vector<StableIValue> stack{from(x)};
  if (const ProxyArguments* p = router.proxy)
    stack.insert(stack.end(), {from(p->codes), from(p->multipliers), from(p->scales), from(p->biases), from(p->sizes),
                               from(p->weight), from(p->bias)});
  else
    stack.insert(stack.end(), {from(*router.weight), from(*router.bias)});
  stack.insert(stack.end(), {from(threshold), from(w.up), from(w.up_bias), from(w.gate), from(w.gate_bias), from(w.down),
                             from(w.down_bias), from(activation), from(cut), from(input_cut)});
  const char* name = router.proxy ? "ltepass::_plain_proxy" : "ltepass::_plain";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), OptionalTensor(to<Tensor>(stack[1]))};
}

std::tuple<Tensor, OptionalTensor> forward(const Tensor& x_in, const Deciding& deciding, const Tensor& threshold,
                                           const Tensor& up, const OptionalTensor& up_bias,
                                           const OptionalTensor& gate, const OptionalTensor& gate_bias,
                                           const Tensor& down, const OptionalTensor& down_bias,
                                           const std::string& activation, const OptionalTensor& cut,
                                           const OptionalTensor& input_cut, bool with_mask,
                                           const Scales* scales = nullptr) {
  const bool nibbles = scales && scales->in_4_bits;
  const ScalarType dtype = x_in.scalar_type();
  const ScalarType stored = nibbles ? ScalarType::Byte : scales ? ScalarType::Char : dtype;
  const ScalarType stored_router = deciding.scale ? ScalarType::Char : ScalarType::Float;
  STD_TORCH_CHECK(!scales || is_float(dtype), "x is ", words_of(x_in), "; expected float32, bfloat16 or float16");
  const Weights weights{up, up_bias, gate, gate_bias, down, down_bias};
  if (dtype == ScalarType::Double) return plain(x_in, deciding, threshold, weights, activation, cut, input_cut);
  STD_TORCH_CHECK(x_in.dim() >= 1 && up.dim() == 2 && down.dim() == 2, "x should be [..., d_model] and the weights matrices");
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  Problem p{};
  p.d_model = x.size(-1), p.d_ff = up.size(0), p.d_out = nibbles ? 2 * down.size(1) : down.size(0);
  p.tokens = p.d_model ? x.numel() / p.d_model : 0;
  p.act = act_from_name(activation.c_str());
  STD_TORCH_CHECK(p.act != Act::unknown, "unknown activation ", activation);
  OptionalTensor router;
  Int8Router int8_router{};
  std::optional<KeptProxy> proxy;
  if (deciding.proxy) {
    proxy.emplace(*deciding.proxy, p.d_model, p.act);
    STD_TORCH_CHECK(proxy->proxy.d_ff == p.d_ff, "codes are of ", proxy->proxy.d_ff, " neurons, and up has ", p.d_ff);
    p.proxy = &proxy->proxy;
    p.n_experts = proxy->n_experts();
  } else {
    const Tensor& given = *deciding.weight;
    STD_TORCH_CHECK(given.dim() == 2, "x should be [..., d_model] and the weights matrices");
    router = given.stride(1) == 1 ? given : torch::stable::contiguous(given);
    p.n_experts = router->size(0);
  }
  STD_TORCH_CHECK(p.n_experts > 0 && p.d_ff % p.n_experts == 0, "d_ff is ", p.d_ff, " and there are ", p.n_experts,
                  " experts; expected a whole number of neurons each");
  p.group = p.d_ff / p.n_experts;
  if (router) check_weight(*router, stored_router, p.n_experts, p.d_model, deciding.scale ? "router_codes" : "router_weight");
  STD_TORCH_CHECK(!nibbles || (p.d_model % BLOCK == 0 && p.d_out % BLOCK == 0), "d_model is ", p.d_model, " and d_out ",
                  p.d_out, "; expected multiples of ", BLOCK);
  const int64_t row = nibbles ? p.d_model / 2 : p.d_model;
  check_weight(up, stored, p.d_ff, row, "up");
  if (gate) check_weight(*gate, stored, p.d_ff, row, "gate");
  if (nibbles)
    check_weight(down, stored, p.d_ff, p.d_out / 2, "down");
  else
    check_weight(down, stored, p.d_out, p.d_ff, "down");
  STD_TORCH_CHECK(threshold.numel() == 1 && threshold.scalar_type() == ScalarType::Float, "threshold should be [] fp32");
  const Weight up_weight(up, scales), down_weight(down, nibbles);
  std::optional<Weight> gate_weight;
  if (gate) gate_weight.emplace(*gate, scales);
  p.x = x.data_ptr(), p.x_stride = p.d_model;
  if (router) {
    p.router = {router->data_ptr(), router->stride(0), 1};
    if (deciding.scale) {
      STD_TORCH_CHECK(p.d_model <= MOST_INPUTS, "d_model is ", p.d_model, "; expected at most ", MOST_INPUTS);
      int8_router = {Kept(*router).rows(), scale_data(*deciding.scale, p.n_experts, "router_scale")};
      p.int8_router = &int8_router;
    }
    p.router_bias = static_cast<const float*>(bias_data(*deciding.bias, ScalarType::Float, p.n_experts, "router_bias"));
  }
  p.threshold = *static_cast<const float*>(threshold.data_ptr());
  p.up = up_weight.matrix, p.down = down_weight.matrix;
  if (nibbles) p.down = {p.down.data, 1, p.down.row};
  if (gate_weight) p.gate = gate_weight->matrix;
  p.up_bias = bias_data(up_bias, dtype, p.d_ff, "up_bias");
  p.gate_bias = bias_data(gate_bias, dtype, p.d_ff, "gate_bias");
  p.down_bias = bias_data(down_bias, dtype, p.d_out, "down_bias");
  if (scales) {
    STD_TORCH_CHECK(scales->gate.has_value() == gate.has_value(), "gate and gate_scale come together");
  }
  std::vector<BlockScales> block_scales;
  if (nibbles) {
    auto matrix = [&](const Tensor& t, int64_t blocks, const char* name) {
      return block_scales.emplace_back(t, p.d_ff, blocks, name).matrix;
    };
    p.up_scales = matrix(scales->up, p.d_model / BLOCK, "up_scale");
    if (gate) p.gate_scales = matrix(*scales->gate, p.d_model / BLOCK, "gate_scale");
    const Matrix down_scales = matrix(scales->down, p.d_out / BLOCK, "down_scale");
    p.down_scales = {down_scales.data, 1, down_scales.row};
  } else if (scales) {
    p.up_scale = scale_data(scales->up, p.d_ff, "up_scale");
    if (gate) p.gate_scale = scale_data(*scales->gate, p.d_ff, "gate_scale");
    p.down_scale = scale_data(scales->down, p.d_out, "down_scale");
  }
  p.cut = cut_of(cut, "cut");
  p.input_cut = cut_of(input_cut, "input_cut");
  p.dense_above = dense_above(stored, p.tokens, p.group);
  p.threads = threads_here();

  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = p.d_out;
  const Tensor y = empty(sizes, dtype_code(x));
  OptionalTensor mask;
  if (with_mask || (scales && p.dense_above < 1)) {
    sizes.back() = p.n_experts;
    mask = empty(sizes, aoti_torch_dtype_bool());
  }
  p.y = y.data_ptr();
  p.mask = mask ? static_cast<uint8_t*>(mask->data_ptr()) : nullptr;
  if (p.tokens > 0) {
    if (dtype == ScalarType::Float)
      run<F32>(p, x, weights, y);
    else if (dtype == ScalarType::BFloat16)
      run<BF16>(p, x, weights, y);
    else {
      STD_TORCH_CHECK(dtype == ScalarType::Half, "x should be fp32, bf16 or fp16");
      run<F16>(p, x, weights, y);
    }
  }
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor> counted(const std::tuple<Tensor, OptionalTensor>& result) {
  const auto& [y, mask] = result;
  const Tensor count = empty({}, aoti_torch_dtype_int64());
  const auto* on = static_cast<const uint8_t*>(mask->data_ptr());
  int64_t n = 0;
  for (int64_t i = 0; i < mask->numel(); i++) n += on[i];
  *static_cast<int64_t*>(count.data_ptr()) = n;
  return {y, *mask, count};
}

// y, or with the decision and its count beside it.
template <bool WITH_MASK>
auto result(const std::tuple<Tensor, OptionalTensor>& found) {
  if constexpr (WITH_MASK)
    return counted(found);
  else
    return std::get<0>(found);
}

template <bool WITH_MASK>
auto routed_ffn(const Tensor& x, const Tensor& router_weight, const OptionalTensor& router_bias, const Tensor& threshold,
                const Tensor& up, const OptionalTensor& up_bias, const OptionalTensor& gate,
                const OptionalTensor& gate_bias, const Tensor& down, const OptionalTensor& down_bias,
                const std::string& activation, const OptionalTensor& cut, const OptionalTensor& input_cut) {
  return result<WITH_MASK>(forward(x, {&router_weight, &router_bias}, threshold, up, up_bias, gate, gate_bias, down,
                                   down_bias, activation, cut, input_cut, WITH_MASK));
}

template <bool WITH_MASK>
auto routed_proxy_ffn(const Tensor& x, const Tensor& codes, const OptionalTensor& multipliers, const Tensor& scales,
                      const OptionalTensor& biases, const Tensor& sizes, const Tensor& router_weight,
                      const Tensor& router_bias, const Tensor& threshold, const Tensor& up,
                      const OptionalTensor& up_bias, const OptionalTensor& gate, const OptionalTensor& gate_bias,
                      const Tensor& down, const OptionalTensor& down_bias, const std::string& activation,
                      const OptionalTensor& cut, const OptionalTensor& input_cut) {
  const ProxyArguments proxy{codes, multipliers, scales, biases, sizes, router_weight, router_bias};
  return result<WITH_MASK>(forward(x, {nullptr, nullptr, &proxy}, threshold, up, up_bias, gate, gate_bias, down,
                                   down_bias, activation, cut, input_cut, WITH_MASK));
}

// BITS: 8 or 4, of the weights.
template <int BITS>
Tensor routed_ffn_codes(const Tensor& x, const Tensor& router_codes, const Tensor& router_scale,
                       const OptionalTensor& router_bias, const Tensor& threshold, const Tensor& up, const OptionalTensor& up_bias,
                       const OptionalTensor& gate, const OptionalTensor& gate_bias, const Tensor& down,
                       const OptionalTensor& down_bias, const Tensor& up_scale, const OptionalTensor& gate_scale,
                       const Tensor& down_scale, const std::string& activation, const OptionalTensor& cut,
                       const OptionalTensor& input_cut) {
  const Scales scales{up_scale, gate_scale, down_scale, BITS == 4};
  return std::get<0>(forward(x, {&router_codes, &router_bias, nullptr, &router_scale}, threshold, up, up_bias, gate,
                             gate_bias, down, down_bias, activation, cut, input_cut, false, &scales));
}

template <int BITS>
Tensor routed_proxy_ffn_codes(const Tensor& x, const Tensor& codes, const OptionalTensor& multipliers,
                             const Tensor& code_scales, const OptionalTensor& biases, const Tensor& sizes,
                             const Tensor& router_weight, const Tensor& router_bias, const Tensor& threshold,
                             const Tensor& up, const OptionalTensor& up_bias, const OptionalTensor& gate,
                             const OptionalTensor& gate_bias, const Tensor& down, const OptionalTensor& down_bias,
                             const Tensor& up_scale, const OptionalTensor& gate_scale, const Tensor& down_scale,
                             const std::string& activation, const OptionalTensor& cut,
                             const OptionalTensor& input_cut) {
  const ProxyArguments proxy{codes, multipliers, code_scales, biases, sizes, router_weight, router_bias};
  const Scales scales{up_scale, gate_scale, down_scale, BITS == 4};
  return std::get<0>(forward(x, {nullptr, nullptr, &proxy}, threshold, up, up_bias, gate, gate_bias, down, down_bias,
                             activation, cut, input_cut, false, &scales));
}

int64_t read_pass_op(const std::vector<Tensor>& buffers) {
  std::vector<Piece> pieces;
  for (const Tensor& t : buffers)
    pieces.push_back({static_cast<const char*>(t.data_ptr()), t.numel() * int64_t(t.element_size())});
  return int64_t(read_pass(pieces, int(torch::stable::get_num_threads())));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ltepass, CPU, m) {
  m.impl("routed_ffn", TORCH_BOX(&routed_ffn<false>));
  m.impl("_routed_ffn_no_grad", TORCH_BOX(&routed_ffn<false>));
  m.impl("routed_ffn_with_mask", TORCH_BOX(&routed_ffn<true>));
  m.impl("routed_proxy_ffn", TORCH_BOX(&routed_proxy_ffn<false>));
  m.impl("_routed_proxy_ffn_no_grad", TORCH_BOX(&routed_proxy_ffn<false>));
  m.impl("routed_proxy_ffn_with_mask", TORCH_BOX(&routed_proxy_ffn<true>));
  m.impl("routed_ffn_int8", TORCH_BOX(&routed_ffn_codes<8>));
  m.impl("routed_ffn_int4", TORCH_BOX(&routed_ffn_codes<4>));
  m.impl("routed_proxy_ffn_int8", TORCH_BOX(&routed_proxy_ffn_codes<8>));
  m.impl("routed_proxy_ffn_int4", TORCH_BOX(&routed_proxy_ffn_codes<4>));
  m.impl("_dense_above", TORCH_BOX(&dense_above_op));
  m.impl("_read_pass", TORCH_BOX(&read_pass_op));
}
