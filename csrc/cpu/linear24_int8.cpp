// linear24 for int8 weights: tokens are quantized to int8 as the formula in ops/linear24.py says, sums are exact integers,
// so every instruction set gives the same result.
//
// Two rows share a vector: unpacking them by 8 bytes puts the weights of four groups of row 0 and of the same four groups
// of row 1 into one 128-bit lane, whose factors all lie in 16 bytes of x. One byte shuffle and one multiply-add a token
// then serve 64 weights (AVX-512 VNNI).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>

#include "op.h"
#include "linear24.h"
#include "linear24_stream.h"
#include "rows.h"
#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

using namespace pp;

#if defined(__AVX512F__)
constexpr int kWeights = 64;  // kept weights of a row in one vector
#elif defined(__AVX2__)
constexpr int kWeights = 32;
#else
constexpr int kWeights = 16;
#endif
constexpr int kSpan = 2 * kWeights;  // columns
constexpr int kTokens = 8;
constexpr int64_t kPairs = 16;  // of rows that pass over one tile of x before the next

struct Tokens {
  std::unique_ptr<int8_t[], Free> q;  // [tokens, stride], zeros behind the last column
  std::unique_ptr<float[]> sx;
  int64_t stride;
};

typedef int8_t VecB __attribute__((vector_size(kLanes)));

// To the nearest integer, ties to even. Not by adding and taking off 1.5 * 2^23: the compiler would fuse the product
// before it into that addition, and instruction sets with and without FMA would quantize differently.
inline VecI rounded(VecF v) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (VecI)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (VecI)_mm_cvtps_epi32((__m128)v);
#else
  VecI whole;
  for (int i = 0; i < kLanes; ++i) whole[i] = static_cast<int32_t>(std::nearbyint(v[i]));
  return whole;
#endif
}

// q = round(x * 127 / peak), sx = peak / 127. A token with an Inf or NaN gets sx = NaN; one whose peak is below
// 1e-36 (127 / peak would not be finite) counts as zero.
template <class T>
void quantize(const T* x, int64_t cols, int8_t* q, float* sx) {
  VecU peak{};
  const auto at = [&](int64_t c) { return load(x + c, static_cast<int>(std::min<int64_t>(kLanes, cols - c))); };
  for (int64_t c = 0; c < cols; c += kLanes) {
    const VecU bits = (VecU)at(c) & 0x7fffffffu;  // ordered as integers, NaN above Inf above all numbers
    peak = bits > peak ? bits : peak;
  }
  uint32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = std::max<uint32_t>(top, peak[i]);
  float max;
  std::memcpy(&max, &top, sizeof max);
  const bool finite = top < 0x7f800000u, zero = max < 1e-36f;
  *sx = !finite ? NAN : zero ? 0 : max / 127;
  const VecF inverse = splat(!finite || zero ? 0 : 127 / max);
  for (int64_t c = 0; c < cols; c += kLanes) {
    const VecB whole = __builtin_convertvector(finite ? rounded(at(c) * inverse) : VecI{}, VecB);
    store_raw(q + c, whole, std::min<int64_t>(kLanes, cols - c));
  }
}

#if defined(__AVX512F__)

// Shuffles see 16 bytes of x at a time: pieces 0 2 4 6 go with the low unpack of two rows, 1 3 5 7 with the high one;
// bytes become q + 128, since the multiply-add takes unsigned times signed. sum(w) * 128 is taken off at the end.
void prepare(int8_t* q, int64_t stride) {
  for (int64_t c = 0; c < stride; c += 128) {
    int8_t from[128];
    std::memcpy(from, q + c, 128);
    for (int piece = 0; piece < 8; ++piece) {
      for (int i = 0; i < 16; ++i) q[c + piece % 2 * 64 + piece / 2 * 16 + i] = static_cast<int8_t>(from[16 * piece + i] ^ -128);
    }
  }
}

inline __m512i add_halves(__m512i a, __m512i b, bool lanes) {
  const __m512 x = (__m512)a, y = (__m512)b;
  return lanes ? _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd))
               : _mm512_add_epi32((__m512i)_mm512_shuffle_ps(x, y, 0x88), (__m512i)_mm512_shuffle_ps(x, y, 0xdd));
}

// Totals of both rows in 8 vectors of pair(): token after token.
inline __m512i totals(const __m512i* v) {
  const __m512i a = add_halves(v[0], v[1], false), b = add_halves(v[2], v[3], false);
  const __m512i c = add_halves(v[4], v[5], false), d = add_halves(v[6], v[7], false);
  return add_halves(add_halves(a, b, true), add_halves(c, d, true), true);
}

