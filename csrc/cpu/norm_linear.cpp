// norm_linear: y = norm(x) W^T + bias + residual for few tokens, W read once.
#include "dots.h"
#include "op.h"
#include "rows.h"

namespace {

using namespace pp;

constexpr int64_t kRowBlock = 16;  // weight rows that stay in the L1 cache while all tokens pass
constexpr int64_t kAhead = kOneStream ? 16384 : 4096;  // bytes to prefetch ahead of the rows in use

template <class T>
struct Job {
  const T* weight;
  const float *scale, *bias, *residual, *x;  // x: normalized, as normalize() leaves it
  float* y;
  int64_t tokens, rows, cols, stride;
};

// R rows, `apart` from each other, times the M tokens from t on.
template <int R, int M, class T>
void tile(const Job<T>& job, int64_t row, int64_t apart, int64_t t) {
  const T *w[R], *next[R];
  const int64_t row_bytes = std::max<int64_t>(1, job.cols * sizeof(T));
  const int64_t ahead = apart == 1 ? std::max<int64_t>(1, kAhead / row_bytes) * job.cols : kAhead / sizeof(T);
  for (int r = 0; r < R; ++r) w[r] = job.weight + (row + r * apart) * job.cols, next[r] = w[r] + ahead;
  float sums[R * M];
  const auto products = kOneStream && row_bytes < kShort ? dot<1, 2, R, M, T> : dot<R, 1, R, M, T>;
  products(w, t == 0 ? next : nullptr, job.x + t * job.stride, job.stride, job.cols, sums);
  for (int r = 0; r < R; ++r) {
    const int64_t n = row + r * apart;
    for (int m = 0; m < M; ++m) {
      const float v = finished(sums[r * M + m], job.scale ? job.scale[n] : 1.0f, job.bias ? job.bias[n] : 0.0f);
      const int64_t at = (t + m) * job.rows + n;
      job.y[at] = job.residual ? v + job.residual[at] : v;
    }
  }
}

template <int R, class T>
void run(const Job<T>& job, int threads) {
  const int64_t bytes = job.rows * job.cols * sizeof(T) * std::min<int64_t>(job.tokens, 16);
  split_rows(job.rows, kRowBlock, bytes, threads, [&](int64_t first, int64_t last) {
    const Tiling tiles = Tiling::of(last - first, R);
    for (int64_t block = 0; block < tiles.count; block += kRowBlock / R) {
      const int64_t end = std::min(tiles.count, block + kRowBlock / R);
      token_tiles(job.tokens, [&](int64_t t, auto m) {
        for (int64_t i = block; i < end; ++i) tile<R, m.value>(job, first + i * tiles.step, tiles.apart, t);
      });
    }
    for (int64_t row = first + tiles.count * R; row < last; ++row) {
      token_tiles(job.tokens, [&](int64_t t, auto m) { tile<1, m.value>(job, row, 1, t); });
    }
  });
}

template <class T>
void norm_linear(std::uintptr_t x, int64_t tokens, int64_t cols, std::uintptr_t weight, int64_t rows,
                 std::uintptr_t scales, std::uintptr_t bias, std::uintptr_t norm, int64_t eps, std::uintptr_t residual,
                 std::uintptr_t y, int threads) {
  const int64_t stride = padded(cols);
  float* n = scratch<0>(tokens * stride);
  normalize(pointer<const float>(x), tokens, cols, pointer<const float>(norm), from_bits(eps), n);
  const Job<T> job{pointer<const T>(weight), pointer<const float>(scales), pointer<const float>(bias),
                   pointer<const float>(residual), n, pointer<float>(y), tokens, rows, cols, stride};
  tokens < kMostTokens ? run<rows_of(1)>(job, threads) : run<rows_of(kMostTokens)>(job, threads);
}

}  // namespace

PP_OP("norm_linear_f32", norm_linear<float>);
PP_OP("norm_linear_bf16", norm_linear<BFloat16>);
PP_OP("norm_linear_f16", norm_linear<Float16>);
PP_OP("norm_linear_i8", norm_linear<int8_t>);
