"""The PTX simulator itself: what it must compute, what it must catch, what it counts.

The instruction semantics are checked on real nvcc output; the sparse metadata layout against
an independent source, the CUTLASS converter that PyTorch carries.
"""

import functools
import shutil

import numpy as np
import pytest
import torch
from ptxsim import Module, SimError, Unsupported, compile_cuda, compile_triton, from_bf16, to_bf16

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

SOURCE = r"""
#include <cstdint>
extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void add_oob(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) c[i] = a[i] + b[i];
}
extern "C" __global__ void misaligned(float* a) {
  float4 v = *(float4*)(a + 1 + threadIdx.x * 4);
  a[threadIdx.x] = v.x + v.w;
}
template <bool SYNC> __device__ void mm(const float* A, const float* B, float* C, int N) {
  __shared__ float a[16][16], b[16][17];
  int tx = threadIdx.x, ty = threadIdx.y, r = blockIdx.y * 16 + ty, c = blockIdx.x * 16 + tx;
  float s = 0;
  for (int k = 0; k < N; k += 16) {
    a[ty][tx] = A[r * N + k + tx];
    b[ty][tx] = B[(k + ty) * N + c];
    __syncthreads();
    for (int i = 0; i < 16; i++) s += a[ty][i] * b[i][tx];
    if (SYNC) __syncthreads();
  }
  C[r * N + c] = s;
}
extern "C" __global__ void mm_good(const float* A, const float* B, float* C, int N) { mm<true>(A, B, C, N); }
extern "C" __global__ void mm_bad(const float* A, const float* B, float* C, int N) { mm<false>(A, B, C, N); }
extern "C" __global__ void overrun(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x + 1];
}
extern "C" __global__ void uninit(float* x) {
  __shared__ float s[64];
  if (threadIdx.x != 7) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void divergent(float* x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x & 1) { __syncthreads(); x[threadIdx.x] = s[0]; }
  else { x[threadIdx.x] = 3.f * x[threadIdx.x + 2]; __syncthreads(); x[threadIdx.x] += s[5]; }
}
template <int WAIT> __device__ void copy(const float4* x, float4* y, int n) {
  __shared__ float4 buf[2][64];
  int t = threadIdx.x, steps = n / 64;
  auto fetch = [&](int s) {
    unsigned d = (unsigned)__cvta_generic_to_shared(&buf[s & 1][t]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(d), "l"(x + s * 64 + t));
    asm volatile("cp.async.commit_group;");
  };
  fetch(0);
  for (int s = 0; s < steps; s++) {
    if (s + 1 < steps) { fetch(s + 1); asm volatile("cp.async.wait_group %0;" :: "n"(WAIT)); }
    else asm volatile("cp.async.wait_all;");
    __syncthreads();
    float4 v = buf[s & 1][t ^ 33];
    y[s * 64 + t] = make_float4(v.x + 1, v.y + 1, v.z + 1, v.w + 1);
    __syncthreads();
  }
}
extern "C" __global__ void copy_good(const float4* x, float4* y, int n) { copy<1>(x, y, n); }
extern "C" __global__ void copy_bad(const float4* x, float4* y, int n) { copy<2>(x, y, n); }
// The last block to arrive adds the parts; the counter wraps back to zero.
extern "C" __global__ void total(const float* x, float* part, float* out, unsigned* count) {
  float s = x[blockIdx.x * 32 + threadIdx.x];
  for (int o = 16; o; o >>= 1) s += __shfl_xor_sync(~0u, s, o);
  if (threadIdx.x) return;
  part[blockIdx.x] = s;
  __threadfence();
  if (atomicInc(count, gridDim.x - 1) == gridDim.x - 1) {
    float t = 0;
    for (int i = 0; i < gridDim.x; i++) t += part[i];
    *out = t;
  }
}
extern "C" __global__ void integers(const int* a, const int* b, int* o) {
  int i = threadIdx.x, n = blockDim.x, x = a[i], y = b[i];
  unsigned u = x, v = y;
  o[i] = x / y; o[n + i] = x % y; o[2 * n + i] = u / v; o[3 * n + i] = __mulhi(x, y);
  o[4 * n + i] = __popc(u); o[5 * n + i] = __clz(x); o[6 * n + i] = x >> (v & 31); o[7 * n + i] = max(u, v);
}
template <int BYTES> __device__ void ldm(const uint4* x, unsigned* y) {
  __shared__ __align__(16) uint4 s[32][BYTES / 16];
  int t = threadIdx.x;
  for (int c = 0; c < 8; c++) s[t][BYTES == 128 ? c ^ (t & 7) : c] = x[t * 8 + c];
  __syncwarp();
  unsigned a = (unsigned)__cvta_generic_to_shared(&s[t][BYTES == 128 ? 3 ^ (t & 7) : 3]), r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a));
  for (int i = 0; i < 4; i++) y[i * 32 + t] = r[i];
}
extern "C" __global__ void ldm_swizzled(const uint4* x, unsigned* y) { ldm<128>(x, y); }
extern "C" __global__ void ldm_plain(const uint4* x, unsigned* y) { ldm<256>(x, y); }
"""

