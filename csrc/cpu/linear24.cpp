// linear24 for float32, bf16 and fp16 weights. Few tokens: x is permuted in registers, W is never expanded; from 8 tokens
// on linear24_lanes.h is faster.
// Per 16 kept weights and token: one permute of x and one FMA, so a dense kernel at its FMA peak is matched in
// multiply-adds, and at small M, where memory decides, 9/16 of the bytes (bf16) are read.
// Sums are float32 whatever the type of W.
#include <algorithm>
#include <cmath>
#include <memory>

#include "op.h"
#include "linear24.h"
#include "linear24_lanes.h"
#include "linear24_stream.h"
#include "rows.h"
#include "vec.h"

namespace {

using namespace pp;

// A tile is R rows times M tokens. kSpan: columns of x that one vector of kept weights covers.
constexpr int kSpan = 2 * kLanes;
constexpr int kRows = 4, kTokens = 4;
constexpr int64_t kPanel = kMostVectors * kLanes, kLanesFrom = kLanes == 4 ? 2 : 8;  // tokens
constexpr int64_t kRowBlock = 64;  // rows that pass over one tile of x before the next; W of a block stays in L2

inline uint32_t load_meta(const uint8_t* p, int64_t bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, bytes);
  return bits;
}

template <class T>
struct Job {
  const Linear24<T>& a;
  const float* x;  // [tokens, stride], float32, padded with zeros, in the order that prepare() makes
  int64_t stride;
  int64_t ahead;  // rows between the row in use and the one to prefetch; 0: none
};

#if defined(PP_STREAM)

// linear24_stream.h does it all

#elif defined(__AVX512F__)

void prepare(float*, int64_t) {}

// 16 weights span 8 groups, 32 columns: two vectors of x. Lane i takes x[4 * (i / 2) + its two bits].
template <class T, int R, int M>
void tile(const Job<T>& job, int64_t row, int64_t token, float (*out)[M]) {
  const auto& a = job.a;
  const int64_t half = a.cols / 2, stride = a.meta_stride();
  const T* w = static_cast<const T*>(a.values) + row * half;
  const uint8_t* meta = a.meta + row * stride;
  const float* x = job.x + token * job.stride;
  const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i base = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i three = _mm512_set1_epi32(3);
  __m512 sum[R][M];
  for (auto& s : sum)
    for (auto& v : s) v = _mm512_setzero_ps();

  const auto step = [&](int64_t i, auto load_values, auto bits) {
    __m512 low[M], high[M];
    for (int m = 0; m < M; ++m) {
      low[m] = _mm512_loadu_ps(x + m * job.stride + 2 * i);
      high[m] = _mm512_loadu_ps(x + m * job.stride + 2 * i + 16);
    }
    for (int r = 0; r < R; ++r) {
      const __m512i lane = _mm512_srlv_epi32(_mm512_set1_epi32(bits(meta + r * stride + i / 4)), shift);
      const __m512i index = _mm512_ternarylogic_epi32(lane, three, base, 0xea);  // lane & 3 | base
      const __m512 v = (__m512)load_values(w + r * half + i);
      for (int m = 0; m < M; ++m) {
        sum[r][m] = _mm512_fmadd_ps(v, _mm512_permutex2var_ps(low[m], index, high[m]), sum[r][m]);
      }
    }
  };
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    if (job.ahead) {
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(w + (r + job.ahead) * half + i, _MM_HINT_T0);
        if (i % 64 == 0) _mm_prefetch(meta + (r + job.ahead) * stride + i / 4, _MM_HINT_T0);
      }
    }
    step(i, [](const T* p) { return load(p); }, [](const uint8_t* p) { return load_meta(p, 4); });
  }
  if (const int rest = static_cast<int>(half - i)) {
    const int64_t bytes = stride - i / 4;
    step(i, [=](const T* p) { return load(p, rest); }, [=](const uint8_t* p) { return load_meta(p, bytes); });
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) out[r][m] = _mm512_reduce_add_ps(sum[r][m]);
}

#elif defined(__AVX2__)

// x in groups 0 2 1 3 of every 16 columns, which is what unpacking two rows below asks for.
void prepare(float* x, int64_t stride) {
  for (int64_t c = 0; c < stride; c += 16) {
    float* g = x + c;
    for (int j = 4; j < 8; ++j) std::swap(g[j], g[j + 4]);
  }
}

