// norm_linear: y = norm(x) W^T + bias + residual for few tokens, W read once.
#include "dots.h"
#include "op.h"
#include "rows.h"

namespace {

using namespace pp;

constexpr int64_t kRowBlock = 16;  // weight rows that stay in the L1 cache while all tokens pass
constexpr int64_t kAhead = 16384;  // bytes to prefetch ahead of the rows in use

template <class T>
void norm_linear(std::uintptr_t x, int64_t tokens, int64_t cols, std::uintptr_t weight, int64_t rows,
                 std::uintptr_t scales, std::uintptr_t bias, std::uintptr_t norm, int64_t eps, std::uintptr_t residual,
                 std::uintptr_t y, int threads) {
  const T* w = pointer<const T>(weight);
  const float *scale = pointer<const float>(scales), *add = pointer<const float>(bias);
  const float* old = pointer<const float>(residual);
  const int64_t stride = padded(cols);
  float *out = pointer<float>(y), *n = scratch<0>(tokens * stride);
  normalize(pointer<const float>(x), tokens, cols, pointer<const float>(norm), from_bits(eps), n);
  const int64_t ahead = std::max<int64_t>(1, kAhead / std::max<int64_t>(1, cols * sizeof(T)));
  split_rows(rows, kRowBlock, rows * cols * sizeof(T) * std::min<int64_t>(tokens, 16), threads,
             [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block += kRowBlock) {
      const int64_t end = std::min(last, block + kRowBlock);
      token_tiles(tokens, [&](int64_t t, auto m_of) {
        constexpr int M = decltype(m_of)::value;
        row_groups<rows_of(M)>(block, end, [&](int64_t row, auto r_of) {
          constexpr int R = decltype(r_of)::value;
          const T *part[R], *next[R];
          for (int r = 0; r < R; ++r) {
            part[r] = w + (row + r) * cols;
            next[r] = w + std::min(last - 1, row + r + ahead) * cols;
          }
          float sums[R * M];
          const T* const* ahead_of = t == 0 ? next : nullptr;
          if (cols * sizeof(T) < kShort) {
            dot_rows<T, R, M>(part, ahead_of, n + t * stride, stride, cols, sums);
          } else {
            dot_tile<T, R, M>(part, ahead_of, n + t * stride, stride, cols, sums);
          }
          for (int r = 0; r < R; ++r) {
            for (int m = 0; m < M; ++m) {
              const int64_t at = (t + m) * rows + row + r;
              const float v = finished(sums[r * M + m], scale ? scale[row + r] : 1.0f, add ? add[row + r] : 0.0f);
              out[at] = old ? v + old[at] : v;
            }
          }
        });
      });
    }
  });
}

}  // namespace

PP_OP("norm_linear_f32", norm_linear<float>);
PP_OP("norm_linear_bf16", norm_linear<BFloat16>);
PP_OP("norm_linear_f16", norm_linear<Float16>);
PP_OP("norm_linear_i8", norm_linear<int8_t>);
