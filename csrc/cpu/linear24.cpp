// linear24 for float32, bf16 and fp16 weights. Few tokens: x is permuted in registers, W is never expanded; from kLanesFrom
// tokens on linear24_lanes.h is faster.
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

// A tile is R rows times M tokens. kSpan: columns of x that one step of a tile covers.
constexpr int kSpan = kLanes == 4 ? 8 : 32;
constexpr int kRows = kLanes == 8 ? 2 : 4, kTokens = 4;
constexpr int64_t kTileBlock = 64 / kRows;  // tiles that pass over one tile of x before the next; W of a block stays in L2

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
  int64_t apart;  // rows between two rows of a tile
  bool ahead;     // whether to prefetch
};

#if defined(PP_STREAM)

// linear24_stream.h does it all

#elif defined(__AVX512F__)

void prepare(float*, int64_t) {}

// 16 weights span 8 groups, 32 columns: two vectors of x. Lane i takes x[4 * (i / 2) + its two bits].
template <class T, int R, int M>
void tile(const Job<T>& job, int64_t row, int64_t token, float (*out)[M]) {
  const auto& a = job.a;
  const int64_t half = a.cols / 2, stride = a.meta_stride(), next = job.apart * half, next_meta = job.apart * stride;
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
      const __m512i lane = _mm512_srlv_epi32(_mm512_set1_epi32(bits(meta + r * next_meta + i / 4)), shift);
      const __m512i index = _mm512_ternarylogic_epi32(lane, three, base, 0xea);  // lane & 3 | base
      const __m512 v = (__m512)load_values(w + r * next + i);
      for (int m = 0; m < M; ++m) {
        sum[r][m] = _mm512_fmadd_ps(v, _mm512_permutex2var_ps(low[m], index, high[m]), sum[r][m]);
      }
    }
  };
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    if (job.ahead) {
      for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(w + r * next + i) + kAhead, _MM_HINT_T0);
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

// x in groups 0 4 1 5 2 6 3 7 of every 32 columns, which is what interleaving two rows below asks for.
void prepare(float* x, int64_t stride) {
  for (int64_t c = 0; c < stride; c += 32) {
    float from[32];
    std::memcpy(from, x + c, sizeof from);
    for (int g = 0; g < 8; ++g) std::memcpy(x + c + 8 * (g % 4) + 4 * (g / 4), from + 4 * g, 4 * sizeof(float));
  }
}

// 16 kept weights of each of two rows as four vectors: a 128-bit lane of vector j holds both weights of group j (of group
// j + 4 in the upper lane) for row 0 and for row 1.
inline void interleave(const BFloat16* w0, const BFloat16* w1, __m256* v) {
  const __m256i a = load_raw<__m256i>(w0), b = load_raw<__m256i>(w1), zero = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi32(a, b), high = _mm256_unpackhi_epi32(a, b);
  v[0] = (__m256)_mm256_unpacklo_epi16(zero, low);
  v[1] = (__m256)_mm256_unpackhi_epi16(zero, low);
  v[2] = (__m256)_mm256_unpacklo_epi16(zero, high);
  v[3] = (__m256)_mm256_unpackhi_epi16(zero, high);
}

// Weights 0 to 3 and 8 to 11 of `p`.
inline __m256 two_groups_apart(const float* p) { return _mm256_set_m128(_mm_loadu_ps(p + 8), _mm_loadu_ps(p)); }

inline __m256 two_groups_apart(const Float16* p) {
  return _mm256_cvtph_ps(_mm_set_epi64x(load_raw<int64_t>(p + 8), load_raw<int64_t>(p)));
}

template <class T>
inline void interleave(const T* w0, const T* w1, __m256* v) {
  for (int i = 0; i < 4; i += 2) {
    const __m256d a = (__m256d)two_groups_apart(w0 + 2 * i), b = (__m256d)two_groups_apart(w1 + 2 * i);
    v[i] = (__m256)_mm256_unpacklo_pd(a, b);
    v[i + 1] = (__m256)_mm256_unpackhi_pd(a, b);
  }
}

