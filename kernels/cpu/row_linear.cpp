// Linear layers over plain weights, of which a row's result depends on nothing but the row and the
// weight: not on how many rows there are, where it stands among them, or how many threads there are.
//
// Every row is summed by the same code in the same order: four rows at a time, whose places are
// filled up with the last row where there are fewer, and thrown away. Sums are fp32, rounded once.

#pragma GCC optimize("fp-contract=fast")  // sums of products need no rounding in between

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "call.h"
#include "numbers.h"

namespace {

constexpr int64_t kRows = 4, kOutputs = 4;  // of a block
constexpr int64_t kLanes = 16, kColumns = 2 * kLanes;
constexpr int64_t kRowBytes = 256 << 10;    // of rows that meet all outputs before others do
constexpr int64_t kDepth = 256;             // products that are summed before they join the others

typedef float Lanes __attribute__((vector_size(64), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));

inline Lanes load16(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline Lanes load16(const bf16* at) {
  return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(at), Bits) << 16);
}

// The first `count` of 16 numbers, and zeros: nothing is read past them.
template <typename T>
inline Lanes load_some(const T* at, int64_t count) {
  T all[kLanes] = {};
  std::memcpy(all, at, count * sizeof(T));
  return load16(all);
}

inline float total(Lanes lanes) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <typename T>
struct Layer {
  const T* input;  // [num_rows, width], rows `input_stride` elements apart
  int64_t input_stride;
  const T* weight;  // output n and input k: weight[n * output_step + k * input_step]
  int64_t output_step, input_step;
  const T* bias;  // [num_outputs] or null
  T* output;      // [num_rows, num_outputs]
  int64_t num_rows, num_outputs, width;

  void put(int64_t row, int64_t column, float sum) const {
    if (row < num_rows && column < num_outputs)
      store(output + row * num_outputs + column, bias ? sum + load(bias[column]) : sum);
  }
};

// The block of rows and outputs that begins at (row, column); a weight's inputs follow each other.
template <typename T>
void dot_block(const Layer<T>& layer, int64_t row, int64_t column) {
  const T *x[kRows], *w[kOutputs];
  for (int64_t r = 0; r < kRows; ++r)
    x[r] = layer.input + std::min(row + r, layer.num_rows - 1) * layer.input_stride;
  for (int64_t n = 0; n < kOutputs; ++n)
    w[n] = layer.weight + std::min(column + n, layer.num_outputs - 1) * layer.output_step;
  Lanes sum[kRows][kOutputs] = {};
  const auto add = [&](auto take, int64_t k) {
    Lanes right[kOutputs];
    for (int n = 0; n < kOutputs; ++n) right[n] = take(w[n] + k);
    for (int r = 0; r < kRows; ++r) {
      const Lanes left = take(x[r] + k);
      for (int n = 0; n < kOutputs; ++n) sum[r][n] += left * right[n];
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= layer.width; k += kLanes) add([](const T* at) { return load16(at); }, k);
  if (const int64_t left = layer.width - k)
    add([left](const T* at) { return load_some(at, left); }, k);
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kOutputs; ++n) layer.put(row + r, column + n, total(sum[r][n]));
}

// The same of 32 outputs; a weight's outputs follow each other.
template <typename T>
void column_block(const Layer<T>& layer, int64_t row, int64_t column) {
  const T* x[kRows];
  for (int64_t r = 0; r < kRows; ++r)
    x[r] = layer.input + std::min(row + r, layer.num_rows - 1) * layer.input_stride;
  const int64_t count = std::min(kColumns, layer.num_outputs - column);
  const int64_t first = std::min(kLanes, count), second = count - first;
  Lanes all[kRows][2] = {};
  for (int64_t begin = 0; begin < layer.width; begin += kDepth) {
    Lanes sum[kRows][2] = {};
    const int64_t end = std::min(layer.width, begin + kDepth);
    for (int64_t k = begin; k < end; ++k) {
      const T* at = layer.weight + k * layer.input_step + column;
      Lanes right[2];
      if (count == kColumns) {
        right[0] = load16(at);
        right[1] = load16(at + kLanes);
      } else {
        right[0] = load_some(at, first);
        right[1] = load_some(at + first, second);
      }
      for (int r = 0; r < kRows; ++r)
        for (int half = 0; half < 2; ++half) sum[r][half] += load(x[r][k]) * right[half];
    }
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) all[r][half] += sum[r][half];
  }
  for (int r = 0; r < kRows; ++r)
    for (int64_t n = 0; n < kColumns; ++n)
      layer.put(row + r, column + n, all[r][n / kLanes][n % kLanes]);
}

template <typename T>
void run(const Layer<T>& layer, int num_threads) {
  const bool dots = layer.input_step == 1;
  const int64_t outputs = dots ? kOutputs : kColumns;
  const int64_t num_blocks = (layer.num_outputs + outputs - 1) / outputs;
  const int64_t fitting = kRowBytes / (std::max<int64_t>(1, layer.width) * int64_t(sizeof(T)));
  const int64_t panel = std::max(kRows, fitting / kRows * kRows);
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t part = 0; part < num_threads; ++part) {
    const int64_t begin = num_blocks * part / num_threads;
    const int64_t end = num_blocks * (part + 1) / num_threads;
    for (int64_t start = 0; start < layer.num_rows; start += panel)
      for (int64_t block = begin; block < end; ++block)
        for (int64_t row = start; row < std::min(start + panel, layer.num_rows); row += kRows)
          dots ? dot_block(layer, row, block * outputs) : column_block(layer, row, block * outputs);
  }
}

}  // namespace

// One of the weight's steps is 1: that of inputs, or of outputs.
#define ROW_LINEAR(T, NAME)                                                                     \
  extern "C" void row_linear_##NAME(const T* input, int64_t input_stride, const T* weight,      \
                                    int64_t output_step, int64_t input_step, const T* bias,     \
                                    T* output, int64_t num_rows, int64_t num_outputs,           \
                                    int64_t width, int num_threads) {                           \
    run<T>({input, input_stride, weight, output_step, input_step, bias, output, num_rows,       \
            num_outputs, width},                                                                \
           num_threads);                                                                        \
  }                                                                                             \
  CALLABLE(row_linear_##NAME)

ROW_LINEAR(float, float32)
ROW_LINEAR(bf16, bfloat16)
