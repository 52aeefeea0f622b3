// Prefill of linear24: a tile of BM tokens x BN rows. Grid (N / BN, M / BM, splits).
//
// Two warps along the tokens, BN / 64 along the rows, each BM / 2 tokens x 64 rows. Shared memory is the first wall
// here, not the tensor core: a k step of the 128 x 256 tile takes 1072 wavefronts of it for 1024 tensor clocks, and
// narrower tiles take relatively more.
#pragma once
#include "cuda/linear24.cuh"

namespace pp::linear24 {

constexpr int STAGES = 3;
template <int BN>
constexpr int PREFILL_THREADS = BN;
template <class T, int BM, int BN>
constexpr int PREFILL_STAGE = BN / ROWS * PIECES<T> * 16 + BM * STEP;
template <class T, int BM, int BN>
constexpr int PREFILL_SHARED = STAGES * PREFILL_STAGE<T, BM, BN>;

// 16-bit y: through shared memory, because a lane holds two tokens of one row and y wants rows side by side.
template <class T, int BM, int BN>
__device__ void store_tile16(const Out& o, typename T::Acc (&acc)[4][BM / 16][4], char* shared, int m0, int n0) {
  constexpr int STRIDE = BN + 8;  // eight more elements: a warp's stores fall into 32 banks
  static_assert(BM * STRIDE * 2 <= PREFILL_SHARED<T, BM, BN>);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int token = warp % 2 * (BM / 2) + lane % 4 * 2, first = warp / 2 * ROWS + lane / 4;
  const int kind = kind_of<T>(o);
  uint16_t* tile = (uint16_t*)shared;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int r = first + j * 8;
    const Row row = n0 + r < o.N ? row_of<T>(o, n0 + r) : Row{};
#pragma unroll
    for (int nt = 0; nt < BM / 16; nt++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int t = token + nt * 8 + i;
        if (m0 + t < o.M)
          tile[t * STRIDE + r] = round16(kind, finish<T>(o, acc[j / 2][nt][j % 2 * 2 + i], m0 + t, row));
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < BM * (BN / 8); i += PREFILL_THREADS<BN>) {
    const int t = i / (BN / 8), r = i % (BN / 8) * 8;
    if (m0 + t >= o.M || n0 + r >= o.N) continue;
    const uint16_t* from = tile + t * STRIDE + r;
    uint16_t* to = (uint16_t*)o.y + (size_t)(m0 + t) * o.N + n0 + r;
    if (o.N % 8 == 0)
      *(uint4*)to = *(const uint4*)from;
    else
      for (int j = 0; j < 8 && n0 + r + j < o.N; j++) to[j] = from[j];
  }
}

template <class T, int BM, int BN>
__device__ void prefill(const uint4* __restrict__ w, const char* __restrict__ x, const Out& o, int xbytes) {
  using Acc = typename T::Acc;
  constexpr int THREADS = PREFILL_THREADS<BN>, STAGE = PREFILL_STAGE<T, BM, BN>, WBYTES = BN / ROWS * PIECES<T> * 16;
  constexpr int WCOPIES = (BN / ROWS * PIECES<T> + THREADS - 1) / THREADS, XCOPIES = BM * 8 / THREADS;
  extern __shared__ __align__(128) char shared[];
  const uint32_t base = shared_address(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int blocks = (xbytes + STEP - 1) / STEP, row_blocks = (o.N + ROWS - 1) / ROWS;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  const int first = (int)((long long)blocks * blockIdx.z / gridDim.z);
  const int steps = (int)((long long)blocks * (blockIdx.z + 1) / gridDim.z) - first;

  // Row blocks past the end copy the last one, and tokens past M copy nothing.
  const uint4* from_w[WCOPIES];
#pragma unroll
  for (int i = 0; i < WCOPIES; i++) {
    const int piece = i * THREADS + threadIdx.x;
    const int nb = min(n0 / ROWS + piece / PIECES<T>, row_blocks - 1);
    from_w[i] = w + ((size_t)nb * blocks + first) * PIECES<T> + piece % PIECES<T>;
  }
  const int chunk = threadIdx.x % 8;
  int at = first * STEP + chunk * 16;
  auto fetch = [&](int stage) {
    const uint32_t to = base + stage * STAGE;
#pragma unroll
    for (int i = 0; i < WCOPIES; i++) {
      const int piece = i * THREADS + threadIdx.x;
      if ((i + 1) * THREADS <= BN / ROWS * PIECES<T> || piece < BN / ROWS * PIECES<T>)
        copy_async(to + piece * 16, from_w[i]);
      from_w[i] += PIECES<T>;
    }
#pragma unroll
    for (int i = 0; i < XCOPIES; i++) {
      const int token = threadIdx.x / 8 + i * (THREADS / 8);
      const bool valid = m0 + token < o.M && at < xbytes;
      copy_async(to + WBYTES + swizzled(token, chunk), x + (valid ? (size_t)(m0 + token) * xbytes + at : 0), valid);
    }
    at += STEP;
  };

  Acc acc[4][BM / 16][4] = {};
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) fetch(s);
    copy_commit();
  }
  const int row_block = warp / 2, token = warp % 2 * (BM / 2);
  int stage = 0;
  for (int s = 0; s < steps; s++) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // this stage has landed for all, and all have left the stage that is refilled below
    const uint4* block = (const uint4*)(shared + stage * STAGE) + row_block * PIECES<T> + lane;
    const uint32_t tokens = base + stage * STAGE + WBYTES;
    uint4 e[T::META];
#pragma unroll
    for (int i = 0; i < T::META; i++) e[i] = block[256 + 32 * i];
    auto step = [&](auto ks_constant) {
      constexpr int ks = decltype(ks_constant)::value;
      uint4 a[4], b[BM / 16];
#pragma unroll
      for (int mt = 0; mt < 4; mt++) a[mt] = block[(mt * 2 + ks) * 32];
#pragma unroll
      for (int nt = 0; nt < BM / 16; nt++)
        b[nt] = load_matrix(tokens + swizzled(token + nt * 8 + lane % 8, ks * 4 + lane / 8));
      if (ks == 0) {  // after the reads, before the mma: both overlap with the copies
        const int ahead = stage + STAGES - 1;
        if (s + STAGES - 1 < steps) fetch(ahead < STAGES ? ahead : ahead - STAGES);
        copy_commit();
      }
#pragma unroll
      for (int nt = 0; nt < BM / 16; nt++)
#pragma unroll
        for (int mt = 0; mt < 4; mt++)
          T::template mma<ks>(acc[mt][nt], a[mt], b[nt], word(e[ks % T::META], mt));
    };
    step(std::integral_constant<int, 0>());
    step(std::integral_constant<int, 1>());
    stage = stage + 1 < STAGES ? stage + 1 : 0;
  }
  copy_wait<0>();

  const int splits = gridDim.z;
  if (splits == 1 && kind_of<T>(o) != F32) {
    __syncthreads();  // the tile overlays stages that other warps may still read
    store_tile16<T, BM, BN>(o, acc, shared, m0, n0);
    return;
  }
  // Four bytes a row: eight rows of a token fill a sector, so these go straight from the registers.
  const int width = row_blocks * ROWS;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int n = n0 + row_block * ROWS + lane / 4 + j * 8;
    if (n >= (splits == 1 ? o.N : width)) continue;
    const Row row = splits == 1 ? row_of<T>(o, n) : Row{};
#pragma unroll
    for (int nt = 0; nt < BM / 16; nt++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int m = m0 + token + nt * 8 + lane % 4 * 2 + i;
        if (m >= o.M) continue;
        const Acc v = acc[j / 2][nt][j % 2 * 2 + i];
        if (splits == 1)
          ((float*)o.y)[(size_t)m * o.N + n] = finish<T>(o, v, m, row);
        else
          ((Acc*)o.partial)[((size_t)blockIdx.z * o.M + m) * width + n] = v;
      }
  }
  if (splits > 1 && last_arrival(o.count + blockIdx.y * gridDim.x + blockIdx.x, splits))
    sum_splits<T>(o, splits, m0, min(m0 + BM, o.M), n0, n0 + BN);
}

}  // namespace pp::linear24
