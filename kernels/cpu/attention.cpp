// Writing into the paged cache, and attention of one new token per sequence over it.
//
// For each sequence and KV head, the query heads of its group pass over the pages together, 16 slots
// at a time, with a running softmax in fp32 (Milakov and Gimelshein 2018, arXiv:1805.02867). Where
// there are fewer of those than threads, the pages are split and the parts joined at the end.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "numbers.h"

namespace {

constexpr int64_t kSlots = 16;  // looked at together; a block holds a multiple of it

template <typename T>
struct Pages {
  const T* data;  // [num_blocks, num_kv_heads, block_size, width]
  int64_t num_kv_heads, block_size, width;
  const T* at(int64_t block, int64_t head, int64_t slot) const {
    return data + ((block * num_kv_heads + head) * block_size + slot) * width;
  }
};

// What a part of the pages adds to a softmax: its largest score, the sum of the weights and their
// product with the values, per head of the group.
struct Partial {
  float* largest;  // [group]
  float* sum;      // [group]
  float* values;   // [group, v_width]
};

template <typename T>
void attend_part(const float* query, Pages<T> keys, Pages<T> values, const int32_t* table,
                 int64_t head, int64_t group, int64_t first, int64_t last, float scale,
                 float softcap, Partial out, float* scratch) {
  const int64_t width = keys.width, v_width = values.width;
  float* key = scratch;                // [width]
  float* value = key + width;          // [kSlots, v_width]
  float* score = value + kSlots * v_width;  // [group, kSlots]
  for (int64_t g = 0; g < group; ++g) {
    out.largest[g] = -INFINITY;
    out.sum[g] = 0.0f;
  }
  std::fill(out.values, out.values + group * v_width, 0.0f);
  for (int64_t slot = first; slot < last;) {
    const int64_t block = table[slot / keys.block_size], offset = slot % keys.block_size;
    const int64_t count = std::min(last - slot, kSlots - offset % kSlots);
    const T* k = keys.at(block, head, offset);
    const T* v = values.at(block, head, offset);
    for (int64_t s = 0; s < count; ++s) {
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) key[d] = load(k[s * width + d]);
      for (int64_t g = 0; g < group; ++g) {
        const float* q = query + g * width;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t d = 0; d < width; ++d) dot += q[d] * key[d];
        score[g * kSlots + s] = dot * scale;
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < count * v_width; ++i) value[i] = load(v[i]);
    for (int64_t g = 0; g < group; ++g) {
      float* p = score + g * kSlots;
      float* total = out.values + g * v_width;
      float largest = out.largest[g];
      for (int64_t s = 0; s < count; ++s) {
        if (softcap != 0.0f) p[s] = softcap * std::tanh(p[s] / softcap);
        largest = std::max(largest, p[s]);
      }
      const float shrink = exponential(out.largest[g] - largest);
      float sum = out.sum[g] * shrink;
      for (int64_t s = 0; s < count; ++s) {
        p[s] = exponential(p[s] - largest);
        sum += p[s];
      }
      out.largest[g] = largest;
      out.sum[g] = sum;
      int64_t d = 0;
      for (; d + 16 <= v_width; d += 16) {
        float lanes[16];
#pragma omp simd
        for (int64_t j = 0; j < 16; ++j) lanes[j] = total[d + j] * shrink;
        for (int64_t s = 0; s < count; ++s)
#pragma omp simd
          for (int64_t j = 0; j < 16; ++j) lanes[j] += p[s] * value[s * v_width + d + j];
#pragma omp simd
        for (int64_t j = 0; j < 16; ++j) total[d + j] = lanes[j];
      }
      for (; d < v_width; ++d) {
        total[d] *= shrink;
        for (int64_t s = 0; s < count; ++s) total[d] += p[s] * value[s * v_width + d];
      }
    }
    slot += count;
  }
}

#ifdef __AVX512BF16__
#define FAST_PAGES 1

// e^x of 16 numbers, as `exponential`.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.3f)), _mm512_set1_ps(-87.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// 16 rows of 16 pairs become 16 columns: to[pair] holds that pair of all rows.
inline void transpose(__m512i row[16], __m512i* to) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i high_odd = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    _mm512_store_si512(to + i, _mm512_shuffle_i32x4(low, high, 0x88));
    _mm512_store_si512(to + 8 + i, _mm512_shuffle_i32x4(low, high, 0xdd));
    _mm512_store_si512(to + 4 + i, _mm512_shuffle_i32x4(low_odd, high_odd, 0x88));
    _mm512_store_si512(to + 12 + i, _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd));
  }
}

