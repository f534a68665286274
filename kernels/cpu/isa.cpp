// What the processor can do, and what the kernels may use of it.

#include "isa.h"

#include <cstdint>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

int isa_level = kGeneric;

// The highest level that the processor, the system and the compiler's flags allow.
extern "C" int highest_isa() {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16")) return kGeneric;
  uint32_t a = 7, b, c = 0, d;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool amx_bf16 = d & (1u << 22), amx_tile = d & (1u << 24);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // Linux asks that a process asks
  if (amx_bf16 && amx_tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0)
    return kAmx;
  return kAvx512Bf16;
#else
  return kGeneric;
#endif
}

extern "C" void set_isa(int level) { isa_level = level; }
