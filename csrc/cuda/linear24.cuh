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
