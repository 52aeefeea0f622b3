// Device code of masked_swiglu and column_sqnorm_; the formulas are in persona_pruner/ops/importance.py.
//
// A block covers kTile channels. A thread holds V neighbouring channels (16 bytes, or one element where rows are not
// aligned to 16 bytes) and every kLanes-th of the block's kBlock tokens, so its sums stay in registers; one pass through
// shared memory then adds them up over the threads, in order. A second kernel adds up the blocks, in order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace pp::importance {

constexpr int kThreads = 256;
constexpr int kTile = 128;  // channels of a block
constexpr int kBlock = 64;  // tokens of a block: BLOCK in persona_pruner/ops/importance.py
constexpr int kRow = 176;   // floats of a row of sums in shared memory, see Sums

// Beyond +-kFar both functions are 0 or x, with slope 0 or 1, in every bit: exp(-87), where the exponential stops, times
// kFar vanishes, but times 1e38 it would not.
constexpr float kFar = 1e4f;

enum Act { kSilu, kGeluTanh };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void convert(float x, float& y) { y = x; }
__device__ inline void convert(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void convert(float x, __half& y) { y = __float2half_rn(x); }
__device__ inline void convert(float x, float y, __nv_bfloat162& z) { z = __floats2bfloat162_rn(x, y); }
__device__ inline void convert(float x, float y, __half2& z) { z = __floats2half2_rn(x, y); }

template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using type = __half2;
};

// Loads and stores of V elements: one, or 16 bytes at a time. The stores are spelled out (__stwb): nvcc 13 splits an
// assignment of 16 bytes into four of 4.
template <int V, class T>
__device__ inline void load(const T* p, float (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = to_float(*p);
  } else {
    constexpr int kEach = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < V; i += kEach) {
      T x[kEach];
      const uint4 word = *reinterpret_cast<const uint4*>(p + i);
      memcpy(x, &word, sizeof word);
#pragma unroll
      for (int j = 0; j < kEach; ++j) out[i + j] = to_float(x[j]);
    }
  }
}

template <int V, class T>
__device__ inline void store(T* p, const float (&in)[V]) {
  if constexpr (V == 1) {
    convert(in[0], *p);
  } else if constexpr (sizeof(T) == 4) {
    __stwb(reinterpret_cast<float4*>(p), make_float4(in[0], in[1], in[2], in[3]));
  } else {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      typename Pair<T>::type pair;
      convert(in[2 * i], in[2 * i + 1], pair);
      memcpy(&word[i], &pair, 4);
    }
    __stwb(reinterpret_cast<uint4*>(p), make_uint4(word[0], word[1], word[2], word[3]));
  }
}

// act(x) = x * s(z) with the logistic function s: z = x for silu, sqrt(8/pi) (x + 0.044715 x^3) for tanh-gelu.
struct Logistic {
  float s, rest;  // s(z) and 1 - s(z), both without cancellation

  template <Act act>
  __device__ static Logistic of(float x) {
    const float z = act == kSilu ? x : x * (1.5957691216f + 0.07135481283f * (x * x));
    const float e = expf(fminf(-z, 87.0f));  // finite, and so is e*s; a NaN in x comes back through act(x) = x*s
    const float s = __fdividef(1.0f, 1.0f + e);
    return {s, e * s};
  }
};

__device__ inline float not_below(float x) { return x < -kFar ? -kFar : x; }  // NaN stays, here and below
__device__ inline float not_above(float x) { return x > kFar ? kFar : x; }

template <Act act>
__device__ inline float slope(float x) {  // dz/dx
  return act == kSilu ? 1.0f : 1.5957691216f + 0.21406443849f * (x * x);
}

// Where a thread stands: its tile and block, its first channel, its first token and where its tokens end.
template <int V>
struct Place {
  static constexpr int kGroups = kTile / V, kLanes = kThreads / kGroups;
  const int group = threadIdx.x % kGroups, lane = threadIdx.x / kGroups;
  const int64_t tile, block, channel, first, last;

  __device__ Place(int64_t tokens, int64_t channels) : Place(tokens, channels, unsigned((channels + kTile - 1) / kTile)) {}

 private:
  __device__ Place(int64_t tokens, int64_t channels, unsigned tiles)
      : tile(blockIdx.x % tiles),
        block(blockIdx.x / tiles),
        channel(tile * kTile + group * V),
        first(block * kBlock + lane),
        last(channel < channels ? min(tokens, (block + 1) * kBlock) : 0) {}
};

