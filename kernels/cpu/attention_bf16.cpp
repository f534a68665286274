// Attention of a tile in pairs of bf16: their products are summed in fp32, weights are rounded to
// bf16 before they meet the values. The products run on AVX-512 BF16 or on AMX.

#include "attention_tile.h"

#ifdef ATTENTION_HAS_PAIRS

#include <immintrin.h>

#include "amx.h"

namespace attention {
namespace {

// 2^x to within 2^-13, which bf16 rounds away; 0 for -infinity.
inline __m512 power_of_two(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, 0x01);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0.07802453f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22606715f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69583354f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.99992522f));
  return _mm512_scalef_ps(p, x);  // rounds x down itself
}

// 16 rows of 16 pairs become 16 columns: to[pair] holds that pair of all rows.
inline void transpose(const __m512i row[16], __m512i* to) {
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

// The first `count` of 32 numbers: nothing is read past them.
inline __mmask32 first_of(int64_t count) {
  return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

// sums[row][16 p + j] (+)= the products of pairs left[row][k] and right[p][k][j].
template <int rows, int panels>
inline void multiply_pairs(const bf16* left, int64_t left_stride, const bf16* right, int64_t panel,
                           float* sums, int64_t stride, int64_t depth, bool add) {
  __m512 sum[rows][panels];
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < panels; ++p)
      sum[r][p] = add ? _mm512_load_ps(sums + r * stride + 16 * p) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh column[panels];
    for (int p = 0; p < panels; ++p)
      column[p] = (__m512bh)_mm512_load_si512(right + p * panel + 16 * k);
    for (int r = 0; r < rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, left + r * left_stride + k, 4);
      const __m512bh spread = (__m512bh)_mm512_set1_epi32(pair);
      for (int p = 0; p < panels; ++p) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], spread, column[p]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int p = 0; p < panels; ++p) _mm512_store_ps(sums + r * stride + 16 * p, sum[r][p]);
}

struct Pairs {
  using Page = bf16;
  using Number = bf16;

  static void pack_query(const bf16* from, bf16* to, int64_t width, int64_t padded) {
    for (int64_t d = 0; d < padded; d += 32)
      _mm512_store_si512(to + d, _mm512_maskz_loadu_epi16(first_of(width - d), from + d));
  }

  static void pack_keys(const bf16* from, bf16* to, int64_t width, int64_t padded) {
    for (int64_t d = 0; d < padded; d += 32) {
      const __mmask32 dims = first_of(width - d);
      __m512i row[16];
      for (int64_t s = 0; s < kPage; ++s)
        row[s] = _mm512_maskz_loadu_epi16(dims, from + s * width + d);
      transpose(row, reinterpret_cast<__m512i*>(to + d * kPage));
    }
  }

