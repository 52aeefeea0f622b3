// linear24 where permutes of 128 bytes cost one cycle and there is a dot product of bf16 pairs (AMD from Zen 4 on):
// one vector of kept weights faces two vectors of x, whatever the type, and one permute and one multiply-add a token
// serve 64 bytes of weights, which stand for 128 of a dense matrix.
//
// Such a processor reads memory fastest as one stream: 27 GB/s on a core of Zen 4 row after row, 10 GB/s when 2, 4 or 8
// rows are read side by side, whatever is prefetched. So up to 4 tokens a row is finished before the next one begins.
// More tokens are computing, not reading: 2 rows times 8 tokens, in pieces of K that leave x in the L1 cache.
#pragma once
#include "rows.h"
#include "vec.h"

#if defined(PP_STREAM)

#include <algorithm>
#include <memory>
#include <type_traits>

#include "linear24.h"

namespace pp {
namespace {

// Each kind: type of a weight, of x and of a sum; kKept: weights in a vector.
template <class W, class X, class S>
struct Kind {
  using Weight = W;
  using Element = X;
  using Sum = S;
  static constexpr int kKept = 64 / sizeof(X);
};
using StreamF32 = Kind<float, float, float>;
using StreamF16 = Kind<Float16, float, float>;
using StreamBf16 = Kind<BFloat16, BFloat16, float>;
using StreamInt8 = Kind<int8_t, uint8_t, int32_t>;  // x with 128 added

// Columns of x, beginning at the vector's own, that the weights of one row have kept; bit i of valid: byte i is there.
template <class K>
inline __m512i columns(const uint8_t* meta, uint64_t valid) {
  const __m128i bits = _mm_maskz_loadu_epi8(static_cast<__mmask16>(valid), meta);
  if constexpr (K::kKept == 64) {
    const __m512i base = _mm512_set_epi64(0x7c7c787874747070, 0x6c6c686864646060, 0x5c5c585854545050, 0x4c4c484844444040,
                                          0x3c3c383834343030, 0x2c2c282824242020, 0x1c1c181814141010, 0x0c0c080804040000);
    const __m512i fields = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x0e0c0a0806040200), _mm512_cvtepu16_epi64(bits));
    return _mm512_ternarylogic_epi64(fields, _mm512_set1_epi8(3), base, 0xea);  // fields & 3 | base
  } else if constexpr (K::kKept == 32) {
    const __m512i base = _mm512_set_epi64(0x003c003c00380038, 0x0034003400300030, 0x002c002c00280028, 0x0024002400200020,
                                          0x001c001c00180018, 0x0014001400100010, 0x000c000c00080008, 0x0004000400000000);
    const __m512i place = _mm512_set_epi64(0x003e003c003a0038, 0x0036003400320030, 0x002e002c002a0028, 0x0026002400220020,
                                           0x001e001c001a0018, 0x0016001400120010, 0x000e000c000a0008, 0x0006000400020000);
    const __m512i fields = _mm512_multishift_epi64_epi8(place, _mm512_broadcastq_epi64(bits));
    return _mm512_ternarylogic_epi64(fields, _mm512_set1_epi16(3), base, 0xea);
  } else {
    const __m512i base = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512i place = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i fields = _mm512_srlv_epi32(_mm512_broadcastd_epi32(bits), place);
    return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi32(3), base, 0xea);
  }
}

// sum += weights times the columns `index` of the 128 bytes low, high
template <class K>
inline __m512i multiply(__m512i sum, __m512i weights, __m512i index, __m512i low, __m512i high) {
  if constexpr (K::kKept == 64) {
    return _mm512_dpbusd_epi32(sum, _mm512_permutex2var_epi8(low, index, high), weights);
  } else if constexpr (K::kKept == 32) {
    return (__m512i)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_permutex2var_epi16(low, index, high), (__m512bh)weights);
  } else {
    const __m512 x = (__m512)_mm512_permutex2var_epi32(low, index, high);
    return (__m512i)_mm512_fmadd_ps((__m512)weights, x, (__m512)sum);
  }
}

