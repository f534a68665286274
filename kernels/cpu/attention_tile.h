// Attention of one tile of queries over its slots, a stretch of them at a time, with a running
// softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
//
// Keys and values of a stretch are packed once and serve all rows. Both products are then the same:
// rows of numbers times a packed matrix. A packed matrix lies in panels of 16 columns, row after row
// (pairs of rows, for bf16): keys with a panel for each 16 slots, values with one for each 16 dims.
// A way to compute (`Level`) gives:
//
//   Page, Number                what pages hold; what is multiplied
//   kPair                       rows of a packed matrix that lie interleaved
//   pack_query(from, to, width, padded)
//   pack_keys(from, to, width, padded), clear_keys(to, padded): one panel
//   pack_values(from, count, to, panel, width, padded): 16 slots of all panels; from slot `count`
//                               on zeros
//   multiply(left, left_stride, right, panel, sums, stride, rows, columns, depth, add)
//   weigh(scores, count, from, to, step, bias, largest, sum): makes the scores of slots from..to of
//                               one row weights (Number) in place, the others zero; returns the
//                               factor by which all sums before shrink

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention.h"
#include "numbers.h"

namespace attention {
namespace {

constexpr int64_t kStretch = 256;  // slots
constexpr int64_t kRows = 32;      // rows of scores at a time

// The parts of a thread's scratch.
template <typename Number>
struct Buffers {
  float* scores;   // [kRows, kStretch]
  Number* query;   // [rows, width]
  Number* keys;    // [kStretch / 16][width][16]
  Number* values;  // [v_width / 16][kStretch][16]
  Buffers(char* scratch, const Step& step, int64_t rows) {
    const int64_t width = round_up(step.width, kStep);
    scores = reinterpret_cast<float*>(scratch);
    query = reinterpret_cast<Number*>(scores + kRows * kStretch);
    keys = query + round_up(rows, kPage) * width;
    values = keys + kStretch * width;
  }
  static int64_t bytes(const Step& step, int64_t rows) {
    const int64_t width = round_up(step.width, kStep), v_width = round_up(step.v_width, kStep);
    return kRows * kStretch * sizeof(float) +
           (round_up(rows, kPage) * width + kStretch * (width + v_width)) * sizeof(Number);
  }
};

// One row of 16 slots, or of as many as there are, in their block.
template <typename Page>
const Page* page_at(const void* cache, const Step& step, const Tile& tile, int64_t slot,
                    int64_t width) {
  const int64_t block = tile.table[slot / step.block_size], offset = slot % step.block_size;
  return static_cast<const Page*>(cache) +
         ((block * step.num_kv_heads + tile.head) * step.block_size + offset) * width;
}

// tanh(x) to within some units in the last place, also near 0: t / (t + 2) where t = e^2x - 1.
inline float hyperbolic_tangent(float x) {
  x = 2.0f * std::min(9.1f, std::max(-9.1f, x));  // it is 1 in fp32 beyond
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p * r, r, r);  // e^r - 1
  const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  const float t = __builtin_fmaf(p, power, power - 1.0f);
  return t / (t + 2.0f);
}

// What a row's scores get for their distance: slope * (slot - position), counted as its scores are.
struct Bias {
  float slope;
  int64_t position;
};

inline void scale_scores(float* scores, int64_t from, int64_t to, const Step& step,
                         const Bias& bias) {
  if (step.softcap == 0.0f) {
#pragma omp simd
    for (int64_t s = from; s < to; ++s) scores[s] *= step.scale;
  } else {
#pragma omp simd
    for (int64_t s = from; s < to; ++s)
      scores[s] = step.softcap * hyperbolic_tangent(scores[s] * step.scale / step.softcap);
  }
  if (!step.slopes) return;
#pragma omp simd
  for (int64_t s = from; s < to; ++s)
    scores[s] = __builtin_fmaf(bias.slope, float(int32_t(s - bias.position)), scores[s]);
}

inline void prefetch(const void* at, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64)
    __builtin_prefetch(static_cast<const char*>(at) + line);
}

