// Linear layers over bf16 weights that were packed for them: output = input @ weight.T + bias, summed
// in fp32 and rounded once; or, for a gate and an up projection, activation(gate) * up.
//
// A packed weight is a sequence of groups of 32 outputs, each of steps of 32 inputs, each of two tiles
// of 16 pairs of inputs by 16 outputs (1 KiB): [groups][steps][2][16 pairs][16 outputs][2]. Outputs
// that do not exist are zero. The groups of a gated weight hold 16 outputs of the gate and the same
// 16 of the up projection.
//
// Rows come in panels of 32. An input that fits into the second-level cache meets two groups at a
// time, so that the weight is read once, in order and prefetched ahead: memory is the limit. A larger
// one comes panel by panel over parts of the weight that stay in that cache; if its rows would drive
// each other out of the first-level cache, it is laid out as panels first.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>

#include "amx.h"
#include "call.h"
#include "isa.h"
#include "numbers.h"
#include "vectors.h"

namespace {

constexpr int64_t kOutputs = 32, kInputs = 32;  // of a group; of a step
constexpr int64_t kHalf = 16, kPanel = 32;      // outputs of a tile; rows that are summed together
constexpr int64_t kStepElements = kOutputs * kInputs;

enum Epilogue : int { kPlain = 0, kSilu = 1, kGelu = 2 };

// Which row of a weight [num_rows, ...] is the output `column` of a group; -1: none.
int64_t row_of(int64_t group, int64_t column, int64_t num_rows, bool gated) {
  if (!gated) {
    const int64_t row = group * kOutputs + column;
    return row < num_rows ? row : -1;
  }
  const int64_t half = num_rows / 2, row = group * kHalf + column % kHalf;
  return row >= half ? -1 : column < kHalf ? row : half + row;
}

int64_t num_groups_of(int64_t num_rows, bool gated) {
  const int64_t per_group = gated ? 2 * kHalf : kOutputs;
  return (num_rows + per_group - 1) / per_group;
}

// Calls visit(where a pair of inputs lies in the packed weight, its row or -1, its first input) for
// all pairs, in the order of the packed weight.
template <typename Visit>
void for_each_pair(int64_t num_rows, int64_t width, bool gated, int num_threads, Visit visit) {
  const int64_t num_groups = num_groups_of(num_rows, gated);
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t group = 0; group < num_groups; ++group) {
    int64_t rows[kOutputs], at = group * width * kOutputs;
    for (int64_t column = 0; column < kOutputs; ++column)
      rows[column] = row_of(group, column, num_rows, gated);
    for (int64_t step = 0; step < width; step += kInputs)
      for (int64_t half = 0; half < kOutputs; half += kHalf)
        for (int64_t k = step; k < step + kInputs; k += 2)
          for (int64_t column = half; column < half + kHalf; ++column, at += 2)
            visit(at, rows[column], k);
  }
}

}  // namespace

#ifdef HAVE_VECTORS

namespace {

constexpr int64_t kAhead = 2048;            // bytes that one pass prefetches ahead
constexpr int64_t kPartGroups = 8;          // of the weight, and
constexpr int64_t kPartBytes = 768 << 10;   // at most so much, while panels pass over it
constexpr int64_t kBlockSteps = 10;         // steps whose inputs stay in the first-level cache,
constexpr int64_t kCopiedSteps = 16;        // and if they follow each other
constexpr int64_t kInputBytes = 1 << 20;    // of an input that stays in the second-level cache
constexpr int64_t kClaim = 2;               // groups that a thread takes of those left at the end
constexpr int64_t kStreamBytes = 256 << 10; // an output from this size on is not kept in the caches

struct Layer {
  const bf16* input;
  int64_t input_stride;
  const bf16* weight;
  const bf16* bias;
  bf16* output;
  int64_t output_stride, num_rows, num_outputs, num_steps;  // outputs: as they are stored
  Epilogue epilogue;
  bool stream;

