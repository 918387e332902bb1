// ltepass::linear, linear_int8, linear_int4 and linear_shortlist on the CPU, through libtorch's stable ABI (see README.md).

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "linear_tensors.h"
#include "quantised.h"
#include "shortlist.h"

namespace {

// From here the library's GEMM is worth asking for floats (see README.md, linears).
constexpr int64_t MOST_TOKENS = 32;

// ---- the checks of ../linear.py, in its words ----

void check(const Tensor& x, const char* name, const Tensor& weight, ScalarType dtype, int64_t per_element) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == dtype && weight.is_cpu(), name, " is ", words_of(weight),
                  "; expected a matrix of ", name_of(dtype));
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(-1) == per_element * weight.size(1), "x is ", words_of(x), " and ", name, " ",
                  words_of(weight), "; expected [..., d_in] and [d_out, d_in", per_element == 2 ? " / 2]" : "]");
}

void check_input(const Tensor& x) {
  STD_TORCH_CHECK(is_float(x.scalar_type()), "x is ", words_of(x), "; expected float32, bfloat16 or float16");
}

void check_blocks(const Tensor& t, const Tensor& codes, const char* name) {
  const int64_t blocks = codes.size(1) / (BLOCK / 2);
  STD_TORCH_CHECK(is(t, ScalarType::Half, {codes.size(0), blocks}), name, " is ", words_of(t), "; expected float16 [",
                  codes.size(0), ", ", blocks, "], one for each block of ", BLOCK);
}

// ---- the ops ----

// Whether the library's GEMM has units for factors of 16 bits; without, it takes 3 (bf16) to 10 times (fp16) what it
// takes for fp32. An object that was compiled without units for bf16 runs where there are none.
bool library_has_units(ScalarType dtype) {
#if defined(__x86_64__)
#if !defined(__AVX512BF16__)
  if (dtype == ScalarType::BFloat16) return false;
#endif
  static const bool fp16 = [] {  // asked once: a virtual machine answers CPUID in the host
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 23 & 1;
  }();
  if (dtype == ScalarType::Half) return fp16;
#endif
  return true;
}

// The library's fp32 GEMM, rows of the weight widened a tile at a time.
template <class E>
Tensor widened(const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias_in) {
  using T = typename E::T;
  constexpr int64_t TILE = 1024;  // rows
  const Tensor x = dense(x_in), y = output_of(x, weight.size(0));
  const OptionalTensor bias = bias_in ? OptionalTensor(dense(*bias_in)) : std::nullopt;
  const int64_t tokens = tokens_of(x), d_in = weight.size(1), d_out = weight.size(0), apart = weight.stride(0);
  const int threads = threads_here();
  auto wide = [&](const T* from, int64_t rows, int64_t step) {
    const Tensor to = empty({rows, d_in}, aoti_torch_dtype_float32());
    float* out = static_cast<float*>(to.data_ptr());
    by_pieces(rows, threads, [&](int64_t row, int) { widen<E>(from + row * step, out + row * d_in, d_in); });
    return to;
  };
  const Tensor inputs = wide(static_cast<const T*>(x.data_ptr()), tokens, d_in);
  for (int64_t first = 0; first < d_out; first += TILE) {
    const int64_t rows = std::min(TILE, d_out - first);
    const Tensor tile = wide(static_cast<const T*>(weight.data_ptr()) + first * apart, rows, apart);
    const Tensor sums = aten_linear(inputs, tile, std::nullopt);
    const float* from = static_cast<const float*>(sums.data_ptr());
    by_pieces(tokens, threads, [&](int64_t token, int) {
      T* to = static_cast<T*>(y.data_ptr()) + token * d_out + first;
      for (int64_t r = 0; r < rows; r++)
        to[r] = E::from_float(from[token * rows + r] + bias_at<E>(bias ? bias->data_ptr() : nullptr, first + r));
    });
  }
  return y;
}

