// Writing into the paged cache, then attention of the step's queries over it: all sequences in one
// call, those with one new token and those with many.
//
// The work is cut into tiles of queries of one sequence and KV head, the heads of the KV head's
// group together, sized so that there are several for each thread. Where one alone would keep a
// thread from the others (few sequences, one of them long), its slots are cut into parts as well,
// if the caller allows it, and joined at the end. The longest come first.

#include "attention.h"
#include "call.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

#include "isa.h"
#include "numbers.h"

#ifdef ATTENTION_HAS_PAIRS
#include "amx.h"
#endif

namespace attention {
namespace {

constexpr int64_t kMostRows = 512;      // of a tile: its packed queries and sums stay in the cache
constexpr int64_t kFewestRows = 32;     // of one that is cut from a chunk for more tiles
constexpr int64_t kTilesPerThread = 4;  // wanted
constexpr int64_t kShortestPart = 128;  // slots
constexpr int64_t kPackingRows = 24;    // packing the slots takes as long as this many rows of them

enum Error : int {
  kNone = 0,
  kShortTable = 1,
  kNoSuchBlock = 2,
  kNoSuchSlot = 3,
  kShortQuery = 4,
  kUnevenBlock = 5,
};

// Memory that a thread keeps between calls; what was in it is lost when it grows.
struct Memory {
  char* data = nullptr;
  size_t size = 0;
  char* at_least(size_t wanted) {
    if (wanted > size) {
      std::free(data);
      size = 0;
      data = static_cast<char*>(std::aligned_alloc(64, (wanted + 63) / 64 * 64));
      if (!data) throw std::bad_alloc();
      size = wanted;
    }
    return data;
  }
  ~Memory() { std::free(data); }
};

// Queries of one sequence, for all KV heads, and a part of their slots.
struct Work {
  int64_t sequence, token, num_tokens, position, first, last;
  int64_t part, num_parts;
  int64_t sums;  // where the parts' sums begin, in floats: [num_parts, num_kv_heads]
};

struct Batch {
  int64_t num_tokens, num_sequences;
  const int64_t* slots;     // [num_tokens], or null: nothing is stored
  const int32_t* table;     // [num_sequences, table_width], rows `table_stride` apart
  int64_t table_stride, table_width;
  const int32_t* starts;    // [num_sequences + 1]
  const int32_t* lengths;   // [num_sequences]
};

// New keys or values: [num_tokens, num_kv_heads, width].
struct New {
  const void* data;
  int64_t token_stride, head_stride;
};

int64_t sums_floats(int64_t rows, int64_t stride) {
  return round_up(rows, kPage) * stride + 2 * round_up(rows, kPage);
}

Sums sums_at(float* at, int64_t rows, int64_t stride) {
  const int64_t padded = round_up(rows, kPage);
  return {at, at + padded, at + 2 * padded, stride};
}

struct Plan {
  std::vector<Work> works;
  std::vector<std::pair<int64_t, int64_t>> order;  // (cost, index into works), the dearest first
  int64_t most_rows = 0, sums = 0;                 // sums: floats that parts need

