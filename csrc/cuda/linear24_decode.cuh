// Decode of linear24: M <= 8 * NT. Grid (N / 64, splits).
//
// A CTA owns 64 rows and a range of blocks, which its warps take in turn: in the loop they share nothing and meet no
// barrier. A lane loads the next block's registers right after the mma that consumed this block's: 4.6 KB in flight a
// warp out of 36 registers (a double buffer would take 72).
#pragma once
#include "cuda/linear24.cuh"

namespace pp::linear24 {

template <int NT>
constexpr int DECODE_WARPS = NT < 4 ? 8 : 4;
// The sums of the warps, rows apart by 68 words so that no two lanes of a store meet in a bank; x uses the same memory.
constexpr int SUM_STRIDE = ROWS + 4;
template <int NT>
constexpr int DECODE_SHARED = DECODE_WARPS<NT> * 8 * NT * SUM_STRIDE * 4;

template <class T, int NT>
__device__ void decode(const uint4* __restrict__ w, const char* __restrict__ x, const Out& o, int xbytes) {
  using Acc = typename T::Acc;
  constexpr int WARPS = DECODE_WARPS<NT>, STAGE = NT * 8 * STEP;
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = (xbytes + STEP - 1) / STEP, splits = gridDim.y;
  const int first = (int)((long long)blocks * blockIdx.y / splits) + warp;
  const int end = (int)((long long)blocks * (blockIdx.y + 1) / splits);
  const uint32_t ring = shared_address(shared) + warp * 2 * STAGE;
  w += (size_t)blockIdx.x * blocks * PIECES<T> + lane;

  // Lane copies chunk lane % 8 of tokens lane / 8 + 4i; tokens past M are zero for good.
  const int chunk = lane % 8;
#pragma unroll
  for (int i = 0; i < 2 * NT; i++) {
    const int token = lane / 8 + 4 * i;
    if (token >= o.M) {
      *(uint4*)(shared + warp * 2 * STAGE + swizzled(token, chunk)) = make_uint4(0, 0, 0, 0);
      *(uint4*)(shared + warp * 2 * STAGE + STAGE + swizzled(token, chunk)) = make_uint4(0, 0, 0, 0);
    }
  }
  auto fetch = [&](int block, int stage) {
    const int at = block * STEP + chunk * 16;
    const bool valid = at < xbytes;
#pragma unroll
    for (int i = 0; i < 2 * NT; i++) {
      const int token = lane / 8 + 4 * i;
      if (token < o.M)
        copy_async(ring + stage * STAGE + swizzled(token, chunk), x + (valid ? (size_t)token * xbytes + at : 0), valid);
    }
  };

  Acc acc[4][NT][4] = {};
  uint4 a[8], e[T::META];
  if (first < end) {
    const uint4* p = w + (size_t)first * PIECES<T>;
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] = load_stream(p + 32 * i);
#pragma unroll
    for (int i = 0; i < T::META; i++) e[i] = load_stream(p + 256 + 32 * i);
    fetch(first, 0);
  }
  copy_commit();
  int stage = 0;
  for (int block = first; block < end; block += WARPS, stage ^= 1) {
    const bool more = block + WARPS < end;
    const uint4* next = w + (size_t)(block + WARPS) * PIECES<T>;
    if (more) fetch(block + WARPS, stage ^ 1);
    copy_commit();
    uint4 e_next[T::META];
#pragma unroll
    for (int i = 0; i < T::META; i++) e_next[i] = more ? load_stream(next + 256 + 32 * i) : e[i];
    copy_wait<1>();
    __syncwarp();
    auto step = [&](auto ks_constant) {
      constexpr int ks = decltype(ks_constant)::value;
      uint4 b[NT];
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
        b[nt] = load_matrix(ring + stage * STAGE + swizzled(nt * 8 + lane % 8, ks * 4 + lane / 8));
#pragma unroll
      for (int mt = 0; mt < 4; mt++) {
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
          T::template mma<ks>(acc[mt][nt], a[mt * 2 + ks], b[nt], word(e[ks % T::META], mt));
        if (more) a[mt * 2 + ks] = load_stream(next + 32 * (mt * 2 + ks));
      }
    };
    step(std::integral_constant<int, 0>());
    step(std::integral_constant<int, 1>());
#pragma unroll
    for (int i = 0; i < T::META; i++) e[i] = e_next[i];
    __syncwarp();  // all lanes have read this stage before the next copy into it
  }
  copy_wait<0>();
  __syncthreads();  // the sums overlay the rings of other warps

  // acc[mt][nt][i]: row 16 mt + lane / 4 + 8 (i / 2), token 8 nt + 2 (lane % 4) + i % 2.
  Acc* sums = (Acc*)shared;
  Acc* mine = sums + (warp * 8 * NT + lane % 4 * 2) * SUM_STRIDE + lane / 4;
#pragma unroll
  for (int mt = 0; mt < 4; mt++)
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
      for (int i = 0; i < 4; i++) mine[(nt * 8 + i % 2) * SUM_STRIDE + mt * 16 + i / 2 * 8] = acc[mt][nt][i];
  __syncthreads();
  const int n0 = blockIdx.x * ROWS;
  for (int i = threadIdx.x; i < o.M * (ROWS / 2); i += WARPS * 32) {
    const int m = i / (ROWS / 2), n = i % (ROWS / 2) * 2;
    Acc a0 = 0, a1 = 0;
#pragma unroll
    for (int v = 0; v < WARPS; v++) {
      const Pair<Acc> pair = *(const Pair<Acc>*)&sums[(v * 8 * NT + m) * SUM_STRIDE + n];
      a0 += pair.a;
      a1 += pair.b;
    }
    if (splits > 1)
      ((Pair<Acc>*)o.partial)[(((size_t)blockIdx.y * o.M + m) * gridDim.x * ROWS + n0 + n) / 2] = {a0, a1};
    else if (n0 + n < o.N)
      store_pair<T>(o, a0, a1, m, n0 + n);
  }
  if (splits > 1 && last_arrival(o.count + blockIdx.x, splits)) sum_splits<T>(o, splits, 0, o.M, n0, n0 + ROWS);
}

}  // namespace pp::linear24
