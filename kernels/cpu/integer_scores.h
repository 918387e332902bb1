// What decides by integer sums: a proxy, or a linear router in int8, whose logits are those of
// ../routed_codes_reference.py bit for bit.
#pragma once

#include "proxy.h"

namespace {

constexpr int64_t MOST_INPUTS = ((int64_t(1) << 31) - 1) / (127 * 127);  // of a sum that fits in 32 bits

struct Int8Router {
  Rows codes;  // [n_experts, d_model]
  const float* scale;
};

// The integer sums of M tokens from `token` on and experts [e0, e1), as words of logits[token * stride + e - e0].
template <int M>
ALONE void router_sums(const Int8Router& r, const TokenCodes<1>& in, int64_t e0, int64_t e1, int64_t token, int64_t tokens,
                       float* logits, int64_t stride) {
  constexpr int64_t CHUNK = TokenCodes<1>::CHUNK;
  const int64_t n = r.codes.bytes;
  const char* xs[M];
  vi starts[M] = {};  // what takes off that weights are raised
  for (int m = 0; m < M; m++) {
    xs[m] = in.row(std::min(token + m, tokens - 1));
    for (int64_t i = 0; ADDED<true> && i < n; i += VB)
      starts[m] += *reinterpret_cast<const vi_mem*>(xs[m] + i / VB * CHUNK + VB);
  }
  for (int64_t e = e0; e < e1; e += LANES) {
    const char* rows[LANES];
    for (int l = 0; l < LANES; l++) rows[l] = r.codes.data + std::min(e + l, e1 - 1) * r.codes.stride;
    vi acc[M][LANES] = {};
    auto add = [&](int64_t chunk, auto&& bytes) INLINE {
      vb w[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; l++) w[l] = raised<true>(bytes(l));
#pragma GCC unroll 16
      for (int m = 0; m < M; m++) {
        const vb x = load_bytes(xs[m] + chunk * CHUNK);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) acc[m][l] = add_products<true>(acc[m][l], w[l], x);
      }
    };
    int64_t i = 0;
    for (; i + VB <= n; i += VB) {
#pragma GCC unroll 16
      for (int l = 0; l < LANES; l++) __builtin_prefetch(rows[l] + i + SCAN_AHEAD, 0, 2);
      add(i / VB, [&](int l) { return load_bytes(rows[l] + i); });
    }
    if (i < n) add(i / VB, [&](int l) { return load_last_bytes(rows[l] + i, n - i); });
    for (int m = 0; m < std::min<int64_t>(M, tokens - token); m++) {
      int32_t sums[LANES] = {};
      for (int l = 0; l < LANES; l++) acc[m][l] += starts[m];
      add_hsum4(acc[m], sums);
      std::memcpy(logits + (token + m) * stride + e - e0, sums, size_t(std::min<int64_t>(LANES, e1 - e)) * 4);
    }
  }
}

// logits[token * stride + e - e0] of experts [e0, e1), without their bias
inline void router_scan(const Int8Router& r, const TokenCodes<1>& in, int64_t e0, int64_t e1, int64_t tokens, float* logits,
                        int64_t stride) {
  for (int64_t token = 0; token < tokens; token += LINEAR_TOKENS)
    with_tokens(std::min<int64_t>(tokens - token, LINEAR_TOKENS),
                [&]<int M>() { router_sums<M>(r, in, e0, e1, token, tokens, logits, stride); });
  for (int64_t token = 0; token < tokens; token++)
    for (int64_t e = e0; e < e1; e += W) {
      const int64_t n = std::min<int64_t>(W, e1 - e);
      float* to = logits + token * stride + e - e0;
      const vf sums = to_float(reinterpret_cast<vi>(load_part<F32>(to, n)));
      store_part(to, product(product(sums, load_part<F32>(r.scale + e, n)), splat(in.scale(token))), n);
    }
}

// Scores of a call's tokens, where they are sums of integers.
class IntegerScores {
 public:
  IntegerScores(const Problem& p, int64_t tokens)
      : p_(p),
        proxied_(p.proxy ? TokenCodes<2>(p.d_model, p.proxy->codes.bytes, tokens) : TokenCodes<2>(0, 0, 0)),
        routed_(p.int8_router ? TokenCodes<1>(p.d_model, p.d_model, tokens) : TokenCodes<1>(0, 0, 0)) {}
  size_t bytes() const { return proxied_.bytes() + routed_.bytes(); }
  void reserve(Scratch& s) {
    proxied_.reserve(s);
    routed_.reserve(s);
  }
  template <class E>
  void lay(int64_t token, const typename E::T* x) const {
    if (p_.proxy) proxied_.lay<E>(token, x);
    if (p_.int8_router) routed_.lay<E>(token, x);
  }
  // logits[token * stride + e - e0] of experts [e0, e1); false where a router in floats decides, and nothing done
  bool scan(int64_t e0, int64_t e1, int64_t tokens, float* logits, int64_t stride) const {
    if (p_.proxy) proxy_scan(*p_.proxy, proxied_, e0, e1, 0, tokens, logits, stride);
    if (p_.int8_router) router_scan(*p_.int8_router, routed_, e0, e1, tokens, logits, stride);
    return p_.proxy || p_.int8_router;
  }

 private:
  const Problem& p_;
  TokenCodes<2> proxied_;
  TokenCodes<1> routed_;
};

}  // namespace
