// The largest element of each row, for choosing tokens: one pass, by blocks that stay in registers.

#include <algorithm>
#include <cstdint>

#include "numbers.h"

namespace {

constexpr int64_t kBlock = 512;

// As torch.argmax: the first of equal ones, and a NaN counts as the largest.
template <typename T>
int64_t argmax(const T* row, int64_t width) {
  float best = -__builtin_inff();
  int64_t where = 0;
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t count = std::min(kBlock, width - start);
    float largest = -__builtin_inff();
    int num_nan = 0;
#pragma omp simd reduction(max : largest) reduction(+ : num_nan)
    for (int64_t i = 0; i < count; ++i) {
      const float value = load(row[start + i]);
      largest = value > largest ? value : largest;
      num_nan += value != value;
    }
    if (num_nan) {
      for (int64_t i = start;; ++i)
        if (load(row[i]) != load(row[i])) return i;
    }
    if (largest > best) {
      best = largest;
      where = start;
    }
  }
  while (where + 1 < width && load(row[where]) != best) ++where;
  return best == -__builtin_inff() ? 0 : where;
}

template <typename T>
void argmax_rows(const T* input, int64_t stride, int64_t* output, int64_t num_rows, int64_t width,
                 int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (num_rows > 1)
  for (int64_t row = 0; row < num_rows; ++row) output[row] = argmax(input + row * stride, width);
}

}  // namespace

// input [num_rows, width], rows `stride` elements apart; output [num_rows].
extern "C" void argmax_float32(const float* input, int64_t stride, int64_t* output,
                               int64_t num_rows, int64_t width, int num_threads) {
  argmax_rows(input, stride, output, num_rows, width, num_threads);
}
extern "C" void argmax_bfloat16(const bf16* input, int64_t stride, int64_t* output,
                                int64_t num_rows, int64_t width, int num_threads) {
  argmax_rows(input, stride, output, num_rows, width, num_threads);
}
