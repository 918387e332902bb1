// ltepass::cached_attention on the CPU, through libtorch's stable ABI (see README.md).

#include "attention_tiles.h"

#include "tensors.h"

namespace {

// Up to here each token reads the cache for itself.
constexpr int64_t MOST_TOKENS = 4;

// ---- the checks of ../attention.py, in its words ----

bool same(const Tensor& a, const Tensor& b) { return std::ranges::equal(a.sizes(), b.sizes()); }

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cache, int64_t layer, const Tensor& position,
           std::optional<int64_t> window) {
  STD_TORCH_CHECK(q.dim() == 4 && q.is_cpu() && is_float(q.scalar_type()), "q is ", words_of(q),
                  "; expected float32, bfloat16 or float16 [batch, heads, tokens, size]");
  STD_TORCH_CHECK(k.dim() == 4 && same(k, v) && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                      k.is_cpu() && v.is_cpu() && k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3) &&
                      k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                  "q is ", words_of(q), ", k ", words_of(k), " and v ", words_of(v),
                  "; expected one dtype and [batch, heads, tokens, size], where the heads of q are a multiple of k's and v's");
  STD_TORCH_CHECK(cache.dim() == 6 && cache.is_cpu() && is_float(cache.scalar_type()) && cache.is_contiguous() &&
                      cache.size(1) == 2 && cache.size(2) == k.size(0) && cache.size(3) == k.size(1) &&
                      cache.size(5) == k.size(3),
                  "cache is ", words_of(cache), "; expected contiguous floats [layers, 2, ", k.size(0), ", ", k.size(1),
                  ", length, ", k.size(3), "]");
  STD_TORCH_CHECK(layer >= 0 && layer < cache.size(0), "layer is ", layer, "; expected one of ", cache.size(0));
  STD_TORCH_CHECK(position.numel() == 1 && position.is_cpu() && position.scalar_type() == ScalarType::Long,
                  "position is ", words_of(position), "; expected int64 []");
  STD_TORCH_CHECK(!window || *window > 0, "window is ", *window, "; expected at least 1");
}

// ---- the op ----

// One layer's half of the cache, and where tokens' keys or values begin in it.
struct Half {
  char* data;
  int64_t batch_stride, length, size;
};

template <class E, class C>
void write(const Tensor& from, const Half& to, int64_t position) {
  const int64_t heads = from.size(1), tokens = from.size(2), size = from.size(3);
  for (int64_t b = 0; b < from.size(0); b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t t = 0; t < tokens; t++) {
        const auto* row = static_cast<const typename E::T*>(from.data_ptr()) + b * from.stride(0) + h * from.stride(1) +
                          t * from.stride(2);
        auto* at = reinterpret_cast<typename C::T*>(to.data) + b * to.batch_stride + (h * to.length + position + t) * size;
        if constexpr (std::is_same_v<E, C>)
          std::memcpy(at, row, size_t(size) * sizeof(*at));
        else
          for (int64_t d = 0; d < size; d++) at[d] = C::from_float(E::to_float(row[d]));
      }
}

Tensor rows_dense(const Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : torch::stable::contiguous(t); }

Tensor cached_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cache, int64_t layer,
                        const Tensor& position_in, double scale, std::optional<int64_t> window_in) {
  check(q_in, k_in, v_in, cache, layer, position_in, window_in);
  const Tensor q = rows_dense(q_in), k = rows_dense(k_in), v = rows_dense(v_in);
  const int64_t tokens = q.size(2), length = cache.size(4), position = *static_cast<const int64_t*>(position_in.data_ptr());
  const int64_t window = window_in.value_or(std::numeric_limits<int64_t>::max() / 2);
  STD_TORCH_CHECK(position >= 0 && position + tokens <= length, "tokens ", position, " to ", position + tokens,
                  " do not fit into a cache of ", length);
  const int64_t half = cache.stride(1) * int64_t(cache.element_size());
  char* const data = static_cast<char*>(cache.data_ptr()) + 2 * layer * half;
  const Half keys{data, cache.stride(2), length, k.size(3)}, values{data + half, cache.stride(2), length, k.size(3)};
  const Tensor y = empty({q.size(0), tokens, q.size(1), q.size(3)}, dtype_code(q));
  with_type(q, [&]<class E>() {
    with_type(cache, [&]<class C>() {
      write<E, C>(k, keys, position);
      write<E, C>(v, values, position);
      if (y.numel() == 0) return;
      const Attention call{q.size(0), tokens, q.size(1), k.size(1), q.size(3), q.data_ptr(),
                           {q.stride(0), q.stride(1), q.stride(2)}, keys.data, values.data, keys.batch_stride, length,
                           position, window, float(scale), y.data_ptr(), threads_here()};
      tokens > MOST_TOKENS ? attend_tiles<E, C>(call) : attend<E, C>(call);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ltepass, CPU, m) { m.impl("cached_attention", TORCH_BOX(&cached_attention)); }
