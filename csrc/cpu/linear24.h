// What the parts of linear24 on a CPU share: y [tokens, rows] = x [tokens, cols] W^T + bias, W packed 2:4 in the plain
// order of the file format. There is no layout of its own and nothing to prepare: the index bits of a row follow each
// other in the order of its weights, so 4 bytes of metadata become the 16 lane indices of a vector in two instructions.
#pragma once
#include <cstdint>

#include "memory.h"

namespace pp {

template <class T>
struct Linear24 {  // T: type of x, bias and y
  const T* x;           // [tokens, cols]
  const void* values;   // [rows, cols / 2], T or int8
  const uint8_t* meta;  // [rows, (cols + 7) / 8]
  const float* scales;  // [rows], with int8 values
  const T* bias;        // [rows] or null
  T* y;                 // [tokens, rows]
  int64_t tokens, rows, cols;
  int threads;

  int64_t meta_stride() const { return (cols + 7) / 8; }
};

constexpr int64_t kAhead = 4096;  // bytes of prefetch in a row that is read from memory

// Tokens from which AMX tiles are faster than permuting x (linear24_amx.cpp), but for 8 in int8: a tile of W has to be expanded
// first. By permutes 3 tokens are 1.04x to 1.5x as fast, 4 are 1.2x to 2.0x, 8 in int8 1.1x to 1.6x, 8 in bf16 0.5x, 7 0.6x
// to 1.1x (Xeon with AMX, one thread, weights from memory, 2026-11-30).
constexpr int64_t kAmxTokens = 5;

// The work as AMX tiles see it. They multiply by the zeros of W, and need to know where each weight goes: a caller
// passes finite x only, and takes another way when the answer is false, that is, when a nibble of meta is not one of
// the six patterns or the system does not allow AMX.
struct Tiles {
  const void* x;     // [tokens, cols], bf16 or int8
  int64_t x_stride;  // elements between tokens
  const void* values;
  const uint8_t* meta;
  void* out;  // [tokens, rows], float32 or int32 sums
  int64_t tokens, rows, cols;
  int threads;
};
bool amx_bf16(const Tiles& a);
bool amx_int8(const Tiles& a);

}  // namespace pp
