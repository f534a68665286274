// Normalization, rotary embedding and gated activations on the CPU, one pass over memory each.
//
// Arithmetic is fp32. Where the reference bodies round to the tensors' dtype, `round` does too, so
// that bf16 results differ from theirs by the order of one sum at most. Rows are independent and
// split evenly over the threads. Plain loops, of which the compiler makes vectors; rounding to bf16
// is what it does badly, so norms and RoPE of bf16 are written out.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "call.h"
#include "isa.h"
#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int64_t kAlone = 1 << 13;  // elements that one thread does sooner than two are woken

// A tensor of rows: row (i, j) begins at data + i * outer + j * inner.
template <typename T>
struct Rows {
  T* data;
  int64_t outer, inner;
  T* at(int64_t i, int64_t j) const { return data + i * outer + j * inner; }
};

// One row: x (plus r, which makes `sum`) normalized, and multiplied by the weight if there is one.
template <typename T>
void normalize(const T* x, const T* r, const T* weight, T* out, T* sum, int64_t width, float eps,
               float weight_offset, bool cast_first) {
  if (r) {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) store(sum + k, load(x[k]) + load(r[k]));
    x = sum;
  }
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < width; ++k) squares += load(x[k]) * load(x[k]);
  const float scale = 1.0f / std::sqrt(squares / float(width) + eps);
  if (!weight) {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k) store(out + k, load(x[k]) * scale);
  } else if (cast_first) {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k)
      store(out + k, round<T>(load(x[k]) * scale) * load(weight[k]));
  } else {
#pragma omp simd
    for (int64_t k = 0; k < width; ++k)
      store(out + k, load(x[k]) * scale * (load(weight[k]) + weight_offset));
  }
}

#ifdef HAVE_VECTORS
// The same for a width that is a multiple of 16.
void normalize_vectors(const bf16* x, const bf16* r, const bf16* weight, bf16* out, bf16* sum,
                       int64_t width, float eps, float weight_offset, bool cast_first) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < width; k += 16) {
    __m512 value = load16(x + k);
    if (r) {
      const __m256i total = narrow(_mm512_add_ps(value, load16(r + k)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sum + k), total);
      value = widen(total);
    }
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  if (r) x = sum;
  const float mean = _mm512_reduce_add_ps(squares) / float(width);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  const __m512 offset = _mm512_set1_ps(weight_offset);
  for (int64_t k = 0; k < width; k += 16) {
    __m512 value = _mm512_mul_ps(load16(x + k), scale);
    if (weight && cast_first)
      value = _mm512_mul_ps(rounded(value), load16(weight + k));
    else if (weight)
      value = _mm512_mul_ps(value, _mm512_add_ps(load16(weight + k), offset));
    store16(out + k, value);
  }
}
#endif

template <typename T>
void rms_norm(Rows<const T> input, Rows<const T> residual, const T* weight, Rows<T> output,
              Rows<T> total, int64_t num_outer, int64_t num_inner, int64_t width, float eps, float weight_offset,
              bool cast_first, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) \
    if (num_outer * num_inner * width > kAlone)
  for (int64_t row = 0; row < num_outer * num_inner; ++row) {
    int64_t i = row / num_inner, j = row % num_inner;
    const T* x = input.at(i, j);
    T* out = output.at(i, j);
    const T* r = residual.data ? residual.at(i, j) : nullptr;
    T* sum = residual.data ? total.at(i, j) : nullptr;
#ifdef HAVE_VECTORS
    if constexpr (sizeof(T) == 2)
      if (width % 16 == 0 && isa_level >= kAvx512Bf16) {
        normalize_vectors(x, r, weight, out, sum, width, eps, weight_offset, cast_first);
        continue;
      }
#endif
    normalize(x, r, weight, out, sum, width, eps, weight_offset, cast_first);
  }
}

