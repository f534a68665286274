// What the files of the paged attention share: a step, a tile of its queries, and their softmax.

#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ATTENTION_HAS_PAIRS
#endif

namespace attention {

// Slots and rows come in multiples of these: what two AMX tiles hold side by side.
constexpr int64_t kPage = 16;  // slots that lie together in a block, whose size is a multiple of it
constexpr int64_t kStep = 32;

inline int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// One call. Strides are in elements; everything but the query is contiguous.
struct Step {
  const void* query;  // [num_tokens, num_kv_heads * group, width]
  int64_t token_stride, head_stride;
  const void* key_cache;    // [num_blocks, num_kv_heads, block_size, width]
  const void* value_cache;  // [num_blocks, num_kv_heads, block_size, v_width]
  int64_t num_blocks, num_kv_heads, block_size, width, v_width;
  int64_t group;  // query heads that share a KV head
  float scale, softcap;
  int64_t window, chunk;
  const float* slopes;  // [num_kv_heads * group] or null
};

// The first slot that a query at this position sees.
inline int64_t first_seen(const Step& step, int64_t position) {
  int64_t slot = 0;
  if (step.window) slot = position - step.window + 1;
  if (step.chunk) slot = std::max(slot, position / step.chunk * step.chunk);
  return std::max<int64_t>(0, slot);
}

// Queries of one sequence and KV head, and the slots from `first` to `last` of those they see.
// Their rows are the tokens' heads: row t * group + g.
struct Tile {
  const int32_t* table;  // the sequence's blocks
  int64_t token, num_tokens, position;  // the first query: its row in the step, its place
  int64_t head, first, last;
};

// Softmax of each row as far as it has come: the largest score, the sum of the weights (relative to
// it), and their product with the values. Rows are padded to a multiple of 16, `stride` of 32.
struct Sums {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* values;   // [rows, stride]
  int64_t stride;
};

// Sets `out` for all rows of a tile; `scratch` has at least `scratch_bytes`, at a cache line.
using Attend = void (*)(const Step& step, const Tile& tile, const Sums& out, char* scratch);

// What a tile of so many rows needs.
int64_t scratch_bytes(const Step& step, int64_t rows);

void attend_float32(const Step& step, const Tile& tile, const Sums& out, char* scratch);
void attend_bfloat16(const Step& step, const Tile& tile, const Sums& out, char* scratch);

#ifdef ATTENTION_HAS_PAIRS
// With pairs of bf16 (AVX-512 BF16); with tiles of them (AMX), which the thread has configured.
void attend_pairs(const Step& step, const Tile& tile, const Sums& out, char* scratch);
void attend_tiles(const Step& step, const Tile& tile, const Sums& out, char* scratch);
#endif

}  // namespace attention
