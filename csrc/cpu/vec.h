// Vectors of float32 as wide as the instruction set allows, one source for all of them: GCC vector
// extensions, with intrinsics only where the compiler has no good code of its own (float16).
// Loads and stores convert from and to the element types of the tensors.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pp {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));
typedef int8_t VecB __attribute__((vector_size(kLanes)));

// Element types of a tensor; both 16-bit ones hold raw bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline VecF splat(float x) { return x - VecF{}; }  // taking off zero is free, adding it is not: -0.0 would change

template <class V>
inline V load_raw(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
inline void store_raw(void* p, const V& v, std::size_t bytes) {
  if (bytes == sizeof v) {  // else a call of memcpy
    std::memcpy(p, &v, sizeof v);
  } else {
    std::memcpy(p, &v, bytes);
  }
}

// The smaller or larger of v and a bound; NaN in v stays. GCC has no single instruction for the same ?: on vectors.
inline VecF at_most(VecF v, float bound) {
#if defined(__AVX512F__)
  return (VecF)_mm512_min_ps((__m512)splat(bound), (__m512)v);
#elif defined(__AVX2__)
  return (VecF)_mm256_min_ps((__m256)splat(bound), (__m256)v);
#else
  return v > splat(bound) ? splat(bound) : v;
#endif
}

inline VecF at_least(VecF v, float bound) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)splat(bound), (__m512)v);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)splat(bound), (__m256)v);
#else
  return v < splat(bound) ? splat(bound) : v;
#endif
}

inline VecF to_float(VecF v, const float*) { return v; }

// GCC widens 16 lanes in two halves, with 5 instructions where one does.
inline VecU widened(VecH v) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VecU);
#endif
}

inline VecI widened(VecB v) {
#if defined(__AVX512F__)
  return (VecI)_mm512_cvtepi8_epi32((__m128i)v);
#elif defined(__AVX2__)  // GCC 12 would take the eight bytes apart one by one
  int64_t bytes;
  std::memcpy(&bytes, &v, sizeof bytes);
  return (VecI)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes));
#else
  return __builtin_convertvector(v, VecI);
#endif
}

inline VecF to_float(VecH v, const BFloat16*) { return (VecF)(widened(v) << 16); }

inline VecF to_float(VecH v, const Float16*) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps((__m128i)v);
#else
  const VecU half = __builtin_convertvector(v, VecU);
  const VecF scaled = (VecF)((half & 0x7fffu) << 13) * splat(0x1p112f);  // exact, subnormals too
  const VecU bits = (VecU)scaled | (VecU)((half & 0x7c00u) == 0x7c00u ? (VecI)splat(0) + 0x7f800000 : (VecI){});
  return (VecF)(bits | (half & 0x8000u) << 16);
#endif
}

inline VecF to_float(VecB v, const int8_t*) { return __builtin_convertvector(widened(v), VecF); }

inline VecF from_float(VecF v, const float*) { return v; }

inline VecH from_float(VecF v, const BFloat16*) {  // to nearest, ties to even
  const VecU u = (VecU)v;
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : VecU{} + 0x7fc0u, VecH);
}

inline VecH from_float(VecF v, const Float16*) {  // to nearest, ties to even
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU sign = (VecU)v & 0x80000000u, u = (VecU)v ^ sign;
  const VecU normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const VecU small = (VecU)((VecF)u + splat(0.5f)) - 0x3f000000u;  // the addition rounds to 2^-24
  VecU half = u < (113u << 23) ? small : normal;
  half = u >= 0x477ff000u ? VecU{} + 0x7c00u : half;  // 65520 and above
  half = u > 0x7f800000u ? VecU{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign >> 16, VecH);
#endif
}

template <class T>
struct Raw {
  using type = VecH;
};
template <>
struct Raw<float> {
  using type = VecF;
};
template <>
struct Raw<int8_t> {
  using type = VecB;
};

template <class T>
inline VecF load(const T* p) {
  return to_float(load_raw<typename Raw<T>::type>(p), p);
}

template <class T>
inline VecF load(const T* p, int n) {  // the first n lanes; the others are zero
  if (n == kLanes) return load(p);
  typename Raw<T>::type raw{};
  std::memcpy(&raw, p, n * sizeof(T));
  return to_float(raw, p);
}

template <class T>
inline void store(T* p, VecF v, int n = kLanes) {
  const auto raw = from_float(v, p);
  store_raw(p, raw, n * sizeof(T));
}

// e^x within 1.5 ulp for x in [-87, 87]; clamped outside, NaN stays NaN.
inline VecF exp(VecF x) {
  x = at_least(at_most(x, 87.0f), -87.0f);
  const VecF magic = splat(0x1.8p23f);  // adding it rounds to an integer, held in the low bits
  const VecF shifted = x * splat(1.44269504f) + magic;
  const VecF n = shifted - magic;
  const VecF r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);  // ln 2 in two parts
  VecF p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(0.5f);
  p = p * (r * r) + r + splat(1.0f);
  return (VecF)((VecU)p + ((VecU)shifted << 23));
}

}  // namespace pp