  int64_t outputs_per_group() const { return epilogue == kPlain ? kOutputs : kHalf; }
  const bf16* group(int64_t index) const { return weight + index * num_steps * kStepElements; }
};

// Cache lines that are on their way while something else is computed.
struct Prefetch {
  const char* at;  // of the weight, one after the other
  const char* end;
  const bf16* rows = nullptr;  // of the input: some rows, as far as a step goes
  int64_t num_rows = 0, row_stride = 0;
  int64_t step_stride = kInputs;
  template <int lines>
  void next(int64_t step) {
    if (lines > 0 && at < end) {
      for (int line = 0; line < lines; ++line) _mm_prefetch(at + line * 64, _MM_HINT_T1);
      at += lines * 64;
    }
    for (int64_t row = 0; row < num_rows; ++row)
      _mm_prefetch(rows + row * row_stride + step * step_stride, _MM_HINT_T1);
  }
};

void configure(int64_t num_rows) {
  TileConfig config;
  const int64_t first = std::min(num_rows, kHalf), second = std::max<int64_t>(1, num_rows - kHalf);
  config.rows[0] = config.rows[1] = config.rows[4] = first;
  config.rows[2] = config.rows[3] = config.rows[5] = second;
  configure_tiles(config);
}

// sums [32][32] (+)= a panel's inputs @ some steps of a group. Tiles 0-3: sums (rows 0-15 and 16-31,
// by outputs); 4, 5: inputs; 6, 7: weight. `step_stride` elements are between the inputs of two steps,
// `half_stride` between rows 0 and 16.
template <bool two, int lines>
void multiply_tiles(const bf16* a, int64_t row_bytes, int64_t step_stride, int64_t half_stride,
                    const bf16* weight, int64_t num_steps, float* sums, bool accumulate,
                    Prefetch& ahead) {
  constexpr int64_t kRowBytes = kOutputs * sizeof(float), kWeightBytes = 64;
  if (accumulate) {
    TILE_LOAD(0, sums, kRowBytes);
    TILE_LOAD(1, sums + kHalf, kRowBytes);
    if (two) {
      TILE_LOAD(2, sums + kHalf * kOutputs, kRowBytes);
      TILE_LOAD(3, sums + kHalf * kOutputs + kHalf, kRowBytes);
    }
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    if (two) {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
  }
  for (int64_t step = 0; step < num_steps; ++step) {
    TILE_LOAD(4, a, row_bytes);
    TILE_LOAD_ONCE(6, weight, kWeightBytes);
    ahead.next<lines>(step);
    TILE_DOT(0, 4, 6);
    TILE_LOAD_ONCE(7, weight + kStepElements / 2, kWeightBytes);
    TILE_DOT(1, 4, 7);
    if (two) {
      TILE_LOAD(5, a + half_stride, row_bytes);
      TILE_DOT(2, 5, 6);
      TILE_DOT(3, 5, 7);
    }
    a += step_stride;
    weight += kStepElements;
  }
  TILE_STORE(0, sums, kRowBytes);
  TILE_STORE(1, sums + kHalf, kRowBytes);
  if (two) {
    TILE_STORE(2, sums + kHalf * kOutputs, kRowBytes);
    TILE_STORE(3, sums + kHalf * kOutputs + kHalf, kRowBytes);
  }
}

// The same by vectors, `rows` rows at a time.
template <int rows>
void multiply_vectors(const bf16* a, int64_t row_stride, int64_t step_stride, const bf16* weight,
                      int64_t num_steps, float* sums, bool accumulate, Prefetch& ahead) {
  __m512 sum[rows][2];
  for (int row = 0; row < rows; ++row)
    for (int half = 0; half < 2; ++half)
      sum[row][half] = accumulate ? _mm512_loadu_ps(sums + row * kOutputs + half * kHalf)
                                  : _mm512_setzero_ps();
  for (int64_t step = 0; step < num_steps; ++step) {
    ahead.next<32>(step);
    for (int64_t pair = 0; pair < kInputs / 2; ++pair) {
      const bf16* at = weight + pair * 2 * kHalf;
      const __m512bh first = (__m512bh)_mm512_loadu_si512(at);
      const __m512bh second = (__m512bh)_mm512_loadu_si512(at + kStepElements / 2);
      for (int row = 0; row < rows; ++row) {
        int32_t both;
        std::memcpy(&both, a + row * row_stride + pair * 2, sizeof(both));
        const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
        sum[row][0] = _mm512_dpbf16_ps(sum[row][0], x, first);
        sum[row][1] = _mm512_dpbf16_ps(sum[row][1], x, second);
      }
    }
    a += step_stride;
    weight += kStepElements;
  }
  for (int row = 0; row < rows; ++row)
    for (int half = 0; half < 2; ++half)
      _mm512_storeu_ps(sums + row * kOutputs + half * kHalf, sum[row][half]);
}

// A panel of the input: where it lies, and how its tiles follow each other.
struct Panel {
  const bf16* data;
  int64_t num_rows, row_stride, step_stride, half_stride;
};

template <int lines>
void multiply(const Panel& panel, int64_t first_step, const bf16* weight, int64_t num_steps,
              float* sums, Prefetch& ahead, bool tiles) {
  const bf16* a = panel.data + first_step * panel.step_stride;
  const bool accumulate = first_step > 0;
  if (tiles && panel.num_rows > kHalf) {
    multiply_tiles<true, lines>(a, panel.row_stride * 2, panel.step_stride, panel.half_stride,
                                weight, num_steps, sums, accumulate, ahead);
  } else if (tiles) {
    multiply_tiles<false, lines>(a, panel.row_stride * 2, panel.step_stride, panel.half_stride,
                                 weight, num_steps, sums, accumulate, ahead);
  } else {
    int64_t row = 0;
    auto at = [&](int64_t r) { return a + r / kHalf * panel.half_stride + r % kHalf * panel.row_stride; };
    for (; row + 4 <= panel.num_rows; row += 4)
      multiply_vectors<4>(at(row), panel.row_stride, panel.step_stride, weight, num_steps,
                          sums + row * kOutputs, accumulate, ahead);
    for (; row < panel.num_rows; ++row)
      multiply_vectors<1>(at(row), panel.row_stride, panel.step_stride, weight, num_steps,
                          sums + row * kOutputs, accumulate, ahead);
  }
}

inline __m512 bias_of(const bf16* bias, __mmask16 valid) {
  return bias ? widen(_mm256_maskz_loadu_epi16(valid, bias)) : _mm512_setzero_ps();
}
inline __mmask32 first(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

inline void put(bf16* at, __m512i values, __mmask32 valid, bool stream) {
  if (stream)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), values);
  else
    _mm512_mask_storeu_epi16(at, valid, values);
}

// Round a group's sums, with its bias, to where they belong.
void store_plain(const Layer& layer, const float* sums, int64_t row, int64_t num_rows,
                 int64_t group) {
  const int64_t column = group * kOutputs;
  const __mmask32 valid = first(layer.num_outputs - column);
  const bf16* bias = layer.bias ? layer.bias + column : nullptr;
  const __m512 low = bias_of(bias, __mmask16(valid));
  const __m512 high = bias_of(bias ? bias + kHalf : nullptr, __mmask16(valid >> 16));
  bf16* out = layer.output + row * layer.output_stride + column;
  for (int64_t r = 0; r < num_rows; ++r) {
    const __m512 a = _mm512_add_ps(_mm512_load_ps(sums + r * kOutputs), low);
    const __m512 b = _mm512_add_ps(_mm512_load_ps(sums + r * kOutputs + kHalf), high);
    put(out + r * layer.output_stride, (__m512i)_mm512_cvtne2ps_pbh(b, a), valid, layer.stream);
  }
}

// 1 / (1 + e^-x) to about 2^-20: 2^t by a polynomial on [-1/2, 1/2], the reciprocal by one step of
// Newton's. What is made of it is rounded to bf16.
inline __m512 sigmoid(__m512 x) {
  const __m512 bound = _mm512_set1_ps(126.0f);
  __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
  t = _mm512_min_ps(_mm512_max_ps(t, _mm512_sub_ps(_mm512_setzero_ps(), bound)), bound);
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.33976342e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.67770456e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55036030e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40221510e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147182e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512 y = _mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1.0f));
  const __m512 z = _mm512_rcp14_ps(y);
  return _mm512_mul_ps(z, _mm512_fnmadd_ps(y, z, _mm512_set1_ps(2.0f)));
}