// Scores of `heads` query heads with 16 keys, given as pairs[width / 2].
template <int heads>
inline void dot_products(const bf16* query, int64_t width, const __m512i* pairs, __m512* score) {
  __m512 sum[heads];
  for (int g = 0; g < heads; ++g) sum[g] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < width / 2; ++pair) {
    const __m512i key = _mm512_load_si512(pairs + pair);
    for (int g = 0; g < heads; ++g) {
      int32_t q;
      std::memcpy(&q, query + g * width + 2 * pair, 4);
      sum[g] = _mm512_dpbf16_ps(sum[g], (__m512bh)key, (__m512bh)_mm512_set1_epi32(q));
    }
  }
  for (int g = 0; g < heads; ++g) score[g] = sum[g];
}

// total[16 * vectors] = total * shrink + weights @ value, over `count` slots.
template <int vectors>
inline void accumulate(float* total, float shrink, const float* weight, const float* value,
                       int64_t stride, int64_t count) {
  __m512 sum[vectors];
  for (int i = 0; i < vectors; ++i)
    sum[i] = _mm512_mul_ps(_mm512_loadu_ps(total + 16 * i), _mm512_set1_ps(shrink));
  for (int64_t s = 0; s < count; ++s) {
    const __m512 p = _mm512_set1_ps(weight[s]);
    for (int i = 0; i < vectors; ++i)
      sum[i] = _mm512_fmadd_ps(p, _mm512_loadu_ps(value + s * stride + 16 * i), sum[i]);
  }
  for (int i = 0; i < vectors; ++i) _mm512_storeu_ps(total + 16 * i, sum[i]);
}

// As the general one, for bf16 pages whose widths are multiples of 32 and 16.
void attend_part(const bf16* query, Pages<bf16> keys, Pages<bf16> values, const int32_t* table,
                 int64_t head, int64_t group, int64_t first, int64_t last, float scale,
                 float softcap, Partial out, float* scratch) {
  const int64_t width = keys.width, v_width = values.width;
  auto* pairs = reinterpret_cast<__m512i*>(scratch);          // [width / 2]
  float* value = scratch + width / 2 * 16;                    // [kSlots, v_width]
  auto* score = reinterpret_cast<__m512*>(value + kSlots * v_width);  // [group]
  std::fill(out.largest, out.largest + group, -INFINITY);
  std::fill(out.sum, out.sum + group, 0.0f);
  std::fill(out.values, out.values + group * v_width, 0.0f);
  for (int64_t slot = first; slot < last;) {
    const int64_t block = table[slot / keys.block_size], offset = slot % keys.block_size;
    const int64_t count = std::min(last - slot, kSlots - offset % kSlots);
    const bf16* k = keys.at(block, head, offset);
    const bf16* v = values.at(block, head, offset);
    if (slot + kSlots < last) {  // pages lie anywhere: the next one is on its way meanwhile
      const int64_t next = slot + kSlots, page = table[next / keys.block_size];
      const bf16* next_k = keys.at(page, head, next % keys.block_size / kSlots * kSlots);
      const bf16* next_v = values.at(page, head, next % keys.block_size / kSlots * kSlots);
      for (int64_t i = 0; i < kSlots * width; i += 32) _mm_prefetch(next_k + i, _MM_HINT_T0);
      for (int64_t i = 0; i < kSlots * v_width; i += 32) _mm_prefetch(next_v + i, _MM_HINT_T0);
    }
    for (int64_t d = 0; d < width; d += 32) {
      __m512i rows[16];
      for (int64_t s = 0; s < kSlots; ++s)  // slots that are not used may hold anything
        rows[s] = s < count ? _mm512_loadu_si512(k + s * width + d) : _mm512_setzero_si512();
      transpose(rows, pairs + d / 2);
    }
    for (int64_t i = 0; i < count * v_width; i += 16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v + i));
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
      _mm512_storeu_ps(value + i, _mm512_castsi512_ps(wide));
    }
    int64_t g = 0;
    for (; g + 4 <= group; g += 4) dot_products<4>(query + g * width, width, pairs, score + g);
    for (; g < group; ++g) dot_products<1>(query + g * width, width, pairs, score + g);
    const __mmask16 valid = __mmask16((1u << count) - 1);
    for (g = 0; g < group; ++g) {
      __m512 scores = _mm512_mul_ps(score[g], _mm512_set1_ps(scale));
      alignas(64) float weight[16];
      if (softcap != 0.0f) {
        _mm512_store_ps(weight, scores);
        for (int64_t s = 0; s < count; ++s) weight[s] = softcap * std::tanh(weight[s] / softcap);
        scores = _mm512_load_ps(weight);
      }
      const float largest = std::max(out.largest[g], _mm512_mask_reduce_max_ps(valid, scores));
      const float shrink = exponential(out.largest[g] - largest);
      const __m512 p =
          _mm512_maskz_mov_ps(valid, exponential(_mm512_sub_ps(scores, _mm512_set1_ps(largest))));
      _mm512_store_ps(weight, p);
      out.sum[g] = out.sum[g] * shrink + _mm512_reduce_add_ps(p);
      out.largest[g] = largest;
      float* total = out.values + g * v_width;
      int64_t d = 0;
      for (; d + 64 <= v_width; d += 64)
        accumulate<4>(total + d, shrink, weight, value + d, v_width, count);
      for (; d < v_width; d += 16)
        accumulate<1>(total + d, shrink, weight, value + d, v_width, count);
    }
    slot += count;
  }
}
#endif