// out [M][2]: the integer sums of two rows for M tokens
template <int M>
void pair(const int8_t* const w[2], const uint8_t* const meta[2], int64_t half, const int8_t* x, int64_t stride,
          int64_t ahead, int32_t* out) {
  const __m512i field_low = _mm512_set1_epi64(0x0e0c0a0806040200), field_high = _mm512_set1_epi64(0x1e1c1a1816141210);
  const __m512i base = _mm512_set1_epi64(0x0c0c080804040000), three = _mm512_set1_epi8(3);
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum[M] = {}, weight_sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < half; i += 64) {
    const int64_t n = std::min<int64_t>(64, half - i);
    const __mmask64 valid = n == 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
    const __mmask16 valid_meta = static_cast<__mmask16>((1u << (n + 3) / 4) - 1);
    const __m512i a = _mm512_maskz_loadu_epi8(valid, w[0] + i), b = _mm512_maskz_loadu_epi8(valid, w[1] + i);
    const __m128i ma = _mm_maskz_loadu_epi8(valid_meta, meta[0] + i / 4);
    const __m128i mb = _mm_maskz_loadu_epi8(valid_meta, meta[1] + i / 4);
    _mm_prefetch(w[0] + i + ahead, _MM_HINT_T0);
    _mm_prefetch(w[1] + i + ahead, _MM_HINT_T0);
    const __m256i dwords = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi32(ma, mb)),
                                                   _mm_unpackhi_epi32(ma, mb), 1);
    const __m512i bits = _mm512_cvtepu32_epi64(dwords);
    const __m512i index_low =
        _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(field_low, bits), three, base, 0xea);
    const __m512i index_high =
        _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(field_high, bits), three, base, 0xea);
    const __m512i low = _mm512_unpacklo_epi64(a, b), high = _mm512_unpackhi_epi64(a, b);
    weight_sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(weight_sum, ones, low), ones, high);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const int8_t* p = x + m * stride + 2 * i;
      sum[m] = _mm512_dpbusd_epi32(sum[m], _mm512_shuffle_epi8(_mm512_loadu_si512(p), index_low), low);
      sum[m] = _mm512_dpbusd_epi32(sum[m], _mm512_shuffle_epi8(_mm512_loadu_si512(p + 64), index_high), high);
    }
  }
  __m512i result[M];  // not sum itself: GCC would keep an array that others see in memory
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) result[m] = _mm512_sub_epi32(sum[m], _mm512_slli_epi32(weight_sum, 7));
  if constexpr (M % 8 == 0) {
    for (int m = 0; m < M; m += 8) {
      const __m512i all = totals(result + m);
      std::memcpy(out + 2 * m, &all, sizeof all);
    }
  } else {
    for (int m = 0; m < M; ++m) {
      out[2 * m] = _mm512_mask_reduce_add_epi32(0x3333, result[m]);
      out[2 * m + 1] = _mm512_mask_reduce_add_epi32(0xcccc, result[m]);
    }
  }
}

#elif defined(__AVX2__)

void prepare(int8_t* q, int64_t stride) {  // pieces of 16 bytes: 0 2 1 3
  for (int64_t c = 0; c < stride; c += 64) std::swap_ranges(q + c + 16, q + c + 32, q + c + 32);
}

// Where the 64 kept weights of two rows find their factors, as places in the 16 bytes of x that belong to a 128-bit lane:
// 8 bytes of metadata a row become nibbles, one a group, in the order of the two unpacks below, and a table gives both
// columns of each.
inline void indices(__m256i bytes, __m256i& low, __m256i& high) {
  const __m256i order = _mm256_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         4, 5, 12, 13, 6, 7, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i first = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,  //
                                         0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  const __m256i second = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                          0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m256i fifteen = _mm256_set1_epi8(15), group = _mm256_set1_epi64x(0x0c0c080804040000);
  const __m256i spread = _mm256_shuffle_epi8(bytes, order);
  const __m256i nibbles = _mm256_unpacklo_epi8(_mm256_and_si256(spread, fifteen),
                                               _mm256_and_si256(_mm256_srli_epi16(spread, 4), fifteen));
  const __m256i a = _mm256_shuffle_epi8(first, nibbles), b = _mm256_shuffle_epi8(second, nibbles);
  low = _mm256_or_si256(_mm256_unpacklo_epi8(a, b), group);
  high = _mm256_or_si256(_mm256_unpackhi_epi8(a, b), group);
}