// gelu_tanh(x) = x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)).
inline __m512 activate(Epilogue epilogue, __m512 x) {
  if (epilogue == kSilu) return _mm512_mul_ps(x, sigmoid(x));
  const __m512 cubic = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f));
  const __m512 inner = _mm512_fmadd_ps(x, cubic, x);
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(inner, _mm512_set1_ps(1.5957691216f))));
}

// activation(gate) * up of a group, rounded wherever separate layers would round.
__m256i gated(const Layer& layer, const float* sums, __m512 gate_bias, __m512 up_bias) {
  const __m512 gate = rounded(_mm512_add_ps(_mm512_load_ps(sums), gate_bias));
  const __m512 up = rounded(_mm512_add_ps(_mm512_load_ps(sums + kHalf), up_bias));
  const __m512 active = rounded(activate(layer.epilogue, gate));
  return (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(active, up));
}

// Two neighbouring groups, or the last one alone, so that whole cache lines are written.
void store_gated(const Layer& layer, const float* sums, const float* next, int64_t row,
                 int64_t num_rows, int64_t group) {
  const int64_t column = group * kHalf, up = layer.num_outputs;
  const __mmask32 valid = first(std::min(layer.num_outputs - column, next ? 2 * kHalf : kHalf));
  __m512 biases[4];
  for (int half = 0; half < 2; ++half) {
    const __mmask16 some = __mmask16(valid >> (16 * half));
    const bf16* bias = layer.bias ? layer.bias + column + half * kHalf : nullptr;
    biases[2 * half] = bias_of(bias, some);
    biases[2 * half + 1] = bias_of(bias ? bias + up : nullptr, some);
  }
  bf16* out = layer.output + row * layer.output_stride + column;
  for (int64_t r = 0; r < num_rows; ++r) {
    __m512i line = _mm512_castsi256_si512(gated(layer, sums + r * kOutputs, biases[0], biases[1]));
    if (next)
      line = _mm512_inserti64x4(line, gated(layer, next + r * kOutputs, biases[2], biases[3]), 1);
    put(out + r * layer.output_stride, line, valid, layer.stream && next);
  }
}