// One head of rotary_dim elements; Table is the dtype of cos and sin, and fp32 if either is.
template <typename T, typename Table>
void rotate(const T* x, const Table* cos, const Table* sin, T* out, int64_t rotary_dim,
            int64_t head_dim, bool interleaved) {
  // Rounding of a product: bf16 only if both factors are.
  auto r = [](float value) {
    return sizeof(Table) == sizeof(T) ? round<T>(value) : value;
  };
  int64_t half = rotary_dim / 2;
  if (interleaved) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      float a = load(x[2 * i]), b = load(x[2 * i + 1]);
      store(out + 2 * i, r(a * load(cos[2 * i])) + r(-b * load(sin[2 * i])));
      store(out + 2 * i + 1, r(b * load(cos[2 * i + 1])) + r(a * load(sin[2 * i + 1])));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      float a = load(x[i]), b = load(x[i + half]);
      store(out + i, r(a * load(cos[i])) + r(-b * load(sin[i])));
      store(out + i + half, r(b * load(cos[i + half])) + r(a * load(sin[i + half])));
    }
  }
  std::memcpy(out + rotary_dim, x + rotary_dim, (head_dim - rotary_dim) * sizeof(T));
}

#ifdef HAVE_VECTORS
// The same for halves that are multiples of 16.
template <typename Table>
void rotate_vectors(const bf16* x, const Table* cos, const Table* sin, bf16* out,
                    int64_t rotary_dim, int64_t head_dim) {
  const int64_t half = rotary_dim / 2;
  auto r = [](__m512 value) { return sizeof(Table) == sizeof(bf16) ? rounded(value) : value; };
  for (int64_t i = 0; i < half; i += 16) {
    const __m512 a = load16(x + i), b = load16(x + i + half);
    const __m512 first = r(_mm512_mul_ps(a, load16(cos + i)));
    const __m512 second = r(_mm512_mul_ps(b, load16(cos + i + half)));
    store16(out + i, _mm512_sub_ps(first, r(_mm512_mul_ps(b, load16(sin + i)))));
    store16(out + i + half, _mm512_add_ps(second, r(_mm512_mul_ps(a, load16(sin + i + half)))));
  }
  std::memcpy(out + rotary_dim, x + rotary_dim, (head_dim - rotary_dim) * sizeof(bf16));
}
#endif

template <typename T, typename Table>
void rotate_head(const T* x, const Table* cos, const Table* sin, T* out, int64_t rotary_dim,
                 int64_t head_dim, bool interleaved) {
#ifdef HAVE_VECTORS
  if constexpr (sizeof(T) == 2)
    if (rotary_dim % 32 == 0 && !interleaved && isa_level >= kAvx512Bf16)
      return rotate_vectors(x, cos, sin, out, rotary_dim, head_dim);
#endif
  rotate(x, cos, sin, out, rotary_dim, head_dim, interleaved);
}

template <typename T, typename Table>
void rope(Rows<const T> query, Rows<const T> key, const Table* cos, const Table* sin,
          int64_t cos_stride, int64_t sin_stride, T* query_out, T* key_out, int64_t num_tokens,
          int64_t num_heads, int64_t num_kv_heads, int64_t query_dim, int64_t key_dim,
          int64_t rotary_dim, bool interleaved, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) \
    if (num_tokens * (num_heads * query_dim + num_kv_heads * key_dim) > kAlone)
  for (int64_t token = 0; token < num_tokens; ++token) {
    const Table *c = cos + token * cos_stride, *s = sin + token * sin_stride;
    for (int64_t head = 0; head < num_heads; ++head)
      rotate_head(query.at(token, head), c, s, query_out + (token * num_heads + head) * query_dim,
                  rotary_dim, query_dim, interleaved);
    for (int64_t head = 0; head < num_kv_heads; ++head)
      rotate_head(key.at(token, head), c, s, key_out + (token * num_kv_heads + head) * key_dim,
                  rotary_dim, key_dim, interleaved);
  }
}