template <int M>
void pair(const int8_t* const w[2], const uint8_t* const meta[2], int64_t half, const int8_t* x, int64_t stride,
          int64_t ahead, int32_t* out) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[M];
  for (auto& s : sum) s = _mm256_setzero_si256();
  const auto step = [&](int64_t i, const int8_t* w0, const int8_t* w1, const uint8_t* m0, const uint8_t* m1)
                        __attribute__((always_inline)) {
    const __m256i a = load_raw<__m256i>(w0), b = load_raw<__m256i>(w1);
    __m256i index_low, index_high;
    indices(_mm256_blend_epi32(_mm256_set1_epi64x(load_raw<int64_t>(m0)), _mm256_set1_epi64x(load_raw<int64_t>(m1)), 0xcc),
            index_low, index_high);
    const __m256i low = _mm256_unpacklo_epi64(a, b), high = _mm256_unpackhi_epi64(a, b);
    const __m256i abs_low = _mm256_abs_epi8(low), abs_high = _mm256_abs_epi8(high);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const int8_t* p = x + m * stride + 2 * i;
      // abs(w) * (x with the sign of w): two products of at most 128 * 127 fit 16 bits
      const __m256i x_low = _mm256_sign_epi8(_mm256_shuffle_epi8(load_raw<__m256i>(p), index_low), low);
      const __m256i x_high = _mm256_sign_epi8(_mm256_shuffle_epi8(load_raw<__m256i>(p + 32), index_high), high);
      sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(_mm256_maddubs_epi16(abs_low, x_low), ones));
      sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(_mm256_maddubs_epi16(abs_high, x_high), ones));
    }
  };
  int64_t i = 0;
  for (; i + 32 <= half; i += 32) {
    _mm_prefetch(w[0] + i + ahead, _MM_HINT_T0);
    _mm_prefetch(w[1] + i + ahead, _MM_HINT_T0);
    step(i, w[0] + i, w[1] + i, meta[0] + i / 4, meta[1] + i / 4);
  }
  if (const int64_t rest = half - i) {
    int8_t last[2][32] = {};
    uint8_t last_meta[2][8] = {};
    for (int r = 0; r < 2; ++r) {
      std::memcpy(last[r], w[r] + i, rest);
      std::memcpy(last_meta[r], meta[r] + i / 4, (rest + 3) / 4);
    }
    step(i, last[0], last[1], last_meta[0], last_meta[1]);
  }
  for (int m = 0; m < M; ++m) {
    const __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum[m]), _mm256_extracti128_si256(sum[m], 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 2 * m), _mm_hadd_epi32(s, s));
  }
}

#else

void prepare(int8_t*, int64_t) {}

template <int M>
void pair(const int8_t* const w[2], const uint8_t* const meta[2], int64_t half, const int8_t* x, int64_t stride,
          int64_t ahead, int32_t* out) {
  for (int r = 0; r < 2; ++r) {
    for (int m = 0; m < M; ++m) out[2 * m + r] = 0;
    for (int64_t i = 0; i < half; ++i) {
      const int64_t column = 4 * (i / 2) + (meta[r][i / 4] >> 2 * (i % 4) & 3);
      for (int m = 0; m < M; ++m) out[2 * m + r] += w[r][i] * x[m * stride + column];
    }
  }
}

#endif

// y of `count` rows of one token from their integer sums
template <class T>
void finish(const Linear24<T>& a, const Tokens& x, int64_t token, int64_t row, int64_t count, const int32_t* sums) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    const VecI whole = (VecI)load(reinterpret_cast<const float*>(sums + i), n);  // the bits as they are
    VecF v = __builtin_convertvector(whole, VecF) * (splat(x.sx[token]) * load(a.scales + row + i, n));
    if (a.bias) v += load(a.bias + row + i, n);
    store(a.y + token * a.rows + row + i, v, n);
  }
}

// At most kPairs pairs of rows, the first of which begins with row `first`.
template <class T, int M>
void run_pairs(const Linear24<T>& a, const Tokens& x, int64_t first, const Tiling& pairs, int64_t token) {
  const int64_t half = a.cols / 2, parts = pairs.step == 1 ? 2 : 1;  // of rows that follow each other
  // Neighbours: whole pairs of rows, at least 4 KB ahead.
  const int64_t ahead = parts == 2 ? kAhead : 2 * half * std::max<int64_t>(1, 2048 / std::max<int64_t>(half, 1));
  int32_t sums[M][2 * kPairs];
  for (int64_t i = 0; i < pairs.count; ++i) {
    const int64_t row = first + i * pairs.step, other = row + pairs.apart;
    const int8_t* values = static_cast<const int8_t*>(a.values);
    const int8_t* const w[2] = {values + row * half, values + other * half};
    const uint8_t* const meta[2] = {a.meta + row * a.meta_stride(), a.meta + other * a.meta_stride()};
    int32_t both[2 * M];
    pair<M>(w, meta, half, x.q.get() + token * x.stride, x.stride, ahead, both);
    for (int m = 0; m < M; ++m) {
      sums[m][i * pairs.step] = both[2 * m];
      sums[m][i * pairs.step + (parts == 2 ? kPairs : 1)] = both[2 * m + 1];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int64_t p = 0; p < parts; ++p) {
      finish(a, x, token + m, first + p * pairs.apart, 2 * pairs.count / parts, sums[m] + p * kPairs);
    }
  }
}