  Error make(const Step& step, const Batch& batch, int64_t num_threads, bool splits);
};

Error Plan::make(const Step& step, const Batch& batch, int64_t num_threads, bool splits) {
  works.clear();
  order.clear();
  most_rows = sums = 0;
  const int64_t even = batch.num_tokens * step.num_kv_heads / (kTilesPerThread * num_threads);
  const int64_t fewest = (kFewestRows + step.group - 1) / step.group;
  const int64_t most = std::max(fewest, kMostRows / step.group);
  const int64_t tile = std::min(most, std::max(fewest, even));
  int64_t total = 0;
  const auto cost = [&](const Work& work) {
    const int64_t slots = work.last - work.first - std::min(work.last, work.num_tokens) / 2;
    return (slots + kPage) * (round_up(work.num_tokens * step.group, kPage) + kPackingRows);
  };
  for (int64_t s = 0; s < batch.num_sequences; ++s) {
    const int64_t start = batch.starts[s], count = batch.starts[s + 1] - start;
    const int64_t length = batch.lengths[s];
    if (count <= 0) continue;
    if (start < 0 || start + count > batch.num_tokens) return kShortQuery;
    if (length > batch.table_width * step.block_size) return kShortTable;
    for (int64_t token = 0; token < count; token += tile) {
      const int64_t tokens = std::min(tile, count - token);
      const int64_t position = length - count + token;
      const int64_t last = std::max<int64_t>(0, position + tokens);
      const int64_t first = std::min(last, first_seen(step, position));
      works.push_back({s, start + token, tokens, position, first, last, 0, 1, 0});
      most_rows = std::max(most_rows, tokens * step.group);
      total += cost(works.back());
    }
    const int32_t* blocks = batch.table + s * batch.table_stride;
    const int64_t seen = first_seen(step, length - count);
    for (int64_t block = seen / step.block_size; block * step.block_size < length; ++block)
      if (blocks[block] < 0 || blocks[block] >= step.num_blocks) return kNoSuchBlock;
  }
  const int64_t bearable = total * step.num_kv_heads / (2 * num_threads) + 1;
  const int64_t stride = round_up(step.v_width, kStep);
  for (size_t i = 0, num_tiles = works.size(); splits && num_threads > 1 && i < num_tiles; ++i) {
    const Work whole = works[i];
    const int64_t slots = whole.last - whole.first;
    const int64_t parts = std::min(cost(whole) / bearable + 1, slots / kShortestPart);
    if (parts < 2) continue;
    const auto border = [&](int64_t part) {
      return part == 0       ? whole.first
             : part == parts ? whole.last
                             : (whole.first + slots * part / parts) / kStep * kStep;
    };
    for (int64_t part = 0; part < parts; ++part) {
      Work work = whole;
      work.first = border(part);
      work.last = border(part + 1);
      work.part = part;
      work.num_parts = parts;
      work.sums = sums;
      if (part == 0)
        works[i] = work;
      else
        works.push_back(work);
    }
    sums += parts * step.num_kv_heads * sums_floats(whole.num_tokens * step.group, stride);
  }
  for (size_t i = 0; i < works.size(); ++i) order.emplace_back(cost(works[i]), i);
  std::sort(order.begin(), order.end(),
            [](const auto& a, const auto& b) { return a.first > b.first; });
  return kNone;
}

// Two softmaxes of the same rows become one, in the first.
void join(const Sums& to, const Sums& from, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    if (from.sum[row] == 0.0f) continue;  // it saw nothing
    const float largest = std::max(to.largest[row], from.largest[row]);
    const float a = exponential(to.largest[row] - largest);
    const float b = exponential(from.largest[row] - largest);
    to.largest[row] = largest;
    to.sum[row] = to.sum[row] * a + from.sum[row] * b;
    float* values = to.values + row * to.stride;
    const float* others = from.values + row * from.stride;
#pragma omp simd
    for (int64_t d = 0; d < to.stride; ++d) values[d] = values[d] * a + others[d] * b;
  }
}

// Divide by the sum and store: row t * group + g is head g of token t. A sink takes probability and
// gives no value.
template <typename T>
void finish(const Step& step, const Work& work, int64_t head, const Sums& sums, const float* sinks,
            T* output) {
  for (int64_t row = 0; row < work.num_tokens * step.group; ++row) {
    const int64_t token = work.token + row / step.group;
    const int64_t query_head = head * step.group + row % step.group;
    float scale = sums.sum[row] == 0.0f ? 0.0f : 1.0f / sums.sum[row];
    if (sinks) {
      const float largest = std::max(sums.largest[row], sinks[query_head]);
      const float own = exponential(sums.largest[row] - largest);
      scale = own / (sums.sum[row] * own + exponential(sinks[query_head] - largest));
    }
    T* to = output + (token * step.num_kv_heads * step.group + query_head) * step.v_width;
    const float* values = sums.values + row * sums.stride;
#pragma omp simd
    for (int64_t d = 0; d < step.v_width; ++d) store(to + d, values[d] * scale);
  }
}

template <typename T>
void write(const New& from, void* cache, const Step& step, int64_t width, int64_t token,
           int64_t slot) {
  const int64_t block = slot / step.block_size, offset = slot % step.block_size;
  for (int64_t head = 0; head < step.num_kv_heads; ++head)
    std::memcpy(static_cast<T*>(cache) +
                    ((block * step.num_kv_heads + head) * step.block_size + offset) * width,
                static_cast<const T*>(from.data) + token * from.token_stride +
                    head * from.head_stride,
                width * sizeof(T));
}

Attend best(float) { return attend_float32; }
Attend best(bf16) {
#ifdef ATTENTION_HAS_PAIRS
  if (isa_level == kAmx) return attend_tiles;
  if (isa_level == kAvx512Bf16) return attend_pairs;
#endif
  return attend_bfloat16;
}

template <typename T>
Error run(const Step& step, const Batch& batch, const New& key, const New& value, void* key_cache,
          void* value_cache, const float* sinks, T* output, int num_threads, bool splits) {
  static thread_local Plan plan;
  static thread_local Memory parts;
  if (step.block_size % kPage) return kUnevenBlock;
  const int64_t num_slots = step.num_blocks * step.block_size;
  for (int64_t token = 0; batch.slots && token < batch.num_tokens; ++token)
    if (batch.slots[token] >= num_slots) return kNoSuchSlot;
  if (const Error error = plan.make(step, batch, num_threads, splits)) return error;

  const Attend attend = best(T{});
  const int64_t stride = round_up(step.v_width, kStep);
  const int64_t scratch = round_up(scratch_bytes(step, plan.most_rows), 64);
  const int64_t row_floats = step.num_kv_heads * step.group * step.v_width;
  const int64_t end = batch.starts[batch.num_sequences];
  const Plan& made = plan;  // the calling thread's
  float* shared = reinterpret_cast<float*>(parts.at_least(made.sums * sizeof(float)));
  const auto sums_of = [&](const Work& work, int64_t part, int64_t head) {
    const int64_t rows = work.num_tokens * step.group;
    return sums_at(shared + work.sums +
                       (part * step.num_kv_heads + head) * sums_floats(rows, stride),
                   rows, stride);
  };
  // The heads of a block lie side by side, and the processor fetches more than is asked for: who
  // has read one of them has the others at hand.
  const int64_t num_items = int64_t(made.order.size()) * step.num_kv_heads;
  const int64_t together =
      std::max<int64_t>(1, std::min(step.num_kv_heads, num_items / (8 * num_threads)));
#pragma omp parallel num_threads(num_threads)
  {
    static thread_local Memory memory;
    char* own = memory.at_least(scratch + sums_floats(made.most_rows, stride) * sizeof(float));
#ifdef ATTENTION_HAS_PAIRS
    if (isa_level == kAmx) configure_tiles(TileConfig{});
#endif
#pragma omp for schedule(static)
    for (int64_t token = 0; token < batch.num_tokens; ++token) {
      if (token >= end) std::memset(output + token * row_floats, 0, row_floats * sizeof(T));
      const int64_t slot = batch.slots ? batch.slots[token] : -1;
      if (slot < 0) continue;  // it is not stored
      write<T>(key, key_cache, step, step.width, token, slot);
      write<T>(value, value_cache, step, step.v_width, token, slot);
    }
#pragma omp for schedule(dynamic, together)
    for (int64_t i = 0; i < num_items; ++i) {
      const Work& work = made.works[made.order[i / step.num_kv_heads].second];
      const int64_t head = i % step.num_kv_heads, rows = work.num_tokens * step.group;
      const Tile tile{batch.table + work.sequence * batch.table_stride,
                      work.token, work.num_tokens, work.position, head, work.first, work.last};
      const Sums sums = work.num_parts > 1
                            ? sums_of(work, work.part, head)
                            : sums_at(reinterpret_cast<float*>(own + scratch), rows, stride);
      attend(step, tile, sums, own);
      if (work.num_parts == 1) finish(step, work, head, sums, sinks, output);
    }
    if (made.sums)
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < int64_t(made.works.size()) * step.num_kv_heads; ++i) {
        const Work& work = made.works[i / step.num_kv_heads];
        if (work.num_parts == 1 || work.part) continue;
        const int64_t head = i % step.num_kv_heads;
        const Sums sums = sums_of(work, 0, head);
        for (int64_t part = 1; part < work.num_parts; ++part)
          join(sums, sums_of(work, part, head), work.num_tokens * step.group);
        finish(step, work, head, sums, sinks, output);
      }
#ifdef ATTENTION_HAS_PAIRS
    if (isa_level == kAmx) release_tiles();
#endif
  }
  return kNone;
}

}  // namespace
}  // namespace attention

