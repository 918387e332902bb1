// The activations, on vectors of fp32.
#pragma once

#include "simd.h"

namespace {

inline vf select(vi mask, vf a, vf b) {
  return reinterpret_cast<vf>((mask & reinterpret_cast<vi>(a)) | (~mask & reinterpret_cast<vi>(b)));
}

// exp by x = n ln2 + r, |r| <= ln2/2, and the Taylor series of exp(r) to r^7: within 2 ulp of the true value.
inline vf exp_v(vf x) {
  x = select(x < splat(-87.3f), splat(-87.3f), select(x > splat(88.7f), splat(88.7f), x));
  const vf round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  vf n = x * splat(1.44269504f) + round;
  vi exponent = reinterpret_cast<vi>(n) << 23;
  n -= round;
  vf r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
  vf p = splat(1.98412698e-4f);
  for (float c : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + splat(c);
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + exponent);
}

inline vf sigmoid_v(vf x) { return splat(1.0f) / (splat(1.0f) + exp_v(-x)); }

// erfc(|z|) to 1.2e-7 relative (Numerical Recipes' Chebyshev fit), so that gelu keeps its digits far below zero.
inline vf erfc_abs(vf z) {
  z = select(z < splat(0), -z, z);
  vf t = splat(1.0f) / (splat(1.0f) + splat(0.5f) * z);
  vf p = splat(0.17087277f);
  for (float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f,
                  1.00002368f, -1.26551223f})
    p = p * t + splat(c);
  return t * exp_v(p - z * z);
}

inline vf gelu_v(vf x) {
  vf tail = splat(0.5f) * erfc_abs(x * splat(0.70710678f));
  return x * select(x < splat(0), tail, splat(1.0f) - tail);
}

enum class Act { silu, gelu, gelu_tanh, quick_gelu, relu, relu2, identity, unknown };

inline vf activate(Act act, vf x) {
  const vf positive = select(x < splat(0), splat(0), x);  // a NaN stays one
  switch (act) {
    case Act::silu: return x * sigmoid_v(x);
    case Act::gelu: return gelu_v(x);
    // 0.5 (1 + tanh u) is sigmoid(2u)
    case Act::gelu_tanh: return x * sigmoid_v(splat(1.59576912f) * (x + splat(0.044715f) * x * x * x));
    case Act::quick_gelu: return x * sigmoid_v(splat(1.702f) * x);
    case Act::relu: return positive;
    case Act::relu2: return positive * positive;
    default: return x;
  }
}

inline Act act_from_name(const char* name) {
  const char* names[] = {"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "identity"};
  for (int i = 0; i < 7; i++)
    if (std::strcmp(name, names[i]) == 0) return Act(i);
  return Act::unknown;
}

}  // namespace
