// paged_attention_: rotary embedding, cache and attention of new tokens; see ops/paged_attention.py for the layout.
#include "dots.h"
#include "op.h"

#include <omp.h>

namespace {

using namespace pp;

constexpr int kBlock = 16;              // tokens a block
constexpr int kPerBlock = kBlock / kLanes;  // vectors
constexpr int kMostHeads = 4;           // heads that are done together, with the key head that they share

struct Cache {
  int64_t kv_heads, heads, size;
  const int32_t* table;  // of the row
};

// (a, b) -> (a cos - b sin, b cos + a sin) on the halves of a head, after RMSNorm where there is one
void rotate(const float* x, int64_t size, const float* cos, const float* sin, const float* norm, float eps, float factor,
            float* to) {
  float scale = 1.0f;
  if (norm) {
    float squares = 0;
    for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
    scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + eps);
  }
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = norm ? x[i] * scale * norm[i] : x[i], b = norm ? x[i + half] * scale * norm[i + half] : x[i + half];
    to[i] = (a * cos[i] - b * sin[i]) * factor;
    to[i + half] = (b * cos[i] + a * sin[i]) * factor;
  }
}

// The cache lines of `count` numbers. Blocks are pieces of 1 to 4 KB in memory: each is asked for while the one before it
// is worked on (4 and 16 rows of 130 and 700 tokens 1.5 to 1.8 times as fast on one thread of an EPYC Zen 3, 2026-11-29).
template <class T>
inline void prefetch(const T* from, int64_t count) {
  for (int64_t line = 0; line < count; line += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + line);
}

// G heads of one token that share key head `kv`, over the tokens first .. last of its row. scores: G * stride floats.
template <class T, int G>
void attend(const Cache& c, const T* keys, const T* values, int64_t kv, const float* q, int64_t first, int64_t last,
            float* scores, int64_t stride, float* out) {
  const int64_t begin = first / kBlock, end = last / kBlock + 1, block = c.size * kBlock;
  const auto part = [&](const T* cache, int64_t b) { return cache + (c.table[b] * c.kv_heads + kv) * block; };
  for (int64_t b = begin; b < end; ++b) {
    const T *k = part(keys, b), *next = b + 1 < end ? part(keys, b + 1) : part(values, begin);
    VecF sum[G][kPerBlock][2] = {};
    for (int64_t i = 0; i < c.size; i += 2) {
      prefetch(next + i * kBlock, 2 * kBlock);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 4
        for (int v = 0; v < kPerBlock; ++v) {
          const VecF key = load(k + (i + odd) * kBlock + v * kLanes);
#pragma GCC unroll 4
          for (int g = 0; g < G; ++g) sum[g][v][odd] += splat(q[g * c.size + i + odd]) * key;
        }
      }
    }
    for (int g = 0; g < G; ++g)
      for (int v = 0; v < kPerBlock; ++v) store(scores + g * stride + (b - begin) * kBlock + v * kLanes, sum[g][v][0] + sum[g][v][1]);
  }
  const int64_t skip = first - begin * kBlock, count = last - begin * kBlock + 1, whole = (end - begin) * kBlock;
  float inverse[G];
  for (int g = 0; g < G; ++g) {
    float* s = scores + g * stride;
    float most = s[skip];
    for (int64_t i = skip + 1; i < count; ++i) most = std::max(most, s[i]);
    for (int64_t i = 0; i < skip; ++i) s[i] = most;  // anything finite; taken out below
    for (int64_t i = count; i < whole; ++i) s[i] = most;
    for (int64_t i = 0; i < whole; i += kLanes) store(s + i, exp(load(s + i) - splat(most)));
    std::fill(s, s + skip, 0.0f);
    std::fill(s + count, s + whole, 0.0f);
    VecF total{};
    for (int64_t i = 0; i < whole; i += kLanes) total += load(s + i);
    float sum;
    lane_sums(&total, 1, &sum);
    inverse[g] = 1.0f / sum;
  }
  constexpr int kWide = 4;  // vectors of a head at a time
  for (int64_t from = 0; from < c.size; from += kWide * kLanes) {
    const int wide = static_cast<int>(std::min<int64_t>(kWide, (c.size - from + kLanes - 1) / kLanes));
    VecF sum[G][kWide] = {};
    const auto add = [&](int64_t i, auto lanes) {
      const T* v = part(values, begin + i / kBlock) + i % kBlock * c.size + from;
#pragma GCC unroll 4
      for (int w = 0; w < kWide; ++w) {
        if (w >= wide) break;
        const VecF value = lanes(v + w * kLanes, from + w * kLanes);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) sum[g][w] += splat(scores[g * stride + i]) * value;
      }
    };
    const bool even = from + kWide * kLanes <= c.size;
    for (int64_t i = skip; i < count; ++i) {
      if (!from && i + kBlock < count) prefetch(part(values, begin + i / kBlock + 1) + i % kBlock * c.size, c.size);
      if (even) {
        add(i, [](const T* p, int64_t) { return load(p); });
      } else {
        add(i, [&](const T* p, int64_t at) { return load(p, static_cast<int>(std::min<int64_t>(kLanes, c.size - at))); });
      }
    }
    for (int g = 0; g < G; ++g) {
      for (int w = 0; w < wide; ++w) {
        const int64_t at = from + w * kLanes;
        store(out + g * c.size + at, sum[g][w] * splat(inverse[g]), static_cast<int>(std::min<int64_t>(kLanes, c.size - at)));
      }
    }
  }
}