// Adds the N sums of V channels over the lanes of the block and writes N rows of `channels` partial sums. Channel j of
// group g lies at j * kStep + g: with kStep and kRow as they are, no two threads of a warp meet in a bank, neither when
// they write (a group each) nor when they read (a channel each).
template <int V, int N>
__device__ inline void write_sums(const Place<V>& at, const float (&sums)[N][V], float* partial, int64_t channels) {
  using P = Place<V>;
  constexpr int kStep = P::kGroups + 32 / V;
  __shared__ float shared[N][P::kLanes][kRow];
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < V; ++j) shared[n][at.lane][j * kStep + at.group] = sums[n][j];
  __syncthreads();
  for (int i = threadIdx.x; i < N * kTile; i += kThreads) {
    const int n = i / kTile, c = i % kTile;
    const int64_t channel = at.tile * kTile + c;
    if (channel >= channels) continue;
    float sum = 0.0f;
    for (int lane = 0; lane < P::kLanes; ++lane) sum += shared[n][lane][c % V * kStep + c / V];
    partial[(at.block * N + n) * channels + channel] = sum;
  }
}

template <class T, int V, Act act>
__global__ void __launch_bounds__(kThreads)
    swiglu_forward(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, const float* mask, T* h,
                   int64_t tokens, int64_t channels) {
  const Place<V> at(tokens, channels);
  if (at.first >= at.last) return;
  float m[V];
  load(mask + at.channel, m);
#pragma unroll 4
  for (int64_t t = at.first; t < at.last; t += Place<V>::kLanes) {
    float x[V], y[V];
    load(gate + t * gate_stride + at.channel, x);
    load(up + t * up_stride + at.channel, y);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float g = not_below(x[j]);
      y[j] *= g * Logistic::of<act>(g).s * m[j];
    }
    store(h + t * channels + at.channel, y);
  }
}

// d_gate, d_up and partial may be null. partial: [blocks, 2, channels], sums of a*dh and of its square.
template <class T, int V, Act act>
__global__ void __launch_bounds__(kThreads, 2)  // without the 2 nvcc 13 saves registers on sm_120 by spilling one
    swiglu_backward(const T* dh, int64_t dh_stride, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride,
                    const float* mask, T* d_gate, T* d_up, float* partial, int64_t tokens, int64_t channels) {
  const Place<V> at(tokens, channels);
  float sums[2][V] = {}, m[V] = {};
  if (at.first < at.last) load(mask + at.channel, m);
#pragma unroll 2
  for (int64_t t = at.first; t < at.last; t += Place<V>::kLanes) {
    float x[V], y[V], dy[V];
    load(gate + t * gate_stride + at.channel, x);
    load(up + t * up_stride + at.channel, y);
    load(dh + t * dh_stride + at.channel, dy);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float g = not_below(x[j]), near = not_above(g);
      const Logistic l = Logistic::of<act>(g);
      const float value = g * l.s, score = value * y[j] * dy[j];
      const float derivative = l.s + near * l.s * l.rest * slope<act>(near);
      sums[0][j] += score;
      sums[1][j] += score * score;
      dy[j] *= m[j];
      y[j] *= derivative * dy[j];
      dy[j] *= value;
    }
    if (d_gate) store(d_gate + t * channels + at.channel, y);
    if (d_up) store(d_up + t * channels + at.channel, dy);
  }
  if (partial) write_sums(at, sums, partial, channels);
}

// partial: [blocks, 1, channels], sums of x^2.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sqnorm(const T* x, int64_t stride, float* partial, int64_t tokens, int64_t channels) {
  const Place<V> at(tokens, channels);
  float sums[1][V] = {};
#pragma unroll 4
  for (int64_t t = at.first; t < at.last; t += Place<V>::kLanes) {
    float v[V];
    load(x + t * stride + at.channel, v);
#pragma unroll
    for (int j = 0; j < V; ++j) sums[0][j] += v[j] * v[j];
  }
  write_sums(at, sums, partial, channels);
}

// Second stage, a thread a channel: adds up the blocks of the first row of partial sums into `assign` (set) and
// `add_first`, and of the second row into `add_second`; each may be null.
__global__ void __launch_bounds__(kThreads)
    add_blocks(const float* partial, int64_t blocks, int rows, int64_t channels, float* assign, float* add_first,
               float* add_second) {
  const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  for (int row = 0; row < rows; ++row) {
    double sum = 0.0;
#pragma unroll 8
    for (int64_t b = 0; b < blocks; ++b) sum += partial[(b * rows + row) * channels + c];
    if (row == 0 && assign) assign[c] = float(sum);
    float* target = row == 0 ? add_first : add_second;
    if (target) target[c] += float(sum);
  }
}

}  // namespace pp::importance