// The C interface. Strides are in elements; the caches and the output are contiguous. Without
// `splits` a sequence's slots are summed in order, so that a token's result does not depend on what
// else there is to do.
// Returns 0, or which of the arguments do not fit each other (Error); nothing is written then.
#define PAGED_ATTENTION(T, NAME)                                                                  \
  extern "C" int paged_attention_##NAME(                                                          \
      const T* query, int64_t query_token_stride, int64_t query_head_stride, const T* key,        \
      int64_t key_token_stride, int64_t key_head_stride, const T* value,                          \
      int64_t value_token_stride, int64_t value_head_stride, T* key_cache, T* value_cache,        \
      int64_t num_blocks, int64_t num_kv_heads, int64_t block_size, int64_t width,                \
      int64_t v_width, const int64_t* slots, int64_t num_tokens, const int32_t* table,            \
      int64_t table_stride, int64_t table_width, const int32_t* starts, const int32_t* lengths,   \
      int64_t num_sequences, int64_t group, double scale, int64_t window, double softcap,         \
      int64_t chunk, const float* slopes, const float* sinks, T* output, int num_threads,         \
      bool splits) {                                                                              \
    const attention::Step step{query,      query_token_stride, query_head_stride, key_cache,      \
                               value_cache, num_blocks,         num_kv_heads,      block_size,    \
                               width,       v_width,            group,             float(scale),  \
                               float(softcap), window, chunk, slopes};                            \
    const attention::Batch batch{num_tokens,   num_sequences, slots,  table,                      \
                                 table_stride, table_width,   starts, lengths};                   \
    return attention::run<T>(step, batch, {key, key_token_stride, key_head_stride},               \
                             {value, value_token_stride, value_head_stride}, key_cache,           \
                             value_cache, sinks, output, num_threads, splits);                    \
  }                                                                                               \
  CALLABLE(paged_attention_##NAME)

PAGED_ATTENTION(float, float32)
PAGED_ATTENTION(bf16, bfloat16)
