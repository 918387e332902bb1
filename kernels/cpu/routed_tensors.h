// What the routed ops take, as tensors: weights where they lie, checks, and what decides.
#pragma once

#include "linear_tensors.h"
#include "proxy_tensors.h"

namespace {

// A weight that can be read where it lies; copied only where neither dimension is dense, or rows are not and should be.
struct Weight {
  Tensor kept;
  Matrix matrix;
  explicit Weight(const Tensor& t, bool by_rows = false) : kept(t) {
    const bool dense = t.stride(1) == 1 || t.size(1) == 1 || (!by_rows && t.stride(0) == 1);
    if (!dense) kept = torch::stable::contiguous(t);
    matrix.data = kept.data_ptr();
    matrix.row = kept.stride(0);
    matrix.col = kept.size(1) == 1 ? 1 : kept.stride(1);
  }
};

const void* bias_data(const OptionalTensor& t, ScalarType dtype, int64_t n, const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->dim() == 1 && t->size(0) == n && (t->stride(0) == 1 || n <= 1), name,
                  " should be contiguous, of shape [", n, "] and of its weight's dtype");
  return t->data_ptr();
}

void check_weight(const Tensor& t, ScalarType dtype, int64_t rows, int64_t cols, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols && t.scalar_type() == dtype && t.is_cpu(), name,
                  " is ", words_of(t), "; expected a CPU tensor of dtype ", name_of(dtype), " and shape [", rows, ", ",
                  cols, "]");
}

const float* scale_data(const Tensor& t, int64_t n, const char* name) {
  STD_TORCH_CHECK(is(t, ScalarType::Float, {n}) && t.is_contiguous(), name, " is ", words_of(t),
                  "; expected contiguous float32 [", n, "], one an output");
  return static_cast<const float*>(t.data_ptr());
}

float cut_of(const OptionalTensor& t, const char* name) {
  if (!t) return -1.0f;
  STD_TORCH_CHECK(t->numel() == 1 && t->scalar_type() == ScalarType::Float, name, " should be [] fp32");
  return *static_cast<const float*>(t->data_ptr());
}

// Of weights in 4 bits: halves [n, blocks], as they lie.
struct BlockScales {
  Tensor kept;
  Matrix matrix;  // a row an output of up and gate, a neuron of down
  BlockScales(const Tensor& t, int64_t n, int64_t blocks, const char* name) : kept(dense(t)) {
    STD_TORCH_CHECK(is(t, ScalarType::Half, {n, blocks}), name, " is ", words_of(t), "; expected float16 [", n, ", ", blocks,
                    "], one a block of ", BLOCK);
    matrix = {kept.data_ptr(), blocks, 1};
  }
};

// Of weights in codes.
struct Scales {
  const Tensor& up;
  const OptionalTensor& gate;
  const Tensor& down;
  bool in_4_bits = false;
};

// What decides: a linear, in int8 where it has scales, or a proxy.
struct Deciding {
  const Tensor* weight = nullptr;
  const OptionalTensor* bias = nullptr;
  const ProxyArguments* proxy = nullptr;
  const Tensor* scale = nullptr;
};

}  // namespace
