// y[M,N] = x[M,K] W[N,K]^T (+ bias), W packed 2:4, on the sparse tensor cores (mma.sp, sm_80 and up).
//
// W is the sparse operand A of the instruction and the tokens are its n = 8 side, so a decode batch pads to 8 and
// not to 64. W lies in blocks of 64 rows x 128 bytes of x (64 columns of 16 bits, 128 of int8), [N/64][K blocks],
// made once by ops/_linear24_cuda.py. A block is a run of 16-byte pieces:
//   (mt * 2 + ks) * 32 + lane    the four A registers of this lane, row tile mt 0..3 (16 rows), k step ks 0..1
//   256 + (ks *) 32 + lane       the metadata words of row tiles 0..3; int8 has one such run for each k step, while
//                                16-bit k steps share one, told apart by the selector of the instruction
// so each lane reads its own fragment as 16 contiguous bytes: W needs neither ldmatrix nor, in decode, shared memory.
// In bytes the instructions for 16-bit (k = 32) and int8 (k = 64) values have the same fragments.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace pp::linear24 {

constexpr int ROWS = 64;         // rows of W in a block
constexpr int STEP = 128;        // bytes of one token's x that a block covers
enum Kind { F32, F16, BF16 };    // type of y and bias

// Epilogue operands. row_scale and token_scale are of int8 only; partial and count of a split along K only.
struct Out {
  void* y;
  const void* bias;  // or null
  const float* row_scale;
  const float* token_scale;
  void* partial;    // [splits][M][row blocks * 64] accumulators
  unsigned* count;  // one for each tile, zero before and after
  int M, N, kind;
};