// Two partials of one group become one, in the first.
void join(Partial to, Partial from, int64_t group, int64_t v_width) {
  for (int64_t g = 0; g < group; ++g) {
    if (from.sum[g] == 0.0f) continue;  // a sequence with fewer pages than parts
    const float largest = std::max(to.largest[g], from.largest[g]);
    const float a = exponential(to.largest[g] - largest);
    const float b = exponential(from.largest[g] - largest);
    to.largest[g] = largest;
    to.sum[g] = to.sum[g] * a + from.sum[g] * b;
    for (int64_t d = 0; d < v_width; ++d)
      to.values[g * v_width + d] = to.values[g * v_width + d] * a + from.values[g * v_width + d] * b;
  }
}

// A group's query heads are laid side by side, before its pages: in fp32, or as they are.
template <typename T>
void pass_over(const T* query, int64_t head_stride, Pages<T> keys, Pages<T> values,
               const int32_t* table, int64_t head, int64_t group, int64_t first, int64_t last,
               float scale, float softcap, Partial out, float* scratch) {
  const int64_t width = keys.width;
#ifdef FAST_PAGES
  if constexpr (sizeof(T) == 2)
    if (width % 32 == 0 && values.width % 16 == 0) {
      // 16 floats are a cache line: what follows stays at a multiple of it.
      T* heads = reinterpret_cast<T*>(scratch);
      for (int64_t g = 0; g < group; ++g)
        std::memcpy(heads + g * width, query + g * head_stride, width * sizeof(T));
      attend_part(heads, keys, values, table, head, group, first, last, scale, softcap, out,
                  scratch + group * width);
      return;
    }
#endif
  for (int64_t g = 0; g < group; ++g)
    for (int64_t d = 0; d < width; ++d)
      scratch[g * width + d] = load(query[g * head_stride + d]);
  attend_part(scratch, keys, values, table, head, group, first, last, scale, softcap, out,
              scratch + group * width);
}

// A sink takes probability and gives no value.
template <typename T>
void finish(Partial total, const float* sinks, int64_t group, int64_t v_width, T* output,
            int64_t output_stride) {
  for (int64_t g = 0; g < group; ++g) {
    float scale = total.sum[g] == 0.0f ? 0.0f : 1.0f / total.sum[g];
    if (sinks) {
      const float largest = std::max(total.largest[g], sinks[g]);
      const float own = exponential(total.largest[g] - largest);
      scale = own / (total.sum[g] * own + exponential(sinks[g] - largest));
    }
    for (int64_t d = 0; d < v_width; ++d)
      store(output + g * output_stride + d, total.values[g * v_width + d] * scale);
  }
}

template <typename T>
void write_cache(const T* tensor, int64_t token_stride, int64_t head_stride, T* cache,
                 const int64_t* slots, int64_t num_tokens, int64_t num_heads, int64_t block_size,
                 int64_t width, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_tokens > 64)
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int64_t slot = std::max<int64_t>(0, slots[token]);  // padding goes to the null block
    const int64_t block = slot / block_size, offset = slot % block_size;
    for (int64_t head = 0; head < num_heads; ++head)
      std::memcpy(cache + ((block * num_heads + head) * block_size + offset) * width,
                  tensor + token * token_stride + head * head_stride, width * sizeof(T));
  }
}