  static void pack_values(const bf16* from, int64_t count, bf16* to, int64_t panel, int64_t width,
                          int64_t padded) {
    alignas(64) static constexpr uint16_t kLow[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t d = 0; d < padded; d += 32)
      for (int64_t s = 0; s < kPage; s += 2) {
        const __mmask32 dims = first_of(width - d);
        const __m512i even =
            _mm512_maskz_loadu_epi16(s < count ? dims : 0, from + s * width + d);
        const __m512i odd =
            _mm512_maskz_loadu_epi16(s + 1 < count ? dims : 0, from + (s + 1) * width + d);
        bf16* at = to + d / kPage * panel + s * kPage;
        _mm512_store_si512(at, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(at + panel, _mm512_permutex2var_epi16(even, high, odd));
      }
  }

  static void multiply(const bf16* left, int64_t left_stride, const bf16* right, int64_t panel,
                       float* sums, int64_t stride, int64_t rows, int64_t columns, int64_t depth,
                       bool add) {
    for (int64_t column = 0; column < columns; column += 32) {
      const auto block = [&](auto count, int64_t row) {
        multiply_pairs<count, 2>(left + row * left_stride, left_stride,
                                 right + column / 16 * panel, panel,
                                 sums + row * stride + column, stride, depth, add);
      };
      int64_t row = 0;
      for (; row + 8 <= rows; row += 8) block(std::integral_constant<int, 8>{}, row);
      for (; row + 4 <= rows; row += 4) block(std::integral_constant<int, 4>{}, row);
      for (; row < rows; ++row) block(std::integral_constant<int, 1>{}, row);
    }
  }

  static float weigh(float* scores, int64_t count, int64_t from, int64_t to, const Step& step,
                     const Bias& bias, float* largest, float* sum) {
    auto* weights = reinterpret_cast<bf16*>(scores);  // never ahead of the scores that are read
    if (from >= to) {
      std::memset(weights, 0, count * sizeof(bf16));
      return 1.0f;
    }
    float scale = step.scale;
    if (step.softcap != 0.0f || scale <= 0.0f || step.slopes) {
      scale_scores(scores, from, to, step, bias);
      scale = 1.0f;
    }
    const auto seen = [&](int64_t s) {  // which of 16 slots
      const int64_t low = std::max<int64_t>(0, from - s), high = std::min<int64_t>(16, to - s);
      return high <= low ? __mmask16(0) : __mmask16((0xffffu >> (16 - high + low)) << low);
    };
    const bool all = from == 0 && to == count;
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 most = nothing, more = nothing;
    if (all)
      for (int64_t s = 0; s < count; s += 32) {
        most = _mm512_max_ps(most, _mm512_load_ps(scores + s));
        more = _mm512_max_ps(more, _mm512_load_ps(scores + s + 16));
      }
    else
      for (int64_t s = 0; s < count; s += 16)
        most = _mm512_mask_max_ps(most, seen(s), most, _mm512_load_ps(scores + s));
    const float highest =
        std::max(*largest, scale * _mm512_reduce_max_ps(_mm512_max_ps(most, more)));
    const __m512 factor = _mm512_set1_ps(scale * 1.44269504f);
    const __m512 shift = _mm512_set1_ps(-highest * 1.44269504f);
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int64_t s = 0; s < count; s += 32) {
      __m512 a = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + s), factor, shift));
      __m512 b = power_of_two(_mm512_fmadd_ps(_mm512_load_ps(scores + s + 16), factor, shift));
      if (!all) {
        a = _mm512_maskz_mov_ps(seen(s), a);
        b = _mm512_maskz_mov_ps(seen(s + 16), b);
      }
      first = _mm512_add_ps(first, a);
      second = _mm512_add_ps(second, b);
      _mm512_store_si512(weights + s, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    }
    const float shrink = highest == *largest ? 1.0f : exponential(*largest - highest);
    *sum = *sum * shrink + _mm512_reduce_add_ps(_mm512_add_ps(first, second));
    *largest = highest;
    return shrink;
  }
};

// As of pairs, 16 or 32 rows at a time: rows past the last are computed, and are nobody's.
template <bool two>
inline void multiply_tiles(const bf16* left, int64_t left_stride, const bf16* right, int64_t panel,
                           float* sums, int64_t stride, int64_t columns, int64_t depth, bool add) {
  const bf16* below = left + 16 * left_stride;
  for (int64_t column = 0; column < columns; column += 32, right += 2 * panel) {
    float* to = sums + column;
    if (add) {
      TILE_LOAD(0, to, stride * 4);
      TILE_LOAD(1, to + 16, stride * 4);
      if (two) {
        TILE_LOAD(2, to + 16 * stride, stride * 4);
        TILE_LOAD(3, to + 16 * stride + 16, stride * 4);
      }
    } else {
      TILE_ZERO(0);
      TILE_ZERO(1);
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      TILE_LOAD(4, left + k, left_stride * 2);
      TILE_LOAD(6, right + 16 * k, 64);
      TILE_DOT(0, 4, 6);
      TILE_LOAD(7, right + panel + 16 * k, 64);
      TILE_DOT(1, 4, 7);
      if (two) {
        TILE_LOAD(5, below + k, left_stride * 2);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
      }
    }
    TILE_STORE(0, to, stride * 4);
    TILE_STORE(1, to + 16, stride * 4);
    if (two) {
      TILE_STORE(2, to + 16 * stride, stride * 4);
      TILE_STORE(3, to + 16 * stride + 16, stride * 4);
    }
  }
}

struct Tiles : Pairs {
  static void multiply(const bf16* left, int64_t left_stride, const bf16* right, int64_t panel,
                       float* sums, int64_t stride, int64_t rows, int64_t columns, int64_t depth,
                       bool add) {
    if (rows > 16)
      multiply_tiles<true>(left, left_stride, right, panel, sums, stride, columns, depth, add);
    else
      multiply_tiles<false>(left, left_stride, right, panel, sums, stride, columns, depth, add);
  }
};

}  // namespace

void attend_pairs(const Step& step, const Tile& tile, const Sums& out, char* scratch) {
  attend_tile<Pairs>(step, tile, out, scratch);
}

void attend_tiles(const Step& step, const Tile& tile, const Sums& out, char* scratch) {
  attend_tile<Tiles>(step, tile, out, scratch);
}

}  // namespace attention

#endif
