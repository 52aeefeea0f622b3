// What the machine can do, for benchmarks/: memory bandwidth, multiply-adds, and dense matrix-vector products written
// with the same care as linear24. They are the limit that 2:4 has to beat; nothing else calls them.
#include <algorithm>
#include <cstring>
#include <memory>

#include "op.h"
#include "rows.h"
#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using namespace pp;

// Reads `bytes` at `data` as `streams` streams a thread, each prefetched `ahead` bytes if that is not 0.
int64_t read_memory(std::uintptr_t data, int64_t bytes, int64_t streams, int64_t ahead, int threads) {
  typedef int64_t Line __attribute__((vector_size(64)));
  int64_t total = 0;
  split_rows(bytes / 64 / streams, 1, bytes, threads, [&](int64_t first, int64_t last) {
    const char* p = pointer<const char>(data) + 64 * first * streams;
    const int64_t length = 64 * (last - first);
    Line sum[4] = {};
    for (int64_t i = 0; i < length; i += 64) {
      for (int64_t s = 0; s < streams; ++s) {
        if (ahead) __builtin_prefetch(p + s * length + i + ahead);
        sum[s % 4] += load_raw<Line>(p + s * length + i);
      }
    }
    const Line all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma omp atomic
    total += all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
  });
  return total;
}

// `count` times 10 independent vector FMAs on every thread; returns the lanes of a vector. The sum of all lanes goes to
// `out`: a loop whose result stays inside was compiled to nothing and counted at nine times what the unit can do.
int64_t multiply_add(std::uintptr_t out, int64_t count, int threads) {
  float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    VecF sum[10], factor = splat(0.999f), term = splat(0.001f);
    for (int i = 0; i < 10; ++i) sum[i] = splat(static_cast<float>(i));
    for (int64_t i = 0; i < count; ++i) {
      for (auto& s : sum) s = s * factor + term;
    }
    for (auto& s : sum)
      for (int i = 0; i < kLanes; ++i) total += s[i];
  }
  *pointer<float>(out) = total;
  return kLanes;
}

constexpr int kRows = 4;

// Calls body(first row, rows apart) for groups of kRows; the last one overlaps others. Rows: at least kRows.
template <class Body>
void each_group(int64_t rows, int64_t row_bytes, int threads, Body body) {
  split_rows(rows, kRows, rows * row_bytes, threads, [&](int64_t first, int64_t last) {
    const Tiling groups = Tiling::of(last - first, kRows);
    for (int64_t i = 0; i < groups.count; ++i) body(first + i * groups.step, groups.apart);
    if ((last - first) % kRows) body(last - kRows, int64_t{1});
  });
}

// Bytes from the weights in use to those to prefetch.
int64_t ahead_of(int64_t row_bytes, int64_t apart) {
  constexpr int64_t kAhead = 4096;
  return apart > 1 ? kAhead : kRows * std::max<int64_t>(1, kAhead / (kRows * row_bytes)) * row_bytes;
}

// y [rows] = W [rows, cols] x in bf16; cols a multiple of 32.
void dense_gemv_bf16(std::uintptr_t x, std::uintptr_t w, std::uintptr_t y, int64_t rows, int64_t cols, int threads) {
  const auto* from = pointer<const BFloat16>(x);
  const auto* weights = pointer<const BFloat16>(w);
#if defined(__AVX512BF16__)
  const BFloat16* wide = from;
  constexpr int kStep = 32;
#else
  std::unique_ptr<float[]> converted(new float[cols]);
  float* wide = converted.get();
  for (int64_t c = 0; c < cols; c += kLanes) {
    const VecF v = load(from + c);
    std::memcpy(wide + c, &v, sizeof v);
  }
  constexpr int kStep = kLanes;
#endif
  each_group(rows, cols * 2, threads, [&](int64_t row, int64_t apart) {
    const int64_t ahead = ahead_of(cols * 2, apart) / 2;
    VecF sum[kRows] = {};
    for (int64_t c = 0; c < cols; c += kStep) {
      for (int r = 0; r < kRows; ++r) {
        const BFloat16* p = weights + (row + r * apart) * cols + c;
        __builtin_prefetch(p + ahead);
#if defined(__AVX512BF16__)
        sum[r] = (VecF)_mm512_dpbf16_ps((__m512)sum[r], load_raw<__m512bh>(p), load_raw<__m512bh>(wide + c));
#else
        sum[r] += load(p) * load(wide + c);
#endif
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float total = 0;
      for (int i = 0; i < kLanes; ++i) total += sum[r][i];
      store(pointer<BFloat16>(y) + row + r * apart, VecF{total}, 1);
    }
  });
}

// y int32 [rows] = W int8 [rows, cols] x, without the scales; x uint8 with 128 added, as the multiply-add wants it;
// sums [rows]: the sum of each row's weights. cols a multiple of 64.
void dense_gemv_i8(std::uintptr_t x, std::uintptr_t w, std::uintptr_t sums, std::uintptr_t y, int64_t rows, int64_t cols,
                   int threads) {
  const auto* from = pointer<const uint8_t>(x);
  const auto* weights = pointer<const int8_t>(w);
  each_group(rows, cols, threads, [&](int64_t row, int64_t apart) {
    const int64_t ahead = ahead_of(cols, apart);
    int32_t total[kRows] = {};
#if defined(__AVX512VNNI__)
    __m512i sum[kRows] = {};
    for (int64_t c = 0; c < cols; c += 64) {
      const __m512i v = load_raw<__m512i>(from + c);
      for (int r = 0; r < kRows; ++r) {
        const int8_t* p = weights + (row + r * apart) * cols + c;
        __builtin_prefetch(p + ahead);
        sum[r] = _mm512_dpbusd_epi32(sum[r], v, load_raw<__m512i>(p));
      }
    }
    for (int r = 0; r < kRows; ++r) total[r] = _mm512_reduce_add_epi32(sum[r]);
#else
    for (int r = 0; r < kRows; ++r) {
      const int8_t* p = weights + (row + r * apart) * cols;
      __builtin_prefetch(p + ahead);
      for (int64_t c = 0; c < cols; ++c) total[r] += p[c] * from[c];
    }
#endif
    for (int r = 0; r < kRows; ++r) {
      const int64_t n = row + r * apart;
      pointer<int32_t>(y)[n] = total[r] - 128 * pointer<const int32_t>(sums)[n];
    }
  });
}

}  // namespace

PP_OP("read_memory", read_memory);
PP_OP("multiply_add", multiply_add);
PP_OP("dense_gemv_bf16", dense_gemv_bf16);
PP_OP("dense_gemv_i8", dense_gemv_i8);