void store_groups(const Layer& layer, const float* sums, int64_t row, int64_t num_rows,
                  int64_t first_group, int64_t count) {
  constexpr int64_t kSums = kPanel * kOutputs;
  for (int64_t i = 0; i < count; ++i) {
    if (layer.epilogue == kPlain) {
      store_plain(layer, sums + i * kSums, row, num_rows, first_group + i);
    } else {
      const float* next = i + 1 < count ? sums + (i + 1) * kSums : nullptr;
      store_gated(layer, sums + i * kSums, next, row, num_rows, first_group + i);
      ++i;
    }
  }
}

// Memory of a thread that lasts from call to call and only grows.
template <typename T>
T* scratch(int64_t size) {
  static thread_local T* data = nullptr;
  static thread_local int64_t capacity = 0;
  if (size > capacity) {
    std::free(data);
    capacity = (size + 4095) / 4096 * 4096;
    data = static_cast<T*>(std::aligned_alloc(64, capacity * sizeof(T)));
  }
  return data;
}

// All panels over two groups, over the next two, and so on: what is read of the weight for the first
// panel is still there for the others, and so are the inputs.
void stream(const Layer& layer, int64_t begin, int64_t end, bool tiles) {
  Prefetch ahead{reinterpret_cast<const char*>(layer.group(begin)) + kAhead,
                 reinterpret_cast<const char*>(layer.group(end))};
  constexpr int64_t kTogether = 2;
  float* sums = scratch<float>(kTogether * kPanel * kOutputs);
  int64_t configured = 0;
  for (int64_t group = begin; group < end; group += kTogether) {
    const int64_t count = std::min(kTogether, end - group);
    for (int64_t row = 0; row < layer.num_rows; row += kPanel) {
      const int64_t num_rows = std::min(kPanel, layer.num_rows - row);
      if (tiles && num_rows != configured) configure(configured = num_rows);
      const Panel panel{layer.input + row * layer.input_stride, num_rows, layer.input_stride,
                        kInputs, kHalf * layer.input_stride};
      for (int64_t i = 0; i < count; ++i) {
        float* to = sums + i * kPanel * kOutputs;
        if (row == 0)
          multiply<32>(panel, 0, layer.group(group + i), layer.num_steps, to, ahead, tiles);
        else
          multiply<0>(panel, 0, layer.group(group + i), layer.num_steps, to, ahead, tiles);
      }
      store_groups(layer, sums, row, num_rows, group, count);
    }
  }
}