template <class T>
void paged_attention(std::uintptr_t qkv_, int64_t tokens, std::uintptr_t cos_, std::uintptr_t sin_,
                     std::uintptr_t positions_, std::uintptr_t rows_, std::uintptr_t tables, int64_t table_stride,
                     std::uintptr_t keys_, std::uintptr_t values_, int64_t kv_heads, int64_t heads, int64_t size,
                     int64_t scale, int64_t window, std::uintptr_t q_norm, std::uintptr_t k_norm, int64_t eps,
                     std::uintptr_t out_, int threads) {
  const float *qkv = pointer<const float>(qkv_), *cos = pointer<const float>(cos_), *sin = pointer<const float>(sin_);
  const auto *positions = pointer<const int32_t>(positions_), *rows = pointer<const int32_t>(rows_);
  T *keys = pointer<T>(keys_), *values = pointer<T>(values_);
  float *out = pointer<float>(out_), *q = scratch<0>(tokens * heads * size);
  const int64_t group = heads / kv_heads, block = size * kBlock;
  const auto table_of = [&](int64_t t) { return pointer<const int32_t>(tables) + rows[t] * table_stride; };
  int64_t longest = 0, work = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    longest = std::max<int64_t>(longest, positions[t] + 1);
    work += positions[t] + 1;
  }
  const int64_t stride = (longest + kBlock - 1) / kBlock * kBlock + kBlock;  // a window may begin inside a block
  const int team = work * heads * size < (32 << 10) ? 1 : threads;
  // Heads that share keys go together, but one by one where that is balanced better; the bits are the same. A head alone
  // costs 1.5 times its share of three (EPYC Zen 3).
  const auto most = [&](int64_t units) { return (tokens * kv_heads * units + team - 1) / team; };  // of one thread
  int64_t together = std::min<int64_t>(group, kMostHeads), units = (group + together - 1) / together;
  if (2 * most(units) * together > 3 * most(group)) together = 1, units = group;
#pragma omp parallel num_threads(team) if (team > 1)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      const float* x = qkv + t * (heads + 2 * kv_heads) * size;
      const int64_t place = positions[t], half = size / 2;
      const float *c = cos + place * half, *s = sin + place * half;
      for (int64_t h = 0; h < heads; ++h) {
        rotate(x + h * size, size, c, s, pointer<const float>(q_norm), from_bits(eps), from_bits(scale), q + (t * heads + h) * size);
      }
      const int64_t at = table_of(t)[place / kBlock];
      float* key = scratch<1>(size);
      for (int64_t h = 0; h < kv_heads; ++h) {
        rotate(x + (heads + h) * size, size, c, s, pointer<const float>(k_norm), from_bits(eps), 1.0f, key);
        T* k = keys + (at * kv_heads + h) * block + place % kBlock;
        for (int64_t i = 0; i < size; ++i) store(k + i * kBlock, splat(key[i]), 1);
        T* v = values + (at * kv_heads + h) * block + place % kBlock * size;
        const float* value = x + (heads + kv_heads + h) * size;
        for (int64_t i = 0; i < size; i += kLanes) {
          const int n = static_cast<int>(std::min<int64_t>(kLanes, size - i));
          store(v + i, load(value + i, n), n);
        }
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < tokens * kv_heads * units; ++unit) {
      const int64_t t = unit / (kv_heads * units), kv = unit / units % kv_heads, from = unit % units * together;
      const int64_t last = positions[t], first = window ? std::max<int64_t>(0, last - window + 1) : 0;
      const Cache c{kv_heads, heads, size, table_of(t)};
      const int64_t at = (t * heads + kv * group + from) * size;
      float* scores = scratch<2>(kMostHeads * stride);
      const auto run = [&](auto count) {
        attend<T, decltype(count)::value>(c, keys, values, kv, q + at, first, last, scores, stride, out + at);
      };
      switch (std::min(together, group - from)) {
        case 1: run(std::integral_constant<int, 1>()); break;
        case 2: run(std::integral_constant<int, 2>()); break;
        case 3: run(std::integral_constant<int, 3>()); break;
        default: run(std::integral_constant<int, 4>());
      }
    }
  }
}

}  // namespace

PP_OP("paged_attention_f32", paged_attention<float>);
PP_OP("paged_attention_bf16", paged_attention<BFloat16>);
PP_OP("paged_attention_f16", paged_attention<Float16>);