#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define PP_MMA_SP "mma.sp::ordered_metadata.sync.aligned."
#else
#define PP_MMA_SP "mma.sp.sync.aligned."
#endif
#define PP_MMA(SHAPE, SELECTOR, REG)                                                                     \
  asm(PP_MMA_SP SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"         \
      : "+" REG(c[0]), "+" REG(c[1]), "+" REG(c[2]), "+" REG(c[3])                                       \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(e), "n"(SELECTOR))

struct Half {
  using Acc = float;
  static constexpr int KIND = F16, META = 1;
  template <int KS>
  __device__ static void mma(float (&c)[4], uint4 a, uint4 b, uint32_t e) {
    PP_MMA("m16n8k32.row.col.f32.f16.f16.f32", KS, "f");
  }
};
struct Bfloat {
  using Acc = float;
  static constexpr int KIND = BF16, META = 1;
  template <int KS>
  __device__ static void mma(float (&c)[4], uint4 a, uint4 b, uint32_t e) {
    PP_MMA("m16n8k32.row.col.f32.bf16.bf16.f32", KS, "f");
  }
};
struct Int8 {
  using Acc = int;
  static constexpr int KIND = -1, META = 2;  // y is of any kind
  template <int KS>
  __device__ static void mma(int (&c)[4], uint4 a, uint4 b, uint32_t e) {
    PP_MMA("m16n8k64.row.col.s32.s8.s8.s32", 0, "r");
  }
};

template <class T>
constexpr int PIECES = 256 + 32 * T::META;  // of 16 bytes in a block

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// W is read once in decode: past L1, and L2 fetches the whole 256-byte line of the stream.
__device__ inline uint4 load_stream(const uint4* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// 16 bytes, or zeros where `valid` is false; the address must be good in both cases.
__device__ inline void copy_async(uint32_t to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory"); }

__device__ inline uint4 load_matrix(uint32_t at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

// x lies in shared memory as rows of 128 bytes whose 16-byte chunks are permuted by the token: ldmatrix, which reads one
// chunk of eight tokens at a time, then touches every bank once.
__device__ inline uint32_t swizzled(int token, int chunk) { return token * STEP + ((chunk ^ (token & 7)) << 4); }

__device__ inline uint32_t word(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// ---- epilogue

__device__ inline float read(const void* p, int kind, int i) {
  if (kind == F32) return ((const float*)p)[i];
  if (kind == F16) return __half2float(((const __half*)p)[i]);
  return __bfloat162float(((const __nv_bfloat16*)p)[i]);
}

__device__ inline uint16_t round16(int kind, float v) {
  return kind == F16 ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

template <class T>
__device__ int kind_of(const Out& o) { return T::KIND >= 0 ? T::KIND : o.kind; }

struct Row {
  float scale, bias;
};

template <class T>
__device__ Row row_of(const Out& o, int n) {
  return {T::KIND < 0 ? o.row_scale[n] : 1.f, o.bias ? read(o.bias, kind_of<T>(o), n) : 0.f};
}

template <class T>
__device__ float finish(const Out& o, typename T::Acc acc, int m, Row row) {
  if constexpr (T::KIND < 0) return acc * (o.token_scale[m] * row.scale) + row.bias;
  else return acc + row.bias;
}

// y[m][n], y[m][n + 1] for even n < N.
template <class T>
__device__ void store_pair(const Out& o, typename T::Acc a0, typename T::Acc a1, int m, int n) {
  const size_t at = (size_t)m * o.N + n;
  const int kind = kind_of<T>(o);
  const bool two = n + 1 < o.N;
  const float v0 = finish<T>(o, a0, m, row_of<T>(o, n)), v1 = two ? finish<T>(o, a1, m, row_of<T>(o, n + 1)) : 0.f;
  if (kind == F32) {
    float* y = (float*)o.y + at;
    if (o.N % 2 == 0) { *(float2*)y = make_float2(v0, v1); return; }
    y[0] = v0;
    if (two) y[1] = v1;
  } else {
    uint16_t* y = (uint16_t*)o.y + at;
    const uint16_t h0 = round16(kind, v0), h1 = round16(kind, v1);
    if (o.N % 2 == 0) { *(uint32_t*)y = h0 | (uint32_t)h1 << 16; return; }
    y[0] = h0;
    if (two) y[1] = h1;
  }
}

template <class A>
struct alignas(8) Pair { A a, b; };

// True in the last CTA to arrive at a tile; the counter is then zero again, so a CUDA graph can replay the launch.
// The barrier and one acq_rel atomic order all partial sums before it (a fence by every thread costs more).
__device__ inline bool last_arrival(unsigned* count, unsigned splits) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before) : "l"(count), "r"(splits - 1) : "memory");
    last = before == splits - 1;
  }
  __syncthreads();
  return last;
}

// Sums the partials of rows [n0, n1) and tokens [m0, m1) in the order of the splits, so the result never varies.
template <class T>
__device__ void sum_splits(const Out& o, int splits, int m0, int m1, int n0, int n1) {
  using Acc = typename T::Acc;
  const int width = (o.N + ROWS - 1) / ROWS * ROWS, half = (n1 - n0) / 2;
  for (int i = threadIdx.x; i < (m1 - m0) * half; i += blockDim.x) {
    const int m = m0 + i / half, n = n0 + i % half * 2;
    if (n >= o.N) continue;
    const char* p = (const char*)o.partial + ((size_t)m * width + n) * sizeof(Acc);
    Acc a = 0, b = 0;
    for (int s = 0; s < splits; s++, p += (size_t)o.M * width * sizeof(Acc)) {
      const int2 bits = __ldcg((const int2*)p);
      const Pair<Acc> v = *(const Pair<Acc>*)&bits;
      a += v.a;
      b += v.b;
    }
    store_pair<T>(o, a, b, m, n);
  }
}

// ---- decode: M <= 8 * NT. Grid (N / 64, splits).
//
// A CTA owns 64 rows and a range of blocks, which its warps take in turn: in the loop they share nothing and meet no
// barrier. A lane loads the next block's registers right after the mma that consumed this block's: 4.6 KB in flight a
// warp out of 36 registers (a double buffer would take 72).

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

// ---- prefill: a tile of BM tokens x BN rows. Grid (N / BN, M / BM, splits).
//
// Two warps along the tokens, BN / 64 along the rows, each BM / 2 tokens x 64 rows. Shared memory is the first wall
// here, not the tensor core: a k step of the 128 x 256 tile takes 1072 wavefronts of it for 1024 tensor clocks, and
// narrower tiles take relatively more.

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

// ---- int8: tokens x [M, K] to q int8 [M, xbytes] (zeros past K) and scale float [M]; one CTA a token.
// A token that holds an Inf or NaN gets the scale NaN.

template <class X>
__device__ void quantize(const X* __restrict__ x, int8_t* __restrict__ q, float* __restrict__ scale, int K, int xbytes) {
  __shared__ float peaks[32];
  x += (size_t)blockIdx.x * K;
  q += (size_t)blockIdx.x * xbytes;
  float peak = 0.f;
  for (int k = threadIdx.x; k < K; k += blockDim.x) {
    const float v = fabsf((float)x[k]);
    peak = v < INFINITY ? fmaxf(peak, v) : INFINITY;
  }
  for (int d = 16; d; d >>= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, d));
  if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
  __syncthreads();
  for (int i = 0; i < blockDim.x / 32; i++) peak = fmaxf(peak, peaks[i]);
  if (threadIdx.x == 0) scale[blockIdx.x] = peak < INFINITY ? peak / 127.f : NAN;
  const float inverse = peak > 0.f ? 127.f / peak : 0.f;
  for (int k = threadIdx.x; k < xbytes; k += blockDim.x) {
    const float v = k < K ? (float)x[k] * inverse : 0.f;
    q[k] = (int8_t)max(-127, min(127, __float2int_rn(v)));
  }
}

}  // namespace pp::linear24