// Whether the 32 lines of a step lie in four sets or less of a first-level cache of 4 KiB a way.
bool rows_collide(const Layer& layer) {
  return layer.input_stride * int64_t(sizeof(bf16)) % 1024 == 0;
}

// The inputs as panels: [panels][steps][32 rows][32 inputs].
void copy_to_panels(const Layer& layer, bf16* panels, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 8;  // steps that are read of a row at a time
  for (int64_t index = begin; index < end; ++index) {
    const int64_t row = index * kPanel, num_rows = std::min(kPanel, layer.num_rows - row);
    bf16* panel = panels + index * layer.num_steps * kPanel * kInputs;
    for (int64_t first = 0; first < layer.num_steps; first += kTogether) {
      const int64_t last = std::min(layer.num_steps, first + kTogether);
      for (int64_t r = 0; r < num_rows; ++r) {
        const bf16* from = layer.input + (row + r) * layer.input_stride;
        for (int64_t step = first; step < last; ++step)
          _mm512_store_si512(panel + (step * kPanel + r) * kInputs,
                             _mm512_loadu_si512(from + step * kInputs));
      }
    }
  }
}

// Panel after panel over groups [begin, end), as many inputs at a time as stay in the second-level
// cache with their weight. The next panel is fetched meanwhile.
void panels(const Layer& layer, const bf16* copied, int64_t begin, int64_t end, bool tiles) {
  constexpr int64_t kSums = kPanel * kOutputs;
  const int64_t num_groups = end - begin, num_panels = (layer.num_rows + kPanel - 1) / kPanel;
  const int64_t group_bytes = kStepElements * sizeof(bf16);  // of a step
  const int64_t depth = std::min(layer.num_steps, kPartBytes / (num_groups * group_bytes));
  // The sums of a panel wait for its next inputs, unless these are all.
  const int64_t waiting = depth < layer.num_steps ? num_panels : 1;
  float* all_sums = scratch<float>(waiting * num_groups * kSums);
  const int64_t row_stride = copied ? kInputs : layer.input_stride;
  const int64_t step_stride = copied ? kPanel * kInputs : kInputs;
  const int64_t panel_stride = copied ? layer.num_steps * kPanel * kInputs : kPanel * row_stride;
  const int64_t block_steps = copied ? kCopiedSteps : kBlockSteps;
  Prefetch ahead{};
  ahead.row_stride = row_stride;
  ahead.step_stride = step_stride;
  const int64_t rows_per_group = (kPanel + num_groups - 1) / num_groups;
  for (int64_t first = 0; first < layer.num_steps; first += depth) {
    const int64_t last = std::min(layer.num_steps, first + depth);
    for (int64_t index = 0; index < num_panels; ++index) {
      const int64_t row = index * kPanel, num_rows = std::min(kPanel, layer.num_rows - row);
      if (tiles && (index == 0 || num_rows < kPanel)) configure(num_rows);
      const Panel panel{(copied ? copied : layer.input) + index * panel_stride, num_rows, row_stride,
                        step_stride, kHalf * row_stride};
      float* sums = all_sums + (waiting > 1 ? index * num_groups * kSums : 0);
      for (int64_t step = first; step < last; step += block_steps) {
        const int64_t num_steps = std::min(block_steps, last - step);
        for (int64_t group = 0; group < num_groups; ++group) {
          const int64_t coming = group * rows_per_group, left = layer.num_rows - row - kPanel;
          ahead.num_rows = std::clamp<int64_t>(left - coming, 0, rows_per_group);
          ahead.rows = panel.data + panel_stride + coming * row_stride + step * step_stride;
          multiply<0>(panel, step, layer.group(begin + group) + step * kStepElements, num_steps,
                      sums + group * kSums, ahead, tiles);
        }
      }
      if (last == layer.num_steps) store_groups(layer, sums, row, num_rows, begin, num_groups);
    }
  }
}

