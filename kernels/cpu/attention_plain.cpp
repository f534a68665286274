// Attention of a tile in fp32 throughout, over pages of fp32 or bf16, on any processor.

#pragma GCC optimize("fp-contract=fast")  // sums of products need no rounding in between

#include "attention_tile.h"

namespace attention {
namespace {

// 16 numbers, in as many registers as the processor needs for them.
typedef float Lanes __attribute__((vector_size(64), aligned(64)));
typedef float Quad __attribute__((vector_size(16), aligned(16)));

// Four rows of four become four columns, `stride` apart.
inline void transpose(const Quad row[4], float* to, int64_t stride) {
  const Quad a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5);
  const Quad b = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
  const Quad c = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Quad d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  *reinterpret_cast<Quad*>(to) = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(to + stride) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  *reinterpret_cast<Quad*>(to + 2 * stride) = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  *reinterpret_cast<Quad*>(to + 3 * stride) = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// sums[row][16 p + j] (+)= left[row][k] * right[p][k][j], for `rows` rows and `panels` panels.
template <int rows, int panels>
inline void multiply_block(const float* left, int64_t left_stride, const float* right,
                           int64_t panel, float* sums, int64_t stride, int64_t depth, bool add) {
  Lanes sum[rows][panels];
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < panels; ++p)
      sum[r][p] = Lanes{};
  for (int64_t k = 0; k < depth; ++k)
    for (int p = 0; p < panels; ++p) {
      const Lanes column = *reinterpret_cast<const Lanes*>(right + p * panel + 16 * k);
      for (int r = 0; r < rows; ++r) sum[r][p] += left[r * left_stride + k] * column;
    }
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < panels; ++p) {
      auto* to = reinterpret_cast<Lanes*>(sums + r * stride + 16 * p);
      *to = add ? *to + sum[r][p] : sum[r][p];
    }
}

#ifdef __AVX512F__
constexpr int kBlockRows = 8, kBlockPanels = 2;
#else
constexpr int kBlockRows = 4, kBlockPanels = 1;
#endif

template <typename T>
struct Plain {
  using Page = T;
  using Number = float;

  static void pack_query(const T* from, float* to, int64_t width, int64_t padded) {
    for (int64_t d = 0; d < width; ++d) to[d] = load(from[d]);
    std::fill(to + width, to + padded, 0.0f);
  }

  static void pack_keys(const T* from, float* to, int64_t width, int64_t padded) {
    int64_t d = 0;
    for (; d + 4 <= width; d += 4)
      for (int64_t s = 0; s < kPage; s += 4) {
        Quad row[4];
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) row[i][j] = load(from[(s + i) * width + d + j]);
        transpose(row, to + d * kPage + s, kPage);
      }
    for (; d < width; ++d)
      for (int64_t s = 0; s < kPage; ++s) to[d * kPage + s] = load(from[s * width + d]);
    std::fill(to + width * kPage, to + padded * kPage, 0.0f);
  }

  static void pack_values(const T* from, int64_t count, float* to, int64_t panel, int64_t width,
                          int64_t padded) {
    for (int64_t d = 0; d < padded; d += kPage, to += panel) {
      const int64_t dims = std::max<int64_t>(0, std::min(kPage, width - d));
      if (count < kPage || dims < kPage) std::fill(to, to + kPage * kPage, 0.0f);
      for (int64_t s = 0; s < count; ++s)
        for (int64_t j = 0; j < dims; ++j) to[s * kPage + j] = load(from[s * width + d + j]);
    }
  }

  static void multiply(const float* left, int64_t left_stride, const float* right, int64_t panel,
                       float* sums, int64_t stride, int64_t rows, int64_t columns, int64_t depth,
                       bool add) {
    for (int64_t column = 0; column < columns; column += 16 * kBlockPanels)
      // Sums of a few products, summed: their rounding errors are smaller than those of one long sum.
      for (int64_t k = 0; k < depth; k += kStep) {
        const float* from = right + column / 16 * panel + 16 * k;
        const auto block = [&](auto count, int64_t row) {
          multiply_block<count, kBlockPanels>(left + row * left_stride + k, left_stride, from,
                                              panel, sums + row * stride + column, stride, kStep,
                                              add || k);
        };
        int64_t row = 0;
        for (; row + kBlockRows <= rows; row += kBlockRows)
          block(std::integral_constant<int, kBlockRows>{}, row);
        for (; row + 2 <= rows; row += 2) block(std::integral_constant<int, 2>{}, row);
        for (; row < rows; ++row) block(std::integral_constant<int, 1>{}, row);
      }
  }

  static float weigh(float* scores, int64_t count, int64_t from, int64_t to, const Step& step,
                     const Bias& bias, float* largest, float* sum) {
    if (from >= to) {
      std::fill(scores, scores + count, 0.0f);
      return 1.0f;
    }
    float most = *largest;
    scale_scores(scores, from, to, step, bias);
#pragma omp simd reduction(max : most)
    for (int64_t s = from; s < to; ++s) most = std::max(most, scores[s]);
    float added = 0.0f;
#pragma omp simd reduction(+ : added)
    for (int64_t s = from; s < to; ++s) {
      scores[s] = exponential(scores[s] - most);
      added += scores[s];
    }
    std::fill(scores, scores + from, 0.0f);
    std::fill(scores + to, scores + count, 0.0f);
    const float shrink = most == *largest ? 1.0f : exponential(*largest - most);
    *sum = *sum * shrink + added;
    *largest = most;
    return shrink;
  }
};

}  // namespace

int64_t scratch_bytes(const Step& step, int64_t rows) {
  return Buffers<float>::bytes(step, rows);
}

void attend_float32(const Step& step, const Tile& tile, const Sums& out, char* scratch) {
  attend_tile<Plain<float>>(step, tile, out, scratch);
}

void attend_bfloat16(const Step& step, const Tile& tile, const Sums& out, char* scratch) {
  attend_tile<Plain<bf16>>(step, tile, out, scratch);
}

}  // namespace attention
