// Numbers as the kernels compute with them: fp32, loaded from and rounded to fp32 or bf16.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float load(float value) { return value; }
inline float load(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value != value ? 0x7fc0 : uint16_t(rounded);
}
inline void store(float* at, float value) { *at = value; }
inline void store(bf16* at, float value) { at->bits = bf16_bits(value); }

template <typename T>
inline float round(float value);
template <>
inline float round<float>(float value) { return value; }
template <>
inline float round<bf16>(float value) { return load(bf16{bf16_bits(value)}); }

// e^x to within 2 units in the last place (Cody and Waite's reduction, a polynomial of degree 6).
inline float exponential(float x) {
  x = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  float n = __builtin_rintf(x * 1.44269504f);
  float r = __builtin_fmaf(n, 2.12194440e-4f, __builtin_fmaf(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = __builtin_fmaf(p, r, 1.3981999507e-3f);
  p = __builtin_fmaf(p, r, 8.3334519073e-3f);
  p = __builtin_fmaf(p, r, 4.1665795894e-2f);
  p = __builtin_fmaf(p, r, 1.6666665459e-1f);
  p = __builtin_fmaf(p, r, 5.0000001201e-1f);
  p = __builtin_fmaf(p * r, r, r + 1.0f);
  uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline float gelu_tanh(float x) {
  float inner = 0.7978845608f * (x + 0.044715f * x * x * x);
  float t = 1.0f - 2.0f / (exponential(2.0f * inner) + 1.0f);
  return 0.5f * x * (1.0f + t);
}

}  // namespace