# One warp: A, B, E, D are the registers of each lane.
SPARSE = r"""
extern "C" __global__ void NAME(const unsigned* A, const unsigned* B, const unsigned* E, float* D) {
  int t = threadIdx.x;
  TYPE d[4] = {};
  asm volatile("mma.sp::ordered_metadata.sync.aligned.INSTR {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, "
    "{%0,%1,%2,%3}, %12, SEL;" : "+C"(d[0]), "+C"(d[1]), "+C"(d[2]), "+C"(d[3])
    : "r"(A[4 * t]), "r"(A[4 * t + 1]), "r"(A[4 * t + 2]), "r"(A[4 * t + 3]), "r"(B[4 * t]), "r"(B[4 * t + 1]),
      "r"(B[4 * t + 2]), "r"(B[4 * t + 3]), "r"(E[t]));
  for (int i = 0; i < 4; i++) D[4 * t + i] = d[i];
}
"""


def sparse_kernel(name, instr, acc, sel):
    letter = {"float": "f", "int": "r"}[acc]
    text = SPARSE.replace("NAME", name).replace("INSTR", instr).replace("TYPE", acc).replace("SEL", str(sel))
    return text.replace("+C", "+" + letter)


@functools.cache
def module():
    f16, s8 = "m16n8k32.row.col.f32.f16.f16.f32", "m16n8k64.row.col.s32.s8.s8.s32"
    kernels = [sparse_kernel("sp_f16_0", f16, "float", 0), sparse_kernel("sp_f16_1", f16, "float", 1)]
    return Module(compile_cuda(SOURCE + "".join(kernels) + sparse_kernel("sp_s8_0", s8, "int", 0)))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def launch(name, grid, block, args, **checks):
    return module().launch(name, grid, block, args, **checks)


def raises(kind, name, grid, block, args, **checks):
    with pytest.raises(SimError) as info:
        launch(name, grid, block, args, **checks)
    assert info.value.kind == kind, str(info.value)
    return info.value


