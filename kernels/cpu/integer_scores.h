// What decides by integer sums: a proxy, or a linear router in int8, whose logits are those of
// ../routed_int8_reference.py bit for bit.
#pragma once

#include "proxy.h"

namespace {

constexpr int64_t MOST_INPUTS = ((int64_t(1) << 31) - 1) / (127 * 127);  // of a sum that fits in 32 bits

struct Int8Router {
  Rows codes;  // [n_experts, d_model]
  const float* scale;
};

// logits[token * stride + e - e0] of experts [e0, e1), without their bias
inline void router_scan(const Int8Router& r, const TokenCodes<1>& in, int64_t e0, int64_t e1, int64_t tokens, float* logits,
                        int64_t stride) {
  const int64_t n = r.codes.bytes;
  for (int64_t e = e0; e < e1; e++) {
    const char* w = r.codes.data + e * r.codes.stride;
    for (int64_t token = 0; token < tokens; token++) {
      const char* x = in.row(token);
      vi all = {};
      auto add = [&](vb codes) INLINE {
        all += add_products<true>(*reinterpret_cast<const vi_mem*>(x + VB), raised<true>(codes), load_bytes(x));
        x += TokenCodes<1>::CHUNK;
      };
      int64_t i = 0;
      for (; i + VB <= n; i += VB) {
        __builtin_prefetch(w + i + SCAN_AHEAD, 0, 2);
        add(load_bytes(w + i));
      }
      if (i < n) add(load_last_bytes(w + i, n - i));
      const vf z = product(splat(float(hsum(all))), splat(r.scale[e]));
      logits[token * stride + e - e0] = product(z, splat(in.scale(token)))[0];
    }
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
