// Dot products of weight rows with the few rows of a decode step: what norm_linear and subset_ffn share.
//
// A tile is R weight rows times M tokens. Into how many chains a product is summed depends on the shape of the weight alone,
// not on the tile, so that a token's result does not depend, in any bit, on what else is in the batch.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "memory.h"
#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// A function whose registers are its own: where such a loop is inlined GCC keeps some of its sums in memory.
#define PP_ALONE __attribute__((noinline))

namespace pp {
namespace {

constexpr int kMostTokens = kLanes == 16 ? 8 : 4;  // of a tile; 32 registers hold 16 sums, 16 hold 8
constexpr int kMostSums = kLanes == 16 ? 16 : 8;

constexpr int rows_of(int tokens) { return std::min(4, kMostSums / tokens); }  // R for M

inline int64_t padded(int64_t n) { return (n + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

inline float from_bits(int64_t bits) {  // functions take integers only: a float32 comes as its bits
  const uint32_t low = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &low, sizeof value);
  return value;
}

// sum * scale + bias, rounded alike everywhere: the compiler would fuse it in one tile and not in another.
inline float finished(float sum, float scale, float bias) {
#if defined(__FMA__)
  return std::fma(sum, scale, bias);
#else
  return sum * scale + bias;
#endif
}

// The lane sums of up to 16 vectors.
inline void lane_sums(const VecF* v, int count, float* out) {
#if defined(__AVX512F__)
  __m512 a[8], b[4];
  const auto at = [&](int i) { return i < count ? (__m512)v[i] : _mm512_setzero_ps(); };
  for (int i = 0; i < 8; ++i) a[i] = _mm512_unpacklo_ps(at(2 * i), at(2 * i + 1)) + _mm512_unpackhi_ps(at(2 * i), at(2 * i + 1));
  for (int i = 0; i < 4; ++i) {
    b[i] = (__m512)(_mm512_unpacklo_pd((__m512d)a[2 * i], (__m512d)a[2 * i + 1])) +
           (__m512)(_mm512_unpackhi_pd((__m512d)a[2 * i], (__m512d)a[2 * i + 1]));
  }
  const __m512 low = _mm512_shuffle_f32x4(b[0], b[1], 0x88) + _mm512_shuffle_f32x4(b[0], b[1], 0xdd);
  const __m512 high = _mm512_shuffle_f32x4(b[2], b[3], 0x88) + _mm512_shuffle_f32x4(b[2], b[3], 0xdd);
  const __m512 all = _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
  _mm512_mask_storeu_ps(out, static_cast<__mmask16>((1u << count) - 1), all);
#elif defined(__AVX2__)
  for (int i = 0; i < count; i += 4) {
    const auto at = [&](int j) { return i + j < count ? (__m256)v[i + j] : _mm256_setzero_ps(); };
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(at(0), at(1)), _mm256_hadd_ps(at(2), at(3)));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    std::memcpy(out + i, &sums, std::min(4, count - i) * sizeof(float));
  }
#else
  for (int i = 0; i < count; ++i) {
    float sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += v[i][lane];
    out[i] = sum;
  }
#endif
}

// out[r * M + m] = w[r] . x[m] for x rows of `stride` floats, zero from `cols` to the next multiple of two vectors, kSide
// rows at a time in kChains chains of sums each. next[r]: the row to prefetch meanwhile, or null.
//
// Neighbours that are shorter than kShort bytes are read one after the other: rows of 1.1 KB side by side came at 60% to
// 80% of the speed that they have in order, rows of 16 KB in order at 70% to 90% of what they have side by side (EPYC
// Zen 3, 2026-11-29). One row and one token do not fill the multiply-adds with one chain.
constexpr int64_t kShort = 4096;

template <int kSide, int kChains, int R, int M, class T>
PP_ALONE void dot(const T* const* w, const T* const* next, const float* x, int64_t stride, int64_t cols, float* out) {
  constexpr int kLine = 64 / sizeof(T), kSpan = kChains * kLanes, kStep = std::max(kSpan, kLine);
  VecF done[R * M];  // not sum itself: GCC would keep an array that others see in memory
  for (int first = 0; first < R; first += kSide) {
    VecF sum[kChains][kSide * M] = {};
    const auto span = [&](int64_t i, auto load_weights) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int chain = 0; chain < kChains; ++chain, i += kLanes) {
        VecF weights[kSide];
#pragma GCC unroll 4
        for (int s = 0; s < kSide; ++s) weights[s] = load_weights(w[first + s] + i, i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const VecF v = load(x + m * stride + i);
#pragma GCC unroll 4
          for (int s = 0; s < kSide; ++s) sum[chain][s * M + m] += weights[s] * v;
        }
      }
    };
    const auto whole = [](const T* p, int64_t) { return load(p); };
    int64_t i = 0;
    for (; i + kStep <= cols; i += kStep) {
#pragma GCC unroll 4
      for (int s = 0; next && s < kSide; ++s) {
        for (int line = 0; line < kStep; line += kLine) __builtin_prefetch(next[first + s] + i + line);
      }
#pragma GCC unroll 8
      for (int j = 0; j < kStep; j += kSpan) span(i + j, whole);
    }
    for (; i + kSpan <= cols; i += kSpan) span(i, whole);
    if (i < cols) {
      span(i, [cols](const T* p, int64_t at) {
        return at < cols ? load(p, static_cast<int>(std::min<int64_t>(kLanes, cols - at))) : VecF{};
      });
    }
#pragma GCC unroll 8
    for (int j = 0; j < kSide * M; ++j) done[first * M + j] = kChains == 2 ? sum[0][j] + sum[kChains - 1][j] : sum[0][j];
  }
  lane_sums(done, R * M, out);
}

// Tokens go through in tiles of 8 (4 with small registers), 4, 2 and 1: body(first token, std::integral_constant M).
template <class Body>
inline void token_tiles(int64_t tokens, Body body) {
  int64_t t = 0;
  for (; t + kMostTokens <= tokens; t += kMostTokens) body(t, std::integral_constant<int, kMostTokens>());
  if (kMostTokens > 4 && t + 4 <= tokens) body(t, std::integral_constant<int, 4>()), t += 4;
  if (t + 2 <= tokens) body(t, std::integral_constant<int, 2>()), t += 2;
  if (t < tokens) body(t, std::integral_constant<int, 1>());
}

// Calls body(first row, R) for groups of R rows, then for the rest one by one.
template <int R, class Body>
inline void row_groups(int64_t first, int64_t last, Body body) {
  for (; first + R <= last; first += R) body(first, std::integral_constant<int, R>());
  for (; first < last; ++first) body(first, std::integral_constant<int, 1>());
}

// to [tokens, padded(cols)]: x, or x / sqrt(mean of x^2 + eps) * norm, with zeros behind the last column.
inline void normalize(const float* x, int64_t tokens, int64_t cols, const float* norm, float eps, float* to) {
  const int64_t stride = padded(cols);
  for (int64_t t = 0; t < tokens; ++t, x += cols, to += stride) {
    std::fill(to + cols, to + stride, 0.0f);
    VecF squares{};
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, cols - c));
      const VecF v = load(x + c, n);
      squares += v * v;
      store(to + c, v);
    }
    if (!norm) continue;
    float total;
    lane_sums(&squares, 1, &total);
    const VecF factor = splat(1.0f / std::sqrt(total / static_cast<float>(cols) + eps));
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, cols - c));
      store(to + c, load(to + c) * factor * load(norm + c, n));
    }
  }
}

}  // namespace
}  // namespace pp