// Two rows at a time: vpermilps picks all four factors of a lane from the four columns of its group, and needs only the low
// two bits of an index. 2 unpacks, 4 widenings and 4 shifts serve 32 weights (bf16); then 4 permutes and 4 multiply-adds a
// token.
template <class T, int R, int M>
void tile(const Job<T>& job, int64_t row, int64_t token, float (*out)[M]) {
  constexpr int kKept = 16;  // weights of a row in a step
  const auto& a = job.a;
  const int64_t half = a.cols / 2, stride = a.meta_stride();
  const float* x = job.x + token * job.stride;
  const __m256i shift = _mm256_setr_epi32(0, 2, 0, 2, 16, 18, 16, 18);
  const int64_t other = R == 2 ? job.apart : 0;  // a single row is paired with itself
  const T* w[2] = {static_cast<const T*>(a.values) + row * half, static_cast<const T*>(a.values) + (row + other) * half};
  const uint8_t* meta[2] = {a.meta + row * stride, a.meta + (row + other) * stride};
  __m256 sum[M][2];  // a chain of sums for even and odd vectors: one would wait for each multiply-add
  for (auto& s : sum) s[0] = s[1] = _mm256_setzero_ps();
  const auto step = [&](int64_t i, const T* w0, const T* w1, int64_t bytes) __attribute__((always_inline)) {
    const __m256i bits = _mm256_blend_epi32(_mm256_set1_epi32(load_meta(meta[0] + i / 4, bytes)),
                                            _mm256_set1_epi32(load_meta(meta[1] + i / 4, bytes)), 0xcc);
    __m256i index = _mm256_srlv_epi32(bits, shift);
    __m256 v[4];
    interleave(w0, w1, v);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256 factors = _mm256_permutevar_ps(load_raw<__m256>(x + m * job.stride + 2 * i + 8 * j), index);
        sum[m][j % 2] = _mm256_fmadd_ps(v[j], factors, sum[m][j % 2]);
      }
      index = _mm256_srli_epi32(index, 4);
    }
  };
  int64_t i = 0;
  for (; i + kKept <= half; i += kKept) {
    if (job.ahead) {
      for (int r = 0; r < R; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(w[r] + i) + kAhead, _MM_HINT_T0);
      }
    }
    step(i, w[0] + i, w[1] + i, 4);
  }
  if (const int64_t rest = half - i) {
    T last[2][kKept] = {};
    std::memcpy(last[0], w[0] + i, rest * sizeof(T));
    std::memcpy(last[1], w[1] + i, rest * sizeof(T));
    step(i, last[0], last[1], stride - i / 4);
  }
  for (int m = 0; m < M; ++m) {
    const __m256 both = _mm256_add_ps(sum[m][0], sum[m][1]);
    const __m128 s = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    out[0][m] = s[0] + s[1];
    if (R == 2) out[R - 1][m] = s[2] + s[3];
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
    const T* values = static_cast<const T*>(a.values) + (row + r * job.apart) * (a.cols / 2);
    const uint8_t* meta = a.meta + (row + r * job.apart) * a.meta_stride();
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
      if (a.bias) v += load(a.bias + row + r * job.apart, 1);
      store(a.y + (token + m) * a.rows + row + r * job.apart, v, 1);
    }
  }
}

// Calls body(M, token) for tiles of M tokens.
template <class Body>
void each_tile(int64_t begin, int64_t end, Body body) {
  int64_t t = begin;
  for (; t + kTokens <= end; t += kTokens) body(std::integral_constant<int, kTokens>(), t);
  for (; t + 2 <= end; t += 2) body(std::integral_constant<int, 2>(), t);
  for (; t < end; ++t) body(std::integral_constant<int, 1>(), t);
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
    const Tiling tiles = Tiling::of(last - first, kRows);
    Job<T> job{a, x.get(), stride, tiles.apart, false};
    for (int64_t block = 0; block < tiles.count; block += kTileBlock) {
      const int64_t end = std::min(tiles.count, block + kTileBlock);
      each_tile(begin, a.tokens, [&](auto m, int64_t t) {
        job.ahead = t == begin;
        for (int64_t i = block; i < end; ++i) run_tile<T, kRows, m.value>(job, first + i * tiles.step, t);
      });
    }
    job.ahead = false;
    for (int64_t row = first + tiles.count * kRows; row < last; ++row) {
      each_tile(begin, a.tokens, [&](auto m, int64_t t) { run_tile<T, 1, m.value>(job, row, t); });
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
  const int64_t done = by_lanes<T>(a);
  if (done < tokens) permute(a, done);
#endif
}

}  // namespace

PP_OP("linear24_f32", linear24<float>);
PP_OP("linear24_bf16", linear24<BFloat16>);
PP_OP("linear24_f16", linear24<Float16>);