template <class K>
inline __m512i load_weights(const typename K::Weight* p, uint64_t valid) {  // bit i: weight i is there; others are zero
  if constexpr (K::kKept == 64) return _mm512_maskz_loadu_epi8(valid, p);
  if constexpr (K::kKept == 32) return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(valid), p);
  if constexpr (std::is_same_v<K, StreamF16>) {
    return (__m512i)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(valid), p));
  }
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(valid), p);
}

template <class K>
inline __m512i add(__m512i a, __m512i b) {
  if constexpr (K::kKept == 64) return _mm512_add_epi32(a, b);
  return (__m512i)((__m512)a + (__m512)b);
}

template <class K>
inline typename K::Sum total(__m512i v) {
  if constexpr (K::kKept == 64) return _mm512_reduce_add_epi32(v);
  return _mm512_reduce_add_ps((__m512)v);
}

// The totals of 16 vectors as one vector: 45 instructions instead of 16 times 8. Lane i has that of v[i].
template <class K>
inline __m512i totals(const __m512i* v) {
  __m512i a[8], b[4];
  for (int i = 0; i < 8; ++i) {
    a[i] = add<K>(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = add<K>(_mm512_unpacklo_epi64(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi64(a[2 * i], a[2 * i + 1]));
  }
  const __m512i low = add<K>(_mm512_shuffle_i32x4(b[0], b[1], 0x88), _mm512_shuffle_i32x4(b[0], b[1], 0xdd));
  const __m512i high = add<K>(_mm512_shuffle_i32x4(b[2], b[3], 0x88), _mm512_shuffle_i32x4(b[2], b[3], 0xdd));
  return add<K>(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

template <class K>
struct Stream {
  const typename K::Element* x;  // as pack_tokens writes it
  int64_t steps;                 // vectors of weights in a row
  const typename K::Weight* values;
  const uint8_t* meta;
  int64_t tokens, rows, cols;
  int threads;
};

// Tokens go through in tiles of 8, 4, 2 and 1.
inline int tile_of(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

// x as the kernel reads it: for each tile [steps][tokens of the tile][128 bytes], zeros behind the last column. Tokens one
// after the other would often be 4096 bytes apart, and 8 of them would push each other out of the L1 cache.
// fill(token, column, n, to) writes n elements.
template <class K, class Fill>
std::unique_ptr<typename K::Element[]> pack_tokens(int64_t tokens, int64_t cols, Fill fill) {
  constexpr int64_t kSpan = 2 * K::kKept;
  const int64_t steps = (cols + kSpan - 1) / kSpan;
  std::unique_ptr<typename K::Element[]> memory(new typename K::Element[tokens * steps * kSpan]);
  auto* to = memory.get();
  for (int64_t t = 0, size; t < tokens; t += size) {
    size = tile_of(tokens - t);
    for (int64_t c = 0; c < cols; c += kSpan) {
      for (int64_t m = 0; m < size; ++m, to += kSpan) {
        const int64_t n = std::min(kSpan, cols - c);
        if (n < kSpan) std::memset(to, 0, kSpan * sizeof *to);
        fill(t + m, c, n, to);
      }
    }
  }
  return memory;
}

constexpr int64_t kStreamRows = 32;  // rows of W that stay in the L2 cache while all tokens pass

// out[m * kStreamRows + r] += the products of R rows and M tokens over the kept weights [first, last); `ahead`: bytes to prefetch, or 0.
template <class K, int R, int M>
void stream_tile(const Stream<K>& a, int64_t row, int64_t token, int64_t first, int64_t last, int64_t ahead,
                 typename K::Sum* out) {
  constexpr int kKept = K::kKept, kSets = R * M == 1 ? 2 : 1;  // one chain of sums would wait for each multiply-add
  const int64_t half = a.cols / 2, meta_stride = (a.cols + 7) / 8;
  const auto* w = a.values + row * half;
  const uint8_t* meta = a.meta + row * meta_stride;
  const auto* x = a.x + (token * a.steps + first / kKept * M) * 2 * kKept;
  __m512i sum[kSets * R * M] = {}, weight_sum[R] = {};
  for (int64_t i = first; i < last; i += kSets * kKept) {
    for (int s = 0; s < kSets; ++s, x += 2 * M * kKept) {
      const int64_t at = i + s * kKept;
      if (s && at >= last) break;
      const int n = static_cast<int>(std::min<int64_t>(kKept, last - at));
      const uint64_t valid = n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1, valid_meta = (1u << (n + 3) / 4) - 1;
      __m512i weights[R], index[R];
      for (int r = 0; r < R; ++r) {
        if (ahead) _mm_prefetch(reinterpret_cast<const char*>(w + R * at + r * kKept) + ahead, _MM_HINT_T0);
        weights[r] = load_weights<K>(w + r * half + at, valid);
        index[r] = columns<K>(meta + r * meta_stride + at / 4, valid_meta);
        if constexpr (kKept == 64) weight_sum[r] = _mm512_dpbusd_epi32(weight_sum[r], _mm512_set1_epi8(1), weights[r]);
      }
      for (int m = 0; m < M; ++m) {
        __m512i low = load_raw<__m512i>(x + 2 * m * kKept);
        __m512i high = load_raw<__m512i>(x + (2 * m + 1) * kKept);
        if constexpr (R > 1) asm("" : "+v"(low), "+v"(high));  // GCC would load them again for every row
        for (int r = 0; r < R; ++r) {
          __m512i& to = sum[s * R * M + m * R + r];
          to = multiply<K>(to, weights[r], index[r], low, high);
        }
      }
    }
  }
  __m512i result[R * M];  // not sum itself: GCC would keep an array that others see in memory
#pragma GCC unroll 16
  for (int j = 0; j < R * M; ++j) {
    result[j] = kSets == 2 ? add<K>(sum[j], sum[kSets * R * M - 1]) : sum[j];
    if constexpr (kKept == 64) result[j] = _mm512_sub_epi32(result[j], _mm512_slli_epi32(weight_sum[j % R], 7));
  }
  if constexpr (R * M == 16) {
    typename K::Sum all[16];
    const __m512i v = totals<K>(result);
    std::memcpy(all, &v, sizeof all);
    for (int j = 0; j < 16; ++j) out[j / R * kStreamRows + j % R] += all[j];
  } else {
    for (int j = 0; j < R * M; ++j) out[j / R * kStreamRows + j % R] += total<K>(result[j]);
  }
}

// M tokens times the rows [first, last), at most kStreamRows; finish(token, row, n, sums) takes the sums of n rows.
template <class K, int M, class Finish>
void stream_rows(const Stream<K>& a, int64_t first, int64_t last, int64_t token, Finish finish) {
  typename K::Sum sums[M][kStreamRows] = {};
  const int64_t half = a.cols / 2;
  const int64_t piece = M < 8 ? half : 8 * K::kKept;  // 2 KB a token
  for (int64_t i = 0; i < half; i += piece) {
    const int64_t end = std::min(half, i + piece);
    int64_t row = first;
    if constexpr (M == 8) {
      for (; row + 2 <= last; row += 2) stream_tile<K, 2, M>(a, row, token, i, end, token == 0 ? 4096 : 0, sums[0] + row - first);
    }
    for (; row < last; ++row) stream_tile<K, 1, M>(a, row, token, i, end, 0, sums[0] + row - first);
  }
  for (int m = 0; m < M; ++m) finish(token + m, first, static_cast<int>(last - first), sums[m]);
}

template <class K, class Finish>
void stream(const Stream<K>& a, Finish finish) {
  const int64_t bytes = a.rows * a.cols / 2 * sizeof(typename K::Weight) * std::min<int64_t>(a.tokens, 16);
  split_rows(a.rows, 2, bytes, a.threads, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block += kStreamRows) {
      const int64_t end = std::min(last, block + kStreamRows);
      for (int64_t t = 0, size; t < a.tokens; t += size) {
        size = tile_of(a.tokens - t);
        if (size == 8) stream_rows<K, 8>(a, block, end, t, finish);
        if (size == 4) stream_rows<K, 4>(a, block, end, t, finish);
        if (size == 2) stream_rows<K, 2>(a, block, end, t, finish);
        if (size == 1) stream_rows<K, 1>(a, block, end, t, finish);
      }
    }
  });
}

}  // namespace
}  // namespace pp

#endif