template <typename T, float (*activation)(float)>
void gated(Rows<const T> gate, Rows<const T> up, Rows<T> output, int64_t num_outer,
           int64_t num_inner, int64_t width, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) \
    if (num_outer * num_inner * width > kAlone)
  for (int64_t row = 0; row < num_outer * num_inner; ++row) {
    const T* g = gate.at(row / num_inner, row % num_inner);
    const T* u = up.at(row / num_inner, row % num_inner);
    T* out = output.at(row / num_inner, row % num_inner);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      store(out + i, round<T>(activation(load(g[i]))) * load(u[i]));
  }
}

}  // namespace

// The C interface: one function per op and dtype. Strides are in elements.
#define GATED(T, NAME, ACTIVATION)                                                                \
  extern "C" void ACTIVATION##_mul_##NAME(                                                        \
      const T* gate, int64_t gate_outer, int64_t gate_inner, const T* up, int64_t up_outer,       \
      int64_t up_inner, T* output, int64_t output_outer, int64_t output_inner, int64_t num_outer, \
      int64_t num_inner, int64_t width, int num_threads) {                                        \
    gated<T, ACTIVATION>({gate, gate_outer, gate_inner}, {up, up_outer, up_inner},                \
                         {output, output_outer, output_inner}, num_outer, num_inner, width,       \
                         num_threads);                                                            \
  }                                                                                               \
  CALLABLE(ACTIVATION##_mul_##NAME)

#define ELEMENTWISE(T, NAME)                                                                      \
  extern "C" void rms_norm_##NAME(                                                                \
      const T* input, int64_t input_outer, int64_t input_inner, const T* residual,                \
      int64_t residual_outer, int64_t residual_inner, const T* weight, T* output,                 \
      int64_t output_outer, int64_t output_inner, T* total, int64_t total_outer,                  \
      int64_t total_inner, int64_t num_outer, int64_t num_inner, int64_t width, double eps,       \
      double weight_offset, int cast_first, int num_threads) {                                    \
    rms_norm<T>({input, input_outer, input_inner}, {residual, residual_outer, residual_inner},    \
                weight, {output, output_outer, output_inner}, {total, total_outer, total_inner},  \
                num_outer, num_inner, width, float(eps), float(weight_offset), cast_first,        \
                num_threads);                                                                     \
  }                                                                                               \
  CALLABLE(rms_norm_##NAME)                                                                       \
  GATED(T, NAME, silu)                                                                            \
  GATED(T, NAME, gelu_tanh)

#define ROPE(T, NAME, TABLE, TABLE_NAME)                                                          \
  extern "C" void rope_##TABLE_NAME##_tables_##NAME(                                              \
      const T* query, int64_t query_outer, int64_t query_inner, const T* key, int64_t key_outer,  \
      int64_t key_inner, const TABLE* cos, int64_t cos_stride, const TABLE* sin,                  \
      int64_t sin_stride, T* query_out, T* key_out, int64_t num_tokens, int64_t num_heads,        \
      int64_t num_kv_heads, int64_t query_dim, int64_t key_dim, int64_t rotary_dim,               \
      int interleaved, int num_threads) {                                                         \
    rope<T, TABLE>({query, query_outer, query_inner}, {key, key_outer, key_inner}, cos, sin,      \
                   cos_stride, sin_stride, query_out, key_out, num_tokens, num_heads,             \
                   num_kv_heads, query_dim, key_dim, rotary_dim, interleaved, num_threads);       \
  }                                                                                               \
  CALLABLE(rope_##TABLE_NAME##_tables_##NAME)

ELEMENTWISE(float, float32)
ELEMENTWISE(bf16, bfloat16)
ROPE(float, float32, float, float32)
ROPE(bf16, bfloat16, bf16, bfloat16)
ROPE(bf16, bfloat16, float, float32)