void run(const Layer& layer, int64_t num_groups, int num_threads) {
  const bool tiles = isa_level >= kAmx;
  const int64_t row_bytes = layer.num_steps * kInputs * sizeof(bf16);
  const bool small = layer.num_rows * row_bytes <= kInputBytes;
  const int64_t num_panels = (layer.num_rows + kPanel - 1) / kPanel;
  // While memory is the limit a thread that was held up must not hold up the others: the last eighth
  // goes to whoever is ready.
  const int64_t fixed = small ? num_groups * 7 / 8 / 2 * 2 : num_groups;
  std::atomic<int64_t> next{fixed};
  bf16* copied = nullptr;
  if (!small && rows_collide(layer))
    copied = scratch<bf16>(num_panels * layer.num_steps * kPanel * kInputs);
#pragma omp parallel num_threads(num_threads)
  {
    // An even number of groups, so that two can be stored together.
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    auto share = [&](int64_t part) {
      return std::min(fixed, (fixed * part / threads + 1) / 2 * 2);
    };
    const int64_t begin = share(thread), end = thread + 1 == threads ? fixed : share(thread + 1);
    if (small) {
      if (begin < end) stream(layer, begin, end, tiles);
      for (int64_t at; (at = next.fetch_add(kClaim)) < num_groups;)
        stream(layer, at, std::min(at + kClaim, num_groups), tiles);
    } else {
      if (copied) {
        copy_to_panels(layer, copied, num_panels * thread / threads,
                       num_panels * (thread + 1) / threads);
#pragma omp barrier
      }
      for (int64_t at = begin; at < end; at += kPartGroups)
        panels(layer, copied, at, std::min(end, at + kPartGroups), tiles);
    }
    if (layer.stream) _mm_sfence();
    if (tiles) release_tiles();
  }
}

}  // namespace
#endif

// weight [num_rows, width], rows `stride` elements apart, into packed; width a multiple of 32.
extern "C" void pack_weight(const bf16* weight, int64_t stride, bf16* packed, int64_t num_rows,
                            int64_t width, bool gated, int num_threads) {
  for_each_pair(num_rows, width, gated, num_threads, [&](int64_t at, int64_t row, int64_t k) {
    uint32_t pair = 0;
    if (row >= 0) std::memcpy(&pair, weight + row * stride + k, sizeof(pair));
    std::memcpy(packed + at, &pair, sizeof(pair));
  });
}

// The weight [num_rows, width], contiguous, that was packed.
extern "C" void unpack_weight(const bf16* packed, bf16* weight, int64_t num_rows, int64_t width,
                              bool gated, int num_threads) {
  for_each_pair(num_rows, width, gated, num_threads, [&](int64_t at, int64_t row, int64_t k) {
    if (row >= 0) std::memcpy(weight + row * width + k, packed + at, sizeof(uint32_t));
  });
}

// input [num_rows, width] and output [num_rows, num_outputs], rows `*_stride` elements apart; bias
// [num_outputs], or [2 * num_outputs] of a gated weight, or null. Needs isa_level >= kAvx512Bf16.
extern "C" void linear(const bf16* input, int64_t input_stride, const bf16* packed,
                       const bf16* bias, bf16* output, int64_t output_stride, int64_t num_rows,
                       int64_t num_outputs, int64_t width, int epilogue, int num_threads) {
#ifdef HAVE_VECTORS
  if (num_rows == 0) return;  // no tile has no rows
  const bool gated = epilogue != kPlain;
  const bool lines = reinterpret_cast<uintptr_t>(output) % 64 == 0 && output_stride % 32 == 0 &&
                     num_outputs % 32 == 0;
  const bool large = num_rows * num_outputs * int64_t(sizeof(bf16)) >= kStreamBytes;
  const Layer layer{input,  input_stride,  packed,   bias,           output,
                    output_stride, num_rows, num_outputs, width / kInputs, Epilogue(epilogue),
                    lines && large};
  run(layer, num_groups_of(gated ? 2 * num_outputs : num_outputs, gated), num_threads);
#endif
}
CALLABLE(linear)
