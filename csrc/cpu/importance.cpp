// h = act(gate) * up * mask and its backward with the channel scores, and column square sums.
//
// Sums over tokens go in two stages: each block of kBlock tokens into a row of its own, then those
// rows in order, in float64. Nothing depends on the number of threads.
#include "memory.h"
#include "op.h"
#include "vec.h"

#include <algorithm>
#include <type_traits>

namespace pp {
namespace {

constexpr int64_t kBlock = 64;     // tokens a row of partial sums stands for; ops/importance.py allocates by it
constexpr int64_t kStrip = 2048;   // channels a task walks: its partial sums stay in the L1/L2 cache
constexpr int64_t kSmall = 32768;  // elements below which starting threads costs more than it saves

// Beyond +-kFar both functions are 0 or x, with slope 0 or 1, in every bit: exp(-87), where our exp stops, times kFar
// vanishes, but times 1e38 it would not.
constexpr float kFar = 1e4f;

enum Act { kSilu, kGeluTanh };

// act(x) = x * s(z) with the logistic function s: z = x for silu, sqrt(8/pi) (x + 0.044715 x^3) for tanh-gelu.
template <Act act>
inline VecF argument(VecF x) {
  if (act == kSilu) return x;
  return x * (splat(1.5957691216f) + splat(0.07135481283f) * (x * x));
}

template <Act act>
inline VecF slope(VecF x) {  // dz/dx
  if (act == kSilu) return splat(1.0f);
  return splat(1.5957691216f) + splat(0.21406443849f) * (x * x);
}

struct Rows {
  int64_t tokens, channels;
  int threads;

  int64_t blocks() const { return (tokens + kBlock - 1) / kBlock; }

  // Calls body(block, first token, last token, first channel, last channel) for all tiles, in any order. strip: channels.
  template <class Body>
  void tiles(int64_t strip, Body body) const {
    const int64_t strips = (channels + strip - 1) / strip;
    const int team = tokens * channels < kSmall ? 1 : threads;
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t i = 0; i < blocks() * strips; ++i) {
      const int64_t b = i / strips, c = i % strips * strip;
      body(b, b * kBlock, std::min(tokens, (b + 1) * kBlock), c, std::min(channels, c + strip));
    }
  }

