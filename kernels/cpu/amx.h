// Tiles of AMX: eight registers of 16 rows by 64 bytes, and the instructions on them.
//
// They are written as assembly: GCC 12 loses stores to the configuration and does not know that
// tile loads read memory. Only to be run at the level kAmx (isa.h), which asks Linux for the tiles.

#pragma once

#include <cstdint>

#if defined(__x86_64__)

namespace {

// The form of each tile; without a change all are full. A thread that has loaded one must release
// the tiles when it is done: the system saves and restores them as long as they are in use.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void configure_tiles(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}

inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

}  // namespace

// Tiles are named by their number; strides are in bytes.
#define TILE_LOAD(TILE, AT, STRIDE) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #TILE : : "r"(AT), "r"(int64_t(STRIDE)) : "memory")
// The same for what is not needed again soon: it should not push out of the cache what is.
#define TILE_LOAD_ONCE(TILE, AT, STRIDE) \
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #TILE : : "r"(AT), "r"(int64_t(STRIDE)) : "memory")
#define TILE_STORE(TILE, AT, STRIDE) \
  asm volatile("tilestored %%tmm" #TILE ", (%0,%1,1)" : : "r"(AT), "r"(int64_t(STRIDE)) : "memory")
#define TILE_ZERO(TILE) asm volatile("tilezero %%tmm" #TILE : : : "memory")

// sum[i][j] += left[i][2 k] * right[k][2 j] + left[i][2 k + 1] * right[k][2 j + 1], over k:
// left holds bf16 as it comes, right holds it in pairs of rows.
#define TILE_DOT(SUM, LEFT, RIGHT) \
  asm volatile("tdpbf16ps %%tmm" #RIGHT ", %%tmm" #LEFT ", %%tmm" #SUM : : : "memory")

#endif