@pytest.mark.parametrize("n", [1, 31, 1000])
def test_vector_add(n):
    a, b, c = normal(1, n), normal(2, n), np.zeros(n, np.float32)
    launch("add", (n + 127) // 128, 128, [a, b, c, n], order="shuffle")
    assert (c == a + b).all()


def test_bad_global_accesses_are_caught():
    error = raises("oob", "add_oob", 1, 128, [normal(1, 100), normal(2, 100), np.zeros(100, np.float32), 100])
    assert error.thread == 100 and "buffer" in str(error)
    raises("misaligned", "misaligned", 1, 4, [np.zeros(64, np.float32)])


def test_tiled_matmul_and_its_race():
    n = 48
    a, b, c = normal(1, n, n), normal(2, n, n), np.zeros((n, n), np.float32)
    launch("mm_good", (3, 3), (16, 16), [a, b, c, n], races=True, uninit=True, schedule="warps")
    np.testing.assert_allclose(c, a @ b, atol=1e-4)
    assert "write-after-read" in str(raises("race", "mm_bad", (3, 3), (16, 16), [a, b, c, n], races=True))


@pytest.mark.parametrize("name, kind", [("overrun", "oob"), ("uninit", "uninit"), ("divergent", "barrier")])
def test_shared_memory_and_barrier_bugs_are_caught(name, kind):
    raises(kind, name, 1, 64, [normal(1, 128)], uninit=True)


def test_async_copies_land_at_the_wait():
    x, y = normal(1, 320, 4), np.zeros((320, 4), np.float32)
    launch("copy_good", 1, 64, [x, y, 320], races=True, uninit=True)
    assert (y == x[np.arange(320).reshape(5, 64)[:, np.arange(64) ^ 33].reshape(-1)] + 1).all()
    raises("async", "copy_bad", 1, 64, [x, y, 320])


def test_last_block_sums_and_the_counter_wraps():
    x, out, count = normal(1, 7 * 32), np.zeros(1, np.float32), np.zeros(1, np.uint32)
    seen = []
    for order in ("linear", "reverse", "shuffle"):
        launch("total", 7, 32, [x, np.full(7, np.nan, np.float32), out, count], order=order)
        seen.append(out[0])
    assert count[0] == 0 and len(set(seen)) == 1 and abs(seen[0] - x.sum()) < 1e-4


def test_integer_semantics():
    rng = np.random.default_rng(5)
    a = rng.integers(-(2**31), 2**31, 256).astype(np.int32)
    b = (rng.integers(1, 2**30, 256) >> rng.integers(0, 28, 256)).astype(np.int32) + 1
    out = np.zeros((8, 256), np.int32)
    launch("integers", 1, 256, [a, b, out])
    x, y, u, v = a.astype(np.int64), b.astype(np.int64), a.view(np.uint32).astype(np.int64), b.astype(np.int64)
    quotient = np.abs(x) // y * np.sign(x)
    bits = [f"{n:b}" for n in u]
    want = [
        quotient,
        x - quotient * y,
        u // v,
        x * y >> 32,
        [s.count("1") for s in bits],
        [32 - len(s) if n else 32 for s, n in zip(bits, u, strict=True)],
        x >> (v & 31),
        np.maximum(u, v),
    ]
    assert (out.view(np.uint32) == np.array(want).astype(np.uint32)).all()


def pruned(rows, columns, dtype, seed):
    """Random 2:4 matrix with zeros, in dtype."""
    rng = np.random.default_rng(seed)
    keep = rng.random((rows, columns // 4, 4)).argsort(-1) < 2
    dense = rng.integers(1, 100, keep.shape) * np.where(rng.random(keep.shape) < 0.5, -1, 1)
    return (dense * keep).reshape(rows, columns).astype(dtype)


def registers(matrix, kind):
    """Fragment of one mma operand, by the figures of the PTX ISA: A (16 x k), or B (k x 8) given transposed."""
    per = 4 // matrix.itemsize
    out = np.zeros((32, 4, per), matrix.dtype)
    for lane in range(32):
        for r in range(4):
            row = lane // 4 + (8 * (r & 1) if kind == "A" else 0)
            column = lane % 4 * per + 4 * per * (r >> 1 if kind == "A" else r)
            out[lane, r] = matrix[row, column : column + per]
    return out.view(np.uint32).reshape(32, 4)


@pytest.mark.parametrize("dtype, columns, tiles", [(np.float16, 32, 2), (np.int8, 64, 1)])
def test_sparse_mma_agrees_with_cutlass_metadata(dtype, columns, tiles):
    """CUTLASS stores one word a lane; 16-bit rows 0-15 use selector 0 of it and rows 16-31 selector 1."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    dense = pruned(16 * tiles, columns, dtype, 3)
    values, meta = sparse_semi_structured_from_dense_cutlass(torch.from_numpy(dense))
    words = np.ascontiguousarray(meta.numpy()).view(np.uint32).reshape(-1)
    x = np.random.default_rng(4).integers(-9, 9, (8, columns)).astype(dtype)
    for tile in range(tiles):
        rows = slice(16 * tile, 16 * tile + 16)
        out = np.zeros((32, 4), np.float32)
        name = f"sp_{'f16' if dtype == np.float16 else 's8'}_{tile}"
        launch(name, 1, 32, [registers(values.numpy()[rows], "A"), registers(x, "B"), words, out])
        got = out.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8)
        assert (got == dense[rows].astype(np.float64) @ x.T.astype(np.float64)).all()


def test_sparse_mma_refuses_disordered_metadata():
    values, x = registers(pruned(16, 32, np.float16, 1), "A"), registers(np.ones((8, 32), np.float16), "B")
    out = np.zeros((32, 4), np.float32)
    launch("sp_f16_0", 1, 32, [values, x, np.full(32, 0x44444444, np.uint32), out])
    raises("ub", "sp_f16_0", 1, 32, [values, x, np.full(32, 0x44444441, np.uint32), out])


def test_bfloat16_rounds_like_torch():
    x = np.concatenate([normal(1, 999), np.float32([0.0, -0.0, np.inf, -np.inf, 1e-40, 3.4e38])])
    want = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (to_bf16(x) == want).all() and (to_bf16(from_bf16(want)) == want).all()


def test_counters():
    n = 1024
    a, b, c = normal(1, n), normal(2, n), np.zeros(n, np.float32)
    t = launch("add", 8, 128, [a, b, c, n], traffic=True).traffic
    assert t.arg(0).load.efficiency == 1.0 and t.arg(0).unique_read == 4 * n and t.arg(0).reread == 1.0
    assert t.arg(2).store.widths == {4: n} and t.arg(2).unique_write == 4 * n
    t = launch("add", 8, 128, [(a, 4), (b, 4), (c, 4), n - 1], traffic=True).traffic
    assert t.arg(0).load.efficiency < 0.85  # every request straddles one more sector
    x, y = np.zeros((32, 32), np.uint32), np.zeros(128, np.uint32)
    for name, factor in (("ldm_swizzled", 1.0), ("ldm_plain", 8.0)):
        assert launch(name, 1, 32, [x, y], traffic=True).traffic.shared["ldmatrix"].conflicts == factor


def test_unsupported_instructions_are_named():
    ptx = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k() { wgmma.fence.sync.aligned; ret; }"""
    m = Module(ptx)
    assert [i.text for i in m.unsupported("k")] == ["wgmma.fence.sync.aligned;"]
    with pytest.raises(Unsupported):
        m.launch("k", 1, 128)


@triton.jit
def product(x, y, out, N, K: tl.constexpr, B: tl.constexpr):
    row, column, k = tl.arange(0, 16), tl.arange(0, B), tl.arange(0, K)
    a = tl.load(x + row[:, None] * K + k[None, :])
    b = tl.load(y + k[:, None] * N + column[None, :], mask=column[None, :] < N, other=0.0)
    tl.store(out + row[:, None] * N + column[None, :], tl.dot(a, b), mask=column[None, :] < N)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_triton_dot(kind):
    signature = {"x": f"*{kind}", "y": f"*{kind}", "out": "*fp32", "N": "i32", "K": "constexpr", "B": "constexpr"}
    kernel = compile_triton(product, signature, {"K": 32, "B": 64}, attrs="auto")
    pack, unpack = (to_bf16, from_bf16) if kind == "bf16" else (np.float16, np.float32)
    x, y, out = pack(normal(1, 16, 32)), pack(normal(2, 32, 48)), np.zeros((16, 48), np.float32)
    kernel.launch(1, [x, y, out, 48], races=True, uninit=True)
    np.testing.assert_allclose(out, unpack(x) @ unpack(y), atol=1e-3)