  // Second stage: sums the rows of partial sums in order and adds the result to every target that is not null.
  void reduce(const float* partial, int64_t row_stride, float* assign, float* add) const {
    const int team = blocks() * channels < kSmall ? 1 : threads;
#pragma omp parallel for num_threads(team) if (team > 1)
    for (int64_t c0 = 0; c0 < channels; c0 += 64) {
      const int64_t n = std::min<int64_t>(64, channels - c0);
      double sum[64] = {};
      for (int64_t b = 0; b < blocks(); ++b)
        for (int64_t c = 0; c < n; ++c) sum[c] += partial[b * row_stride + c0 + c];
      for (int64_t c = 0; c < n; ++c) {
        if (assign) assign[c0 + c] = float(sum[c]);
        if (add) add[c0 + c] += float(sum[c]);
      }
    }
  }
};

// Runs body(channel, lanes) over [first, last): whole vectors, then the rest.
template <class Body>
inline void vectors(int64_t first, int64_t last, Body body) {
  int64_t c = first;
  for (; c + kLanes <= last; c += kLanes) body(c, kLanes);
  if (c < last) body(c, int(last - c));
}

// Runs body(first token, size of the group) over [first, last) in groups of N, the rest one by one. A group's sum is
// added to the partial sums at once: fewer loads and stores, and a smaller rounding error.
template <int N, class Body>
inline void in_groups(int64_t first, int64_t last, Body body) {
  int64_t t = first;
  for (; t + N <= last; t += N) body(t, std::integral_constant<int64_t, N>());
  for (; t < last; ++t) body(t, std::integral_constant<int64_t, 1>());
}

template <class T, Act act>
void forward(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, const float* mask, T* h, Rows rows) {
  rows.tiles(kStrip, [&](int64_t, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
    for (int64_t t = t0; t < t1; ++t) {
      const T* g = gate + t * gate_stride;
      const T* u = up + t * up_stride;
      T* out = h + t * rows.channels;
      vectors(c0, c1, [&](int64_t c, int n) {
        __builtin_prefetch(g + 2 * gate_stride + c);  // 1.1 times as fast; in the backward pass it gains nothing
        __builtin_prefetch(u + 2 * up_stride + c);
        const VecF x = at_least(load(g + c, n), -kFar);
        const VecF a = x / (splat(1.0f) + exp(-argument<act>(x))) * load(u + c, n);
        store(out + c, a * load(mask + c, n), n);
      });
    }
  });
}

template <class T, Act act>
void backward(const T* dh, int64_t dh_stride, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,
              const float* mask, T* d_gate, T* d_up, float* partial, float* d_mask, float* taylor, float* fisher,
              Rows rows) {
  const int64_t C = rows.channels;
  rows.tiles(kStrip, [&](int64_t b, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
    float* first = partial + b * 2 * C;  // sums of a*dh, then of its square
    float* second = first + C;
    if (partial) {
      std::fill(first + c0, first + c1, 0.0f);
      std::fill(second + c0, second + c1, 0.0f);
    }
    // Two tokens in step: one's chain of exp and division takes longer than a processor looks ahead. With AVX2 twice as
    // fast as token after token; four in step are no faster.
    in_groups<2>(t0, t1, [=](int64_t t, auto group) {
      const T* g = gate + t * gate_stride;
      const T* u = up + t * up_stride;
      const T* d = dh + t * dh_stride;
      vectors(c0, c1, [=](int64_t c, int n) {
        const VecF m = load(mask + c, n);
        VecF sum{}, squares{}, xs[group], es[group], ss[group];
        for (int64_t i = 0; i < group; ++i) {
          xs[i] = at_least(load(g + i * gate_stride + c, n), -kFar);
          es[i] = exp(-argument<act>(xs[i]));
        }
        for (int64_t i = 0; i < group; ++i) ss[i] = splat(1.0f) / (splat(1.0f) + es[i]);
        for (int64_t i = 0; i < group; ++i) {
          const VecF x = xs[i], e = es[i], s = ss[i], value = x * s;
          const VecF y = load(u + i * up_stride + c, n), dy = load(d + i * dh_stride + c, n);
          if (d_gate) {
            const VecF near = at_most(x, kFar);
            const VecF derivative = s + near * s * (e * s) * slope<act>(near);  // e*s = 1 - s without cancellation
            store(d_gate + (t + i) * C + c, derivative * y * m * dy, n);
          }
          if (d_up) store(d_up + (t + i) * C + c, value * m * dy, n);
          const VecF score = value * y * dy;
          sum += score;
          squares += score * score;
        }
        if (partial) {
          store(first + c, load(first + c, n) + sum, n);
          store(second + c, load(second + c, n) + squares, n);
        }
      });
    });
  });
  if (!partial && !d_mask) return;  // without tokens there are no partial sums, and d_mask is zero
  rows.reduce(partial, 2 * C, d_mask, taylor);
  if (fisher) rows.reduce(partial + C, 2 * C, nullptr, fisher);
}

// Eight rows at once, each an eighth of the tile from the next: eight streams of memory, which go on in the following rows.
// Rows next to each other were 0.7x to 1.0x as fast with 1536 channels, and strips of 2048 channels, where a stream has gaps,
// 0.6x to 0.9x with 3072 and 8192 (EPYC Zen 3, 2026-11-29).
template <class T>
void sqnorm(const T* x, int64_t stride, float* partial, float* acc, Rows rows) {
  constexpr int64_t kStreams = 8, kAhead = 512 / sizeof(T), kWideStrip = 8192;
  rows.tiles(kWideStrip, [&](int64_t b, int64_t t0, int64_t t1, int64_t c0, int64_t c1) {
    float* sums = partial + b * rows.channels;
    std::fill(sums + c0, sums + c1, 0.0f);
    const int64_t step = (t1 - t0) / kStreams;
    const auto add = [&](int64_t t, auto streams) {
      vectors(c0, c1, [&](int64_t c, int n) {
        VecF sum{};
        for (int64_t i = 0; i < streams; ++i) {
          const T* p = x + (t + i * step) * stride + c;
          __builtin_prefetch(p + kAhead);
          const VecF v = load(p, n);
          sum += v * v;
        }
        store(sums + c, load(sums + c, n) + sum, n);
      });
    };
    for (int64_t t = t0; t < t0 + step; ++t) add(t, std::integral_constant<int64_t, kStreams>());
    for (int64_t t = t0 + kStreams * step; t < t1; ++t) add(t, std::integral_constant<int64_t, 1>());
  });
  rows.reduce(partial, rows.channels, nullptr, acc);
}

// Calls body with a null pointer of the element type; the codes are those of ops/importance.py.
template <class Body>
void by_dtype(int dtype, Body body) {
  if (dtype == 0) body((float*)nullptr);
  if (dtype == 1) body((BFloat16*)nullptr);
  if (dtype == 2) body((Float16*)nullptr);
}

using Address = std::uintptr_t;

void masked_swiglu_forward(Address gate, int64_t gate_stride, Address up, int64_t up_stride, Address mask, Address h,
                           int64_t tokens, int64_t channels, int dtype, int act, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = act == kSilu ? forward<T, kSilu> : forward<T, kGeluTanh>;
    run(pointer<T>(gate), gate_stride, pointer<T>(up), up_stride, pointer<float>(mask), pointer<T>(h),
        Rows{tokens, channels, threads});
  });
}

void masked_swiglu_backward(Address dh, int64_t dh_stride, Address gate, int64_t gate_stride, Address up,
                            int64_t up_stride, Address mask, Address d_gate, Address d_up, Address partial,
                            Address d_mask, Address taylor, Address fisher, int64_t tokens, int64_t channels, int dtype,
                            int act, int threads) {
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = act == kSilu ? backward<T, kSilu> : backward<T, kGeluTanh>;
    run(pointer<T>(dh), dh_stride, pointer<T>(gate), gate_stride, pointer<T>(up), up_stride, pointer<float>(mask),
        pointer<T>(d_gate), pointer<T>(d_up), pointer<float>(partial), pointer<float>(d_mask), pointer<float>(taylor),
        pointer<float>(fisher), Rows{tokens, channels, threads});
  });
}

// `partial` is not used: asking PyTorch for it took a tenth of the time that 2048 rows of 1536 channels are read in.
void column_sqnorm(Address x, int64_t stride, Address, Address acc, int64_t tokens, int64_t channels, int dtype,
                   int threads) {
  const Rows rows{tokens, channels, threads};
  float* sums = scratch<0>(rows.blocks() * channels);
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    sqnorm(pointer<T>(x), stride, sums, pointer<float>(acc), rows);
  });
}

}  // namespace

PP_OP("masked_swiglu_forward", masked_swiglu_forward);
PP_OP("masked_swiglu_backward", masked_swiglu_backward);
PP_OP("column_sqnorm", column_sqnorm);

}  // namespace pp
