// Best two of each four weights by abs(weight) * col_scale, packed, in one pass: reads W once, writes values and meta.
//
// A thread takes GROUPS groups of four along K, with one load of 8 or 16 bytes, in each of ROWS rows: the scales, twice
// the bytes of a 16-bit row, are read once for them. A byte of meta holds two groups: with GROUPS = 1 two neighbouring
// lanes share it. Rows count an even number of groups, so a pair never straddles rows; the group that K % 8 == 4 leaves
// over is padding and gets the nibble 4.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pp::select24 {

struct Choice {
  int first, second;  // ascending
};

// A score is kept if fewer than two go before it: the higher ones, and equal ones further left.
__device__ inline Choice best_two(const float (&s)[4]) {
  int before[4] = {};
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = i + 1; j < 4; j++) {
      const bool later = s[j] > s[i];
      before[i] += later;
      before[j] += !later;
    }
  return {before[0] < 2 ? 0 : before[1] < 2 ? 1 : 2, before[3] < 2 ? 3 : before[2] < 2 ? 2 : 1};
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T v[2];
};
template <class P, int N>
struct alignas(N * sizeof(P)) Run {
  P v[N];
};

constexpr int ROWS = 8;

// W [N, K] to values [N, K/2] and meta [N, ceil(K/8)]; col_scale [K] or null. *nan becomes 1 if any score is NaN.
template <class T, int GROUPS>
__device__ void select(const T* __restrict__ w, const float* __restrict__ col_scale, T* __restrict__ values,
                       uint8_t* __restrict__ meta, int* nan, int N, int K) {
  const int groups = K / 4, bytes = (groups + 1) / 2, per_row = bytes * 2 / GROUPS;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const int g = i % per_row * GROUPS;
  const int first = min((unsigned)N, i / per_row * ROWS), last = min(N, first + ROWS);
  const bool real = g < groups;
  float4 scale[GROUPS];
#pragma unroll
  for (int j = 0; j < GROUPS; j++)
    scale[j] = col_scale && real ? ((const float4*)col_scale)[g + j] : make_float4(1.f, 1.f, 1.f, 1.f);
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const int row = first + r;
    uint32_t nibbles = 4;
    if (real && row < last) {
      const size_t at = (size_t)row * groups + g;
      const Run<Four<T>, GROUPS> four = *(const Run<Four<T>, GROUPS>*)(w + 4 * at);
      Run<Two<T>, GROUPS> two;
      nibbles = 0;
#pragma unroll
      for (int j = 0; j < GROUPS; j++) {
        const T(&v)[4] = four.v[j].v;
        const float score[4] = {fabsf((float)v[0]) * scale[j].x, fabsf((float)v[1]) * scale[j].y,
                                fabsf((float)v[2]) * scale[j].z, fabsf((float)v[3]) * scale[j].w};
        if (isnan(score[0]) || isnan(score[1]) || isnan(score[2]) || isnan(score[3])) *nan = 1;
        const Choice c = best_two(score);
        two.v[j].v[0] = c.first == 0 ? v[0] : c.first == 1 ? v[1] : v[2];
        two.v[j].v[1] = c.second == 1 ? v[1] : c.second == 2 ? v[2] : v[3];
        nibbles |= (c.first | c.second << 2) << 4 * j;
      }
      *(Run<Two<T>, GROUPS>*)(values + 2 * at) = two;
    }
    if (GROUPS == 1) nibbles |= __shfl_down_sync(~0u, nibbles, 1) << 4;
    if (row < last && (GROUPS == 2 || threadIdx.x % 2 == 0)) meta[(size_t)row * bytes + g / 2] = nibbles;
  }
}

}  // namespace pp::select24
