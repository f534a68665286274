// Sixteen numbers at a time, for processors with AVX-512 BF16.

#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_VECTORS
#include <immintrin.h>

#include "numbers.h"

namespace {

inline __m512 widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}
inline __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

// Rounded to bf16 and back.
inline __m512 rounded(__m512 values) { return widen(narrow(values)); }

inline __m512 load16(const bf16* at) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
inline __m512 load16(const float* at) { return _mm512_loadu_ps(at); }
inline void store16(bf16* at, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), narrow(values));
}

}  // namespace
#endif