template <typename T>
void attend(const T* query, int64_t token_stride, int64_t head_stride, Pages<T> keys,
            Pages<T> values, const int32_t* block_table, int64_t table_stride,
            const int32_t* lengths, const int64_t* sequences, const int64_t* tokens,
            int64_t num_sequences, int64_t group, float scale, int64_t window, float softcap,
            const float* sinks, T* output, int num_threads) {
  const int64_t num_kv_heads = keys.num_kv_heads, width = keys.width, v_width = values.width;
  const int64_t num_groups = num_sequences * num_kv_heads;
  int64_t longest = 1;
  for (int64_t i = 0; i < num_sequences; ++i)
    longest = std::max<int64_t>(longest, lengths[sequences[i]]);
  const int64_t wanted = (2 * num_threads + num_groups - 1) / num_groups;
  const int64_t num_parts =
      num_groups >= 2 * num_threads ? 1 : std::min(wanted, (longest + 127) / 128);
  const int64_t partial_size = group * (2 + v_width);
  std::vector<float> partials(num_groups * num_parts * partial_size);
  auto partial = [&](int64_t item, int64_t part) {
    float* at = partials.data() + (item * num_parts + part) * partial_size;
    return Partial{at, at + group, at + 2 * group};
  };
#pragma omp parallel num_threads(num_threads)
  {
    // Enough for either way through the pages, from an address that vectors can be stored at.
    const int64_t scratch_size = group * width + width * 8 + kSlots * v_width + group * kSlots;
    std::vector<float> memory(scratch_size + 16);
    float* scratch = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
#pragma omp for schedule(dynamic)
    for (int64_t work = 0; work < num_groups * num_parts; ++work) {
      const int64_t item = work / num_parts, part = work % num_parts;
      const int64_t i = item / num_kv_heads, head = item % num_kv_heads;
      const int64_t length = lengths[sequences[i]];
      const int64_t begin = window ? std::max<int64_t>(0, length - window) : 0;
      // Parts begin at a block, so that none looks at a page twice.
      const int64_t first_block = begin / keys.block_size;
      const int64_t num_blocks = (length + keys.block_size - 1) / keys.block_size - first_block;
      const int64_t from = first_block + num_blocks * part / num_parts;
      const int64_t to = first_block + num_blocks * (part + 1) / num_parts;
      const T* q = query + tokens[i] * token_stride + head * group * head_stride;
      const int32_t* table = block_table + sequences[i] * table_stride;
      const int64_t first = std::max(begin, from * keys.block_size);
      const int64_t last = std::min(length, to * keys.block_size);
      Partial out = partial(item, part);
      pass_over(q, head_stride, keys, values, table, head, group, first, last, scale, softcap, out,
                scratch);
      if (num_parts == 1)
        finish(out, sinks ? sinks + head * group : nullptr, group, v_width,
               output + (tokens[i] * num_kv_heads + head) * group * v_width, v_width);
    }
    if (num_parts > 1)
#pragma omp for schedule(static)
      for (int64_t item = 0; item < num_groups; ++item) {
        const int64_t i = item / num_kv_heads, head = item % num_kv_heads;
        for (int64_t part = 1; part < num_parts; ++part)
          join(partial(item, 0), partial(item, part), group, v_width);
        finish(partial(item, 0), sinks ? sinks + head * group : nullptr, group, v_width,
               output + (tokens[i] * num_kv_heads + head) * group * v_width, v_width);
      }
  }
}

}  // namespace

// The C interface. Strides are in elements; the cache and the output are contiguous.
#define ATTENTION(T, NAME)                                                                        \
  extern "C" void write_cache_##NAME(                                                             \
      const T* tensor, int64_t token_stride, int64_t head_stride, T* cache, const int64_t* slots, \
      int64_t num_tokens, int64_t num_heads, int64_t block_size, int64_t width,                   \
      int num_threads) {                                                                          \
    write_cache<T>(tensor, token_stride, head_stride, cache, slots, num_tokens, num_heads,        \
                   block_size, width, num_threads);                                               \
  }                                                                                               \
  extern "C" void attend_##NAME(                                                                  \
      const T* query, int64_t token_stride, int64_t head_stride, const T* key_cache,              \
      const T* value_cache, int64_t num_kv_heads, int64_t block_size, int64_t width,              \
      int64_t v_width, const int32_t* block_table, int64_t table_stride, const int32_t* lengths,  \
      const int64_t* sequences, const int64_t* tokens, int64_t num_sequences, int64_t group,      \
      double scale, int64_t window, double softcap, const float* sinks, T* output,                \
      int num_threads) {                                                                          \
    attend<T>(query, token_stride, head_stride, {key_cache, num_kv_heads, block_size, width},     \
              {value_cache, num_kv_heads, block_size, v_width}, block_table, table_stride,        \
              lengths, sequences, tokens, num_sequences, group, float(scale), window,             \
              float(softcap), sinks, output, num_threads);                                        \
  }

ATTENTION(float, float32)
ATTENTION(bf16, bfloat16)
