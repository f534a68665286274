// The matrix instructions (AMX), written as assembly: GCC 12 loses stores to the configuration and
// does not know that tiles read memory.

#pragma once

#include <cstdint>

#if defined(__AVX512BF16__) && defined(__x86_64__)
#define HAVE_TILES

namespace {

// The shape of the eight tiles: rows each, 64 bytes a row.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void load_config(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

}  // namespace

// Strides are in bytes and int64_t.
#define TILE_ZERO(TILE) asm volatile("tilezero %%tmm" #TILE : : : "memory")
#define TILE_LOAD(TILE, AT, STRIDE) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #TILE : : "r"(AT), "r"(STRIDE) : "memory")
// What is loaded is not needed again soon: it should not push out of the cache what is.
#define TILE_LOAD_ONCE(TILE, AT, STRIDE) \
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #TILE : : "r"(AT), "r"(STRIDE) : "memory")
#define TILE_STORE(TILE, AT, STRIDE) \
  asm volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" : : "r"(AT), "r"(STRIDE) : "memory")
// SUM [rows, 16] fp32 += LEFT [rows, 32] bf16 @ RIGHT [16 pairs, 16, 2] bf16.
#define TILE_DOT(SUM, LEFT, RIGHT) \
  asm volatile("tdpbf16ps %%tmm" #RIGHT ", %%tmm" #LEFT ", %%tmm" #SUM : : : "memory")
#endif