// Two rows share a vector: a 128-bit lane holds both weights of one group for row 0 and for row 1, so that vpermilps
// picks all four factors from the four columns of that group, and needs only the low two bits of an index.
template <class T, int R, int M>
void tile(const Job<T>& job, int64_t row, int64_t token, float (*out)[M]) {
  const auto& a = job.a;
  const int64_t half = a.cols / 2, stride = a.meta_stride();
  const float* x = job.x + token * job.stride;
  const __m256i shift_low = _mm256_setr_epi32(0, 2, 16, 18, 8, 10, 24, 26);
  const __m256i shift_high = _mm256_setr_epi32(4, 6, 20, 22, 12, 14, 28, 30);
  for (int r = 0; r < R; r += 2) {
    const int64_t next = r + 1 < R ? 1 : 0;  // a single row is paired with itself
    const T* w = static_cast<const T*>(a.values) + (row + r) * half;
    const uint8_t* meta = a.meta + (row + r) * stride;
    __m256 sum[M];
    for (auto& v : sum) v = _mm256_setzero_ps();
    const auto step = [&](int64_t i, auto load_values, int64_t bytes) {
      const uint32_t both = load_meta(meta + i / 4, bytes) | load_meta(meta + next * stride + i / 4, bytes) << 16;
      const __m256i bits = _mm256_set1_epi32(static_cast<int>(both));
      const __m256i index_low = _mm256_srlv_epi32(bits, shift_low), index_high = _mm256_srlv_epi32(bits, shift_high);
      const __m256d v0 = (__m256d)load_values(w + i), v1 = (__m256d)load_values(w + next * half + i);
      const __m256 low = (__m256)_mm256_unpacklo_pd(v0, v1), high = (__m256)_mm256_unpackhi_pd(v0, v1);
      for (int m = 0; m < M; ++m) {
        const float* p = x + m * job.stride + 2 * i;
        sum[m] = _mm256_fmadd_ps(low, _mm256_permutevar_ps(_mm256_loadu_ps(p), index_low), sum[m]);
        sum[m] = _mm256_fmadd_ps(high, _mm256_permutevar_ps(_mm256_loadu_ps(p + 8), index_high), sum[m]);
      }
    };
    int64_t i = 0;
    for (; i + 8 <= half; i += 8) {
      if (job.ahead) {
        _mm_prefetch(w + job.ahead * half + i, _MM_HINT_T0);
        _mm_prefetch(w + (next + job.ahead) * half + i, _MM_HINT_T0);
      }
      step(i, [](const T* p) { return load(p); }, 2);
    }
    if (const int rest = static_cast<int>(half - i)) {
      step(i, [=](const T* p) { return load(p, rest); }, std::min<int64_t>(2, stride - i / 4));
    }
    for (int m = 0; m < M; ++m) {
      const __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum[m]), _mm256_extractf128_ps(sum[m], 1));
      out[r][m] = s[0] + s[1];
      if (next) out[r + 1][m] = s[2] + s[3];
    }
  }
}

#else

void prepare(float*, int64_t) {}

// Plain C++: a piece of a row is converted once and then gathers from every token.
template <class T, int R, int M>
void tile(const Job<T>& job, int64_t row, int64_t token, float (*out)[M]) {
  const auto& a = job.a;
  constexpr int kPiece = 128;
  float w[kPiece];
  int column[kPiece];
  for (int r = 0; r < R; ++r) {
    const T* values = static_cast<const T*>(a.values) + (row + r) * (a.cols / 2);
    const uint8_t* meta = a.meta + (row + r) * a.meta_stride();
    float sum[M] = {};
    for (int64_t i = 0; i < a.cols / 2; i += kPiece) {
      const int n = static_cast<int>(std::min<int64_t>(kPiece, a.cols / 2 - i));
      for (int j = 0; j < n; j += kLanes) {
        const VecF v = load(values + i + j, std::min(kLanes, n - j));
        std::memcpy(w + j, &v, sizeof v);
      }
      for (int j = 0; j < n; ++j) column[j] = 4 * (j / 2) + (meta[(i + j) / 4] >> 2 * ((i + j) % 4) & 3);
      for (int m = 0; m < M; ++m) {
        const float* x = job.x + (token + m) * job.stride + 2 * i;
        float even = 0, odd = 0;
        for (int j = 0; j < n; j += 2) {
          even += w[j] * x[column[j]];
          odd += w[j + 1] * x[column[j + 1]];
        }
        sum[m] += even + odd;
      }
    }
    for (int m = 0; m < M; ++m) out[r][m] = sum[m];
  }
}

#endif

#if defined(PP_STREAM)

template <class T>
void permute(const Linear24<T>& a) {
  using K = std::conditional_t<std::is_same_v<T, float>, StreamF32,
                               std::conditional_t<std::is_same_v<T, Float16>, StreamF16, StreamBf16>>;
  const auto x = pack_tokens<K>(a.tokens, a.cols, [&](int64_t token, int64_t c, int64_t count, typename K::Element* to) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      store(to + i, load(a.x + token * a.cols + c + i, n), n);
    }
  });
  const int64_t steps = round_up(a.cols, 2 * K::kKept) / (2 * K::kKept);
  const Stream<K> job{x.get(), steps, static_cast<const T*>(a.values), a.meta, a.tokens, a.rows, a.cols, a.threads};
  stream(job, [&](int64_t token, int64_t row, int count, const float* sums) {
    for (int i = 0; i < count; i += kLanes) {
      const int n = std::min(kLanes, count - i);
      VecF v = load(sums + i, n);
      if (a.bias) v += load(a.bias + row + i, n);
      store(a.y + token * a.rows + row + i, v, n);
    }
  });
}