template <class Level>
void attend_tile(const Step& step, const Tile& tile, const Sums& out, char* scratch) {
  using Page = typename Level::Page;
  using Number = typename Level::Number;
  const int64_t group = step.group, rows = tile.num_tokens * group;
  const int64_t width = round_up(step.width, kStep), v_width = out.stride;
  const Buffers<Number> buffers(scratch, step, rows);
  for (int64_t row = 0; row < rows; ++row) {
    const Page* from = static_cast<const Page*>(step.query) +
                       (tile.token + row / group) * step.token_stride +
                       (tile.head * group + row % group) * step.head_stride;
    Level::pack_query(from, buffers.query + row * width, step.width, width);
  }
  const int64_t padded_rows = round_up(rows, kPage);
  std::memset(buffers.query + rows * width, 0, (padded_rows - rows) * width * sizeof(Number));
  std::fill(out.largest, out.largest + rows, -INFINITY);
  std::fill(out.sum, out.sum + rows, 0.0f);
  std::memset(out.values, 0, padded_rows * v_width * sizeof(float));

  // Stretches begin at the same slots whatever the tile is: which slots are summed together is then
  // the same for a token that comes alone and in a chunk of its prompt.
  for (int64_t start = tile.first / kStretch * kStretch; start < tile.last; start += kStretch) {
    const int64_t slots = std::min(kStretch, round_up(tile.last - start, kStep));
    // Slots that are not seen may hold anything, and their table entries too: zeros take their place.
    for (int64_t i = 0; i < slots; i += kPage) {
      const int64_t slot = start + i;
      const bool seen = slot + kPage > tile.first && slot < tile.last;
      Number* keys = buffers.keys + i * width;
      if (seen) {
        if (slot + kPage < tile.last) {  // pages lie anywhere: the next is on its way meanwhile
          prefetch(page_at<Page>(step.key_cache, step, tile, slot + kPage, step.width),
                   kPage * step.width * sizeof(Page));
          prefetch(page_at<Page>(step.value_cache, step, tile, slot + kPage, step.v_width),
                   kPage * step.v_width * sizeof(Page));
        }
        Level::pack_keys(page_at<Page>(step.key_cache, step, tile, slot, step.width), keys,
                         step.width, width);
      } else {
        std::memset(keys, 0, kPage * width * sizeof(Number));
      }
      const Page* values =
          seen ? page_at<Page>(step.value_cache, step, tile, slot, step.v_width) : nullptr;
      Level::pack_values(values, seen ? std::min(kPage, tile.last - slot) : 0,
                         buffers.values + i * kPage, kStretch * kPage, step.v_width, v_width);
    }
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = std::min(kRows, rows - row);
      // Positions of the first and the last of these rows, and the slots that any of them sees.
      const int64_t low = tile.position + row / group;
      const int64_t high = tile.position + (row + count - 1) / group;
      const int64_t seen_from =
          std::max({start, tile.first, first_seen(step, low)});
      const int64_t from = (seen_from - start) / kStep * kStep;
      const int64_t to = std::min(slots, round_up(std::max<int64_t>(0, high + 1 - start), kStep));
      if (from >= to) continue;
      const Number* query = buffers.query + row * width;
      Level::multiply(query, width, buffers.keys + from * width, kPage * width, buffers.scores,
                      kStretch, count, to - from, width, false);
      for (int64_t r = 0; r < count; ++r) {
        // This row's slots, counted from `from`.
        const int64_t position = tile.position + (row + r) / group - start - from;
        const int64_t past = std::min({position + 1, to - from, tile.last - start - from});
        const int64_t first = std::max(tile.first, first_seen(step, position + start + from));
        const int64_t since = std::max<int64_t>(0, first - start - from);
        const int64_t query_head = tile.head * group + (row + r) % group;
        const Bias bias{step.slopes ? step.slopes[query_head] : 0.0f, position};
        const float shrink =
            Level::weigh(buffers.scores + r * kStretch, to - from, since,
                         std::max<int64_t>(0, past), step, bias, out.largest + row + r,
                         out.sum + row + r);
        if (shrink == 1.0f) continue;
        float* values = out.values + (row + r) * v_width;
#pragma omp simd
        for (int64_t d = 0; d < v_width; ++d) values[d] *= shrink;
      }
      const auto* weights = reinterpret_cast<const Number*>(buffers.scores);
      constexpr int64_t kStride = kStretch * sizeof(float) / sizeof(Number);
      Level::multiply(weights, kStride, buffers.values + from * kPage, kStretch * kPage,
                      out.values + row * v_width, v_width, count, v_width, to - from, true);
    }
  }
}

}  // namespace
}  // namespace attention
