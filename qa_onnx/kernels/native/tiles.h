// AMX: eight registers of 16 rows of 64 bytes, and the matmul of two of them added to a third.
//
// Written as assembly, for the compilers' own functions take no register from a template's argument.
#pragma once

#include <cstdint>

namespace {

constexpr int64_t kTileSide = 16, kTileRowBytes = 64, kTileBytes = kTileSide * kTileRowBytes;

struct alignas(64) TileConfig {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// A thread calls it before its first tile: the first `short_tiles` registers have `rows` rows, the others 16.
inline void configure_tiles(int short_tiles, int64_t rows) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kTileRowBytes;
    config.rows[i] = uint8_t(i < short_tiles ? rows : kTileSide);
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}
// After its last one, or the system saves 8 KiB at each switch of threads.
inline void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
inline void load_tile(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(rows), "r"(stride) : "memory");
}
template <int TILE>
inline void store_tile(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(rows), "r"(stride) : "memory");
}
// sums += a @ b: a has uint8, b int8 in groups of four (sums: int32).
template <int SUMS, int A, int B>
inline void dot_int8_tiles() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
}
// sums += a @ b: both have bfloat16, b in groups of two (sums: float32).
template <int SUMS, int A, int B>
inline void dot_bfloat16_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(A), "i"(B));
}

}  // namespace
