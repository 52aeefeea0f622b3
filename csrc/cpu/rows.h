// Splits the rows of a matrix over OpenMP threads, and a thread's rows over tiles.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace pp {

// Below this many bytes of weights one thread is faster: waking a second costs about 5 us, 60 KB of streaming.
constexpr int64_t kSerialBytes = 128 << 10;

// Calls body(first, last) once on each thread, for row ranges that are multiples of `step` rows.
template <class Body>
void split_rows(int64_t rows, int64_t step, int64_t bytes, int threads, Body body) {
  const int64_t steps = (rows + step - 1) / step;
  if (bytes < kSerialBytes) threads = 1;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, steps)));
  if (threads == 1) return body(int64_t{0}, rows);
#pragma omp parallel num_threads(threads)
  {
    const int64_t count = omp_get_num_threads(), id = omp_get_thread_num();
    const int64_t first = steps * id / count * step, last = std::min(rows, steps * (id + 1) / count * step);
    if (first < last) body(first, last);
  }
}

// Builds for AMD from Zen 4 on, which reads memory fastest as one stream (linear24_stream.h).
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define PP_STREAM 1
constexpr bool kOneStream = true;
#else
constexpr bool kOneStream = false;
#endif

// Which of a thread's rows are read side by side: `count` tiles, `step` rows from one to the next, of rows that lie `apart`.
struct Tiling {
  int64_t count, step, apart;

  // Each row of a tile is in a part of its own, which is read in order. Against neighbours, from memory, linear24 with one
  // token on one and two threads: 0.94x to 1.4x on an AMD EPYC (Zen 3, 2026-11-29), 0.99x to 1.18x on a Xeon with AMX
  // (2026-11-30); the gain is greatest for short rows.
  static Tiling of(int64_t rows, int tile_rows) {
    const int64_t count = rows / tile_rows;
    return kOneStream ? Tiling{count, tile_rows, 1} : Tiling{count, 1, count};
  }
};

}  // namespace pp