// Tokens [begin, end), two rows at a time.
template <class T>
void permute(const Linear24<T>& a, Tokens& x, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) prepare(x.q.get() + t * x.stride, x.stride);
  const int64_t bytes = a.rows * a.cols / 2 * std::min<int64_t>(end - begin, 16);
  split_rows(a.rows, 2, bytes, a.threads, [&](int64_t first, int64_t last) {
    const auto run = [&](int64_t row, const Tiling& pairs) {
      int64_t t = begin;
      for (; t + 2 * kTokens <= end; t += 2 * kTokens) run_pairs<T, 2 * kTokens>(a, x, row, pairs, t);
      for (; t + kTokens <= end; t += kTokens) run_pairs<T, kTokens>(a, x, row, pairs, t);
      for (; t + 4 <= end; t += 4) run_pairs<T, 4>(a, x, row, pairs, t);
      for (; t + 2 <= end; t += 2) run_pairs<T, 2>(a, x, row, pairs, t);
      for (; t < end; ++t) run_pairs<T, 1>(a, x, row, pairs, t);
    };
    const Tiling all = Tiling::of(last - first, 2);
    for (int64_t i = 0; i < all.count; i += kPairs) {
      run(first + i * all.step, {std::min(kPairs, all.count - i), all.step, all.apart});
    }
    if ((last - first) % 2) run(last - 1, {1, 1, 0});  // a row that is paired with itself
  });
}

#if defined(PP_STREAM)
// Tokens from `begin` on, row after row. It loads x twice for each multiply-add, permute() once: 8 tokens are faster there.
template <class T>
void by_stream(const Linear24<T>& a, const Tokens& x, int64_t begin) {
  const auto* q = reinterpret_cast<const uint8_t*>(x.q.get()) + begin * x.stride;
  const int64_t tokens = a.tokens - begin;
  const auto packed = pack_tokens<StreamInt8>(tokens, a.cols, [&](int64_t token, int64_t c, int64_t, uint8_t* to) {
    for (int i = 0; i < kSpan; ++i) to[i] = q[token * x.stride + c + i] ^ 128;
  });
  const Stream<StreamInt8> job{packed.get(), x.stride / kSpan, static_cast<const int8_t*>(a.values), a.meta, tokens, a.rows, a.cols, a.threads};
  stream(job, [&](int64_t token, int64_t row, int count, const int32_t* sums) {
    finish(a, x, begin + token, row, count, sums);
  });
}
#endif

template <class T>
bool by_tiles(const Linear24<T>& a, const Tokens& x) {
#if defined(__AMX_INT8__)
  if (a.tokens < kAmxTokens || a.tokens == kTokens) return false;
  std::unique_ptr<int32_t[]> sums(new int32_t[a.tokens * a.rows]);
  if (!amx_int8({x.q.get(), x.stride, a.values, a.meta, sums.get(), a.tokens, a.rows, a.cols, a.threads})) return false;
  for (int64_t t = 0; t < a.tokens; ++t) finish(a, x, t, 0, a.rows, sums.get() + t * a.rows);
  return true;
#else
  return false;
#endif
}

template <class T>
void linear24_i8(std::uintptr_t x, std::uintptr_t values, std::uintptr_t meta, std::uintptr_t scales, std::uintptr_t bias,
                 std::uintptr_t y, int64_t tokens, int64_t rows, int64_t cols, int threads) {
  const Linear24<T> a{pointer<const T>(x),         pointer<const void>(values), pointer<const uint8_t>(meta),
                      pointer<const float>(scales), pointer<const T>(bias),      pointer<T>(y),
                      tokens,                      rows,                        cols,
                      threads};
  const int64_t stride = round_up(cols, kSpan);
  Tokens q{aligned<int8_t>(tokens * stride), std::unique_ptr<float[]>(new float[tokens]), stride};
  std::memset(q.q.get(), 0, tokens * stride);
  for (int64_t t = 0; t < tokens; ++t) quantize(a.x + t * cols, cols, q.q.get() + t * stride, q.sx.get() + t);
  if (by_tiles(a, q)) return;
#if defined(PP_STREAM)
  const int64_t full = tokens - tokens % kTokens;
  if (full) permute(a, q, 0, full);
  if (full < tokens) by_stream(a, q, full);
#else
  permute(a, q, 0, tokens);
#endif
}

}  // namespace

PP_OP("linear24_i8_f32", linear24_i8<float>);
PP_OP("linear24_i8_bf16", linear24_i8<BFloat16>);
PP_OP("linear24_i8_f16", linear24_i8<Float16>);
