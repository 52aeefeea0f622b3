// select24: the best two of each four weights of a row by abs(w) * scale, packed in one pass.
// Least traffic: read W, write 9/16 of it (bf16). Sixteen weights at a time: three turns of a group against itself tell
// how many of the others beat a weight, and the sixteen answers are a mask that says what is kept and where it stood.
#include <array>
#include <atomic>

#include "op.h"
#include "rows.h"
#include "vec.h"

namespace {

using namespace pp;

constexpr int kBlock = 16;  // two bytes of meta

// Lane numbers of every group turned left by `by`.
VecI turned(int by) {
  VecI lanes{};
  for (int i = 0; i < kLanes; ++i) lanes[i] = (i & ~3) | ((i + by) & 3);
  return lanes;
}

// -1 in lane i where fewer than two of its group beat it: by a higher score, or by an equal one further left.
VecI best_two(VecF score) {
  const VecI bits = (VecI)(score + splat(0.0f));        // -0.0 becomes 0.0, which it ties with
  const VecI key = bits ^ ((bits >> 31) & 0x7fffffff);  // integers in the order of the floats
  VecI lost{};
  for (int by = 1; by < 4; ++by) {
    const VecI from = turned(by);
    const VecI left = from < turned(0);  // -1 where the other stands further left
    lost += __builtin_shuffle(key, from) - left > key;
  }
  return lost > -2;
}

unsigned mask_of(VecI lanes) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)lanes);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)lanes);
#else
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (lanes[i] & 1u) << i;
  return mask;
#endif
}

// Bit i: whether weight i of the first n of a block is kept. Past n stand zeros, of whose groups the first two are.
template <class T>
unsigned kept(const T* w, const float* scale, int n, VecI& nan) {
  unsigned mask = 0;
  for (int i = 0; i < kBlock; i += kLanes) {
    const int here = std::max(0, std::min(kLanes, n - i));
    VecF score = (VecF)((VecU)(here == kLanes ? load(w + i) : load(w + i, here)) & 0x7fffffffu);
    if (scale) score *= here == kLanes ? load(scale + i) : load(scale + i, here);
    nan |= score != score;
    mask |= mask_of(best_two(score)) << i;
  }
  return mask;
}

// The two nibbles `idx0 | idx1 << 2` of two groups, by the eight bits that say what is kept.
constexpr std::array<uint8_t, 256> kPlaces = [] {
  std::array<uint8_t, 256> places{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int group = 0; group < 2; ++group) {
      int nibble = 0, count = 0;
      for (int i = 0; i < 4; ++i) {
        if (mask >> (4 * group + i) & 1 && count < 2) nibble |= i << (2 * count++);
      }
      places[mask] |= static_cast<uint8_t>(nibble << (4 * group));
    }
  }
  return places;
}();

template <class T>
void gather(const T* w, unsigned mask, int n, T* values) {
#if defined(__AVX512VL__)
  if (n == kBlock) {
    if constexpr (sizeof(T) == 4) {
      const __m512i all = _mm512_maskz_compress_epi32(mask, load_raw<__m512i>(w));
      std::memcpy(values, &all, 32);
    } else {
      const __m512i all = _mm512_maskz_compress_epi32(mask, (__m512i)widened(load_raw<VecH>(w)));
      const __m128i half = _mm256_cvtepi32_epi16(_mm512_castsi512_si256(all));
      std::memcpy(values, &half, 16);
    }
    return;
  }
#endif
  for (int i = 0; i < n; i += 4) {
    const int places = kPlaces[mask >> i & 15];
    *values++ = w[i + (places & 3)];
    *values++ = w[i + (places >> 2 & 3)];
  }
}

template <class T>
bool select_row(const T* w, const float* scale, T* values, uint8_t* meta, int64_t cols) {
  VecI nan{};
  for (int64_t c = 0; c < cols; c += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, cols - c));
    const unsigned mask = kept(w + c, scale ? scale + c : nullptr, n, nan);
    gather(w + c, mask, n, values + c / 2);
    meta[c / 8] = kPlaces[mask & 255];
    if (n > 8) meta[c / 8 + 1] = kPlaces[mask >> 8];
  }
  return mask_of(nan) != 0;
}

// weight [rows, cols], scale float32 [cols] or null, values [rows, cols / 2], meta [rows, ceil(cols / 8)], all
// contiguous. Returns whether a score was NaN; the output is then undefined.
template <class T>
bool select24(std::uintptr_t weight, std::uintptr_t scale, std::uintptr_t values, std::uintptr_t meta, int64_t rows,
              int64_t cols, int threads) {
  std::atomic<bool> nan{false};
  split_rows(rows, 1, rows * cols * sizeof(T), threads, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      if (select_row(pointer<const T>(weight) + r * cols, pointer<const float>(scale),
                     pointer<T>(values) + r * (cols / 2), pointer<uint8_t>(meta) + r * ((cols + 7) / 8), cols)) {
        nan = true;
      }
    }
  });
  return nan;
}

}  // namespace

PP_OP("select24_f32", select24<float>);
PP_OP("select24_bf16", select24<BFloat16>);
PP_OP("select24_f16", select24<Float16>);