#else

template <class T, int R, int M>
void run_tile(const Job<T>& job, int64_t row, int64_t token) {
  const auto& a = job.a;
  float sum[R][M];
  tile<T, R, M>(job, row, token, sum);
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) {
      VecF v{sum[r][m]};
      if (a.bias) v += load(a.bias + row + r, 1);
      store(a.y + (token + m) * a.rows + row + r, v, 1);
    }
  }
}

template <class T, int M>
void run_rows(const Job<T>& job, int64_t first, int64_t last, int64_t token) {
  int64_t row = first;
  for (; row + kRows <= last; row += kRows) run_tile<T, kRows, M>(job, row, token);
  for (; row < last; ++row) run_tile<T, 1, M>(job, row, token);
}

template <class T>
void permute(const Linear24<T>& a, int64_t begin) {
  const int64_t stride = round_up(a.cols, kSpan);
  const auto x = aligned<float>(a.tokens * stride + kLanes);
  for (int64_t t = begin; t < a.tokens; ++t) {
    float* row = x.get() + t * stride;
    for (int64_t c = 0; c < stride; c += kLanes) {
      const VecF v = c + kLanes <= a.cols ? load(a.x + t * a.cols + c)
                     : c < a.cols         ? load(a.x + t * a.cols + c, static_cast<int>(a.cols - c))
                                          : VecF{};
      std::memcpy(row + c, &v, sizeof v);
    }
    prepare(row, stride);
  }
  const int64_t row_bytes = a.cols / 2 * sizeof(T);
  split_rows(a.rows, kRows, a.rows * row_bytes * std::min<int64_t>(a.tokens, 16), a.threads, [&](int64_t first, int64_t last) {
    // Prefetch whole tiles of rows, 4 KB of each stream ahead: 17 GB/s from memory on one core instead of 12.
    const int64_t tiles = std::max<int64_t>(1, 4096 / (kRows * std::max<int64_t>(row_bytes, 1)));
    for (int64_t block = first; block < last; block += kRowBlock) {
      const int64_t end = std::min(last, block + kRowBlock);
      Job<T> job{a, x.get(), stride, tiles * kRows};
      int64_t t = begin;
      for (; t + kTokens <= a.tokens; t += kTokens, job.ahead = 0) run_rows<T, kTokens>(job, block, end, t);
      for (; t + 2 <= a.tokens; t += 2, job.ahead = 0) run_rows<T, 2>(job, block, end, t);
      for (; t < a.tokens; ++t, job.ahead = 0) run_rows<T, 1>(job, block, end, t);
    }
  });
}

#endif

#if defined(__AMX_BF16__)
bool finite(const BFloat16* x, int64_t n) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= (x[i].bits & 0x7f80) == 0x7f80;
  return !bad;
}

bool by_tiles(const Linear24<BFloat16>& a) {
  if (a.tokens < kAmxTokens || !finite(a.x, a.tokens * a.cols)) return false;
  std::unique_ptr<float[]> sums(new float[a.tokens * a.rows]);
  if (!amx_bf16({a.x, a.cols, a.values, a.meta, sums.get(), a.tokens, a.rows, a.cols, a.threads})) return false;
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t r = 0; r < a.rows; r += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.rows - r));
      VecF v = load(sums.get() + t * a.rows + r, n);
      if (a.bias) v += load(a.bias + r, n);
      store(a.y + t * a.rows + r, v, n);
    }
  }
  return true;
}
#endif

template <class T>
void linear24(std::uintptr_t x, std::uintptr_t values, std::uintptr_t meta, std::uintptr_t bias, std::uintptr_t y,
              int64_t tokens, int64_t rows, int64_t cols, int threads) {
  const Linear24<T> a{pointer<const T>(x),    pointer<const void>(values), pointer<const uint8_t>(meta),
                      nullptr,                pointer<const T>(bias),      pointer<T>(y),
                      tokens,                 rows,                        cols,
                      threads};
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (by_tiles(a)) return;
  }
#endif
#if defined(PP_STREAM)
  permute(a);
#else
  const int64_t rest = tokens % kPanel < kLanesFrom ? tokens % kPanel : 0;
  if (tokens > rest) by_lanes<T>(a, tokens - rest);
  if (rest) permute(a, tokens - rest);
#endif
}

}  // namespace

PP_OP("linear24_f32", linear24<float>);
PP_OP("linear24_bf16", linear24<BFloat16>);
PP_OP("linear24_f16", linear24<Float16>);
