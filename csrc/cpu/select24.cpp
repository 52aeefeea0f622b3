// select24: the best two of each four weights of a row by abs(w) * scale, packed in one pass.
// Least traffic: read W, write 9/16 of it (bf16). A block of 64 groups goes through the vector unit in
// float32 (scores, six comparisons, positions), then the kept weights move as raw bits.
#include <atomic>

#include "op.h"
#include "rows.h"
#include "vec.h"

namespace {

using namespace pp;

constexpr int kGroups = 64;  // a block: 1 KB of scores, all of it in L1

// Scores of `cols` weights, in natural order; true if one of them is NaN.
template <class T>
bool score(const T* w, const float* scale, int cols, float* out) {
  VecI nan{};
  for (int c = 0; c < cols; c += kLanes) {
    const int n = std::min(kLanes, cols - c);
    const VecF v = n == kLanes ? load(w + c) : load(w + c, n);
    VecF s = (VecF)((VecU)v & 0x7fffffffu);
    if (scale) s *= n == kLanes ? load(scale + c) : load(scale + c, n);
    nan |= s != s;
    std::memcpy(out + c, &s, n * sizeof(float));
  }
  int any = 0;
  for (int i = 0; i < kLanes; ++i) any |= nan[i];
  return any != 0;
}

// position[g] = idx0 | idx1 << 2 of the two highest of s[4g .. 4g + 3]; a tie goes to the lower index.
void best_two(const float* s, int groups, uint8_t* position) {
  for (int g = 0; g < groups; ++g) {
    const float a = s[4 * g], b = s[4 * g + 1], c = s[4 * g + 2], d = s[4 * g + 3];
    const int ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
    const int keep_a = ab + ac + ad >= 2, keep_b = 1 - ab + bc + bd >= 2;
    const int keep_c = 2 - ac - bc + cd >= 2, keep_d = 3 - ad - bd - cd >= 2;
    const int low = keep_a ? 0 : keep_b ? 1 : 2;
    const int high = keep_d ? 3 : keep_c ? 2 : 1;
    position[g] = static_cast<uint8_t>(low | high << 2);
  }
}

template <class T>
bool select_row(const T* w, const float* scale, T* values, uint8_t* meta, int64_t cols) {
  bool nan = false;
  float s[4 * kGroups];
  uint8_t position[kGroups + 1];
  for (int64_t c = 0; c < cols; c += 4 * kGroups) {
    const int groups = static_cast<int>(std::min<int64_t>(kGroups, (cols - c) / 4));
    nan |= score(w + c, scale ? scale + c : nullptr, 4 * groups, s);
    best_two(s, groups, position);
    position[groups] = 4;  // fills the unused nibble when K % 8 == 4
    const T* from = w + c;
    T* to = values + c / 2;
    for (int g = 0; g < groups; ++g) {
      to[2 * g] = from[4 * g + (position[g] & 3)];
      to[2 * g + 1] = from[4 * g + (position[g] >> 2)];
    }
    uint8_t* bytes = meta + c / 8;
    for (int g = 0; g < groups; g += 2) bytes[g / 2] = static_cast<uint8_t>(position[g] | position[g + 1] << 4);
  }
  return nan;
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
