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
    std::vector<float> scratch(group * width + width + kSlots * v_width + group * kSlots);
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
      for (int64_t g = 0; g < group; ++g) {
        const T* q = query + tokens[i] * token_stride + (head * group + g) * head_stride;
        for (int64_t d = 0; d < width; ++d) scratch[g * width + d] = load(q[d]);
      }
      Partial out = partial(item, part);
      attend_part(scratch.data(), keys, values, block_table + sequences[i] * table_stride, head,
                  group, std::max(begin, from * keys.block_size),
                  std::min(length, to * keys.block_size), scale, softcap, out,
                  scratch.data() + group * width);
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