Tensor linear_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check(x, "weight", weight, x.scalar_type(), 1);
  const bool rows_lie = weight.stride(1) == 1 || weight.size(1) <= 1;
  if (!is_float(x.scalar_type()) || !rows_lie || tokens_of(x) > MOST_TOKENS) {
    check_bias(bias, x, weight.size(0));
    if (!rows_lie || library_has_units(x.scalar_type())) return aten_linear(x, weight, bias);
    return x.scalar_type() == ScalarType::Half ? widened<F16>(x, weight, bias) : widened<BF16>(x, weight, bias);
  }
  const Rows rows = Kept(weight).rows();
  if (x.scalar_type() == ScalarType::Float) return apply(FloatLinear<F32>{rows, x.size(-1), nullptr}, x, bias);
  if (x.scalar_type() == ScalarType::BFloat16) return apply(FloatLinear<BF16>{rows, x.size(-1), nullptr}, x, bias);
  return apply(FloatLinear<F16>{rows, x.size(-1), nullptr}, x, bias);
}

Tensor linear_int8(const Tensor& x, const Tensor& codes, const Tensor& scale_in, const OptionalTensor& bias) {
  check_input(x);
  check(x, "codes", codes, ScalarType::Char, 1);
  STD_TORCH_CHECK(is(scale_in, ScalarType::Float, {codes.size(0)}), "scale is ", words_of(scale_in),
                  "; expected float32 [", codes.size(0), "], one for each row of codes");
  const Kept kept(codes);
  const Tensor scale = dense(scale_in);
  return apply(Int8Linear(kept.rows(), x.size(-1), static_cast<const float*>(scale.data_ptr())), x, bias);
}

Tensor linear_int4(const Tensor& x, const Tensor& codes, const Tensor& scale, const OptionalTensor& minimum,
                   const OptionalTensor& bias) {
  check_input(x);
  STD_TORCH_CHECK(codes.dim() != 2 || codes.size(1) % (BLOCK / 2) == 0, "codes are ", words_of(codes),
                  ", two a byte: d_in is ", 2 * codes.size(1), "; expected a multiple of ", BLOCK);
  check(x, "codes", codes, ScalarType::Byte, 2);
  check_blocks(scale, codes, "scale");
  if (minimum) check_blocks(*minimum, codes, "minimum");
  const Kept kept(codes), scales(scale), minima(minimum.value_or(scale));
  if (minimum) return apply(Int4Linear<true>(kept.rows(), scales.rows(), minima.rows()), x, bias);
  return apply(Int4Linear<false>(kept.rows(), scales.rows(), minima.rows()), x, bias);
}

Tensor linear_shortlist(const Tensor& x_in, const Tensor& codes, const Tensor& scale_in, const Tensor& scan_codes,
                        const Tensor& scan_scale, int64_t rows, const OptionalTensor& bias_in) {
  check_input(x_in);
  check(x_in, "codes", codes, ScalarType::Char, 1);
  STD_TORCH_CHECK(is(scale_in, ScalarType::Float, {codes.size(0)}), "scale is ", words_of(scale_in),
                  "; expected float32 [", codes.size(0), "], one for each row of codes");
  STD_TORCH_CHECK(rows >= 1, "rows is ", rows, "; expected at least 1");
  const Tensor x = dense(x_in), y = linear_int4(x, scan_codes, scan_scale, std::nullopt, bias_in);
  STD_TORCH_CHECK(codes.size(0) == scan_codes.size(0), "codes are ", words_of(codes), " and scan_codes ",
                  words_of(scan_codes), "; expected equal rows");
  if (y.numel() == 0 || x.size(-1) == 0) return y;
  const Kept kept(codes);
  const Tensor scale = dense(scale_in);
  const OptionalTensor bias = bias_in ? OptionalTensor(dense(*bias_in)) : std::nullopt;
  with_type(x, [&]<class E>() {
    using T = typename E::T;
    refine<E>(Int8Linear(kept.rows(), x.size(-1), static_cast<const float*>(scale.data_ptr())),
              static_cast<const T*>(x.data_ptr()), tokens_of(x), rows, bias ? bias->data_ptr() : nullptr,
              static_cast<T*>(y.data_ptr()), threads_here());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ltepass, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_op));
  m.impl("_linear_no_grad", TORCH_BOX(&linear_op));
  m.impl("linear_int8", TORCH_BOX(&linear_int8));
  m.impl("_linear_int8_no_grad", TORCH_BOX(&linear_int8));
  m.impl("linear_int4", TORCH_BOX(&linear_int4));
  m.impl("_linear_int4_no_grad", TORCH_BOX(&linear_int4));
  m.impl("linear_shortlist", TORCH_BOX(&linear_shortlist));
}
