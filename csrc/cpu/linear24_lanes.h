// linear24 for many tokens: a vector holds one column of x for kLanes tokens, and every kept weight costs one multiply-add
// for each such vector, with x read from where its two index bits say. So half of the multiply-adds of a dense kernel are
// left out, nothing is permuted or expanded, and pruned columns are never touched.
//
// A piece of x (some columns of a panel of tokens) stays in the L1 cache while a block of rows passes over it; the values
// and the index bits of a row's piece become float32 and byte offsets first.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "linear24.h"
#include "rows.h"
#include "vec.h"

namespace pp {
namespace {

// AVX2 (EPYC Zen 3, L1 cache of 32 KB, 2026-11-29): 16 KB of x are 1.05x to 1.4x as fast as 32, and 8 vectors instead of
// 4 another 1.2x from 64 tokens on; 16 tokens are 1.0x to 1.5x as fast here as by permutes, 12 tokens 0.8x.
constexpr int64_t kPieceFloats = kLanes == 8 ? 4096 : 8192;  // of x in a piece
constexpr int64_t kLaneRows = 64;                            // rows in a block
constexpr int64_t kLanesFrom = kLanes == 4 ? 2 : kLanes == 8 ? 14 : 8;  // tokens; fewer are left to others

// Vectors of the next panel where `tokens` are left.
inline int64_t panel_vectors(int64_t tokens) {
  if (kLanes == 8 && tokens > 6 * kLanes) return 8;
  return tokens > (kLanes == 8 ? 3 : 2) * kLanes ? 4 : tokens > kLanes ? 2 : 1;
}

struct Panel {
  int64_t token, count, vectors;
};

// Panels one after the other until fewer than kLanesFrom tokens are left.
inline std::vector<Panel> panels_of(int64_t tokens) {
  std::vector<Panel> all;
  for (int64_t t = 0; tokens - t >= kLanesFrom; t += all.back().count) {
    const int64_t vectors = panel_vectors(tokens - t);
    all.push_back({t, std::min(tokens - t, vectors * kLanes), vectors});
  }
  return all;
}

template <int kStep, std::size_t... lane>
inline void exchange(VecF& a, VecF& b, std::index_sequence<lane...>) {
  const VecF low = __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane - kStep : lane)...);
  b = __builtin_shufflevector(a, b, (lane & kStep ? kLanes + lane : lane + kStep)...);
  a = low;
}

template <int kStep>
inline void transpose(VecF* v) {
  if constexpr (kStep < kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kStep)) exchange<kStep>(v[i], v[i | kStep], std::make_index_sequence<kLanes>());
    }
    transpose<2 * kStep>(v);
  }
}

// x of `tokens` tokens as [cols][vectors * kLanes] float32, zeros for tokens that are not there.
template <class T>
void pack_panel(const Linear24<T>& a, int64_t token, int64_t tokens, int64_t vectors, float* to) {
  for (int64_t t = 0; t < vectors * kLanes; t += kLanes) {
    for (int64_t c = 0; c < a.cols; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, a.cols - c));
      VecF v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = t + i < tokens ? load(a.x + (token + t + i) * a.cols + c, n) : VecF{};
      transpose<1>(v);
      for (int i = 0; i < n; ++i) std::memcpy(to + (c + i) * vectors * kLanes + t, &v[i], sizeof v[i]);
    }
  }
}

// `count` kept weights as float32, and where their columns of x begin, in bytes from the piece's first.
template <int kVectors, class W>
inline void unpack_piece(const W* w, const uint8_t* meta, int64_t count, float* weights, uint32_t* offsets) {
  VecU shift, base;
  for (int i = 0; i < kLanes; ++i) shift[i] = 2 * i, base[i] = 4 * (i / 2);
  constexpr uint32_t kColumn = kVectors * kLanes * sizeof(float);
  const auto step = [&](int64_t j, VecF v, int64_t bytes) {
    uint32_t bits = 0;
    std::memcpy(&bits, meta + j / 4, bytes);
    const VecU at = (((VecU{} + bits) >> shift & 3u) | base) * kColumn + static_cast<uint32_t>(2 * j) * kColumn;
    std::memcpy(weights + j, &v, sizeof v);
    std::memcpy(offsets + j, &at, sizeof at);
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) step(j, load(w + j), kLanes / 4);
  if (j < count) step(j, load(w + j, static_cast<int>(count - j)), (count - j + 3) / 4);
}

// sums [kVectors * kLanes] += the products of one row's piece.
template <int kVectors>
inline void multiply_piece(const float* x, const float* weights, const uint32_t* offsets, int64_t count, float* sums) {
  constexpr int kChains = 8 / kVectors;  // a multiply-add waits four cycles for the one before it
  VecF sum[kChains][kVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[c][v] = VecF{};
  }
  const auto* bytes = reinterpret_cast<const char*>(x);
  const auto add = [&](int64_t j, int c) {
    const VecF weight = splat(weights[j]);
    const char* p = bytes + offsets[j];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[c][v] += weight * load_raw<VecF>(p + v * sizeof(VecF));
  };
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) add(j + i, i % kChains);
  }
  for (; j < count; j += 2) {
    add(j, 0);
    add(j + 1, 1 % kChains);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    VecF total = load_raw<VecF>(sums + v * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) total += sum[c][v];
    std::memcpy(sums + v * kLanes, &total, sizeof total);
  }
}

// Rows [first, last), at most kLaneRows, times a panel of `tokens` tokens that begins at `token`.
template <class W, int kVectors, class T>
void multiply_panel(const Linear24<T>& a, const float* x, int64_t first, int64_t last, int64_t token, int64_t tokens) {
  constexpr int64_t kWidth = kVectors * kLanes, kColumns = kPieceFloats / kWidth;
  alignas(64) float sums[kLaneRows * kWidth], weights[2][kColumns / 2];
  alignas(64) uint32_t offsets[2][kColumns / 2];
  std::memset(sums, 0, (last - first) * kWidth * sizeof(float));
  const int64_t half = a.cols / 2;
  for (int64_t c = 0; c < a.cols; c += kColumns) {
    const bool final = c + kColumns >= a.cols;
    const int64_t ahead = final ? kLaneRows * half - c / 2 : kColumns / 2;  // the next piece that this row will be asked for
    const auto pass = [&](auto count) {
      const auto unpack = [&](int64_t row) {
        const W* w = static_cast<const W*>(a.values) + row * half + c / 2;
        const uint8_t* meta = a.meta + row * a.meta_stride() + c / 8;
        for (int64_t i = 0; i < kColumns / 2; i += 64 / sizeof(W)) __builtin_prefetch(w + ahead + i, 0, 2);
        __builtin_prefetch(meta + ahead / 4, 0, 2);
        unpack_piece<kVectors>(w, meta, count, weights[row % 2], offsets[row % 2]);
      };
      unpack(first);
      for (int64_t row = first; row < last; ++row) {
        if (row + 1 < last) unpack(row + 1);  // early, so that the processor does it beside the products
        multiply_piece<kVectors>(x + c * kWidth, weights[row % 2], offsets[row % 2], count, sums + (row - first) * kWidth);
      }
    };
    if (c + kColumns <= a.cols) {
      pass(std::integral_constant<int64_t, kColumns / 2>());  // loops of a known length
    } else {
      pass((a.cols - c) / 2);
    }
  }
  for (int64_t row = first; row < last; row += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, last - row));
    const VecF bias = a.bias ? load(a.bias + row, n) : VecF{};
    for (int64_t t = 0; t < tokens; t += kLanes) {
      VecF v[kLanes];
      for (int i = 0; i < kLanes; ++i) v[i] = load_raw<VecF>(sums + (row - first + std::min(i, n - 1)) * kWidth + t);
      transpose<1>(v);
      const int64_t count = std::min<int64_t>(kLanes, tokens - t);
      for (int64_t i = 0; i < count; ++i) store(a.y + (token + t + i) * a.rows + row, v[i] + bias, n);
    }
  }
}

// As many of the first tokens as are worth it; returns how many.
template <class W, class T>
int64_t by_lanes(const Linear24<T>& a) {
  const std::vector<Panel> panels = panels_of(a.tokens);
  if (panels.empty()) return 0;
  const int64_t count = static_cast<int64_t>(panels.size());
  const int64_t tokens = panels.back().token + panels.back().count, width = panels.back().token + panels.back().vectors * kLanes;
  const auto x = aligned<float>(width * a.cols);
  split_rows(count, 1, tokens * a.cols * sizeof(float), a.threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Panel& p = panels[i];
      pack_panel(a, p.token, p.count, p.vectors, x.get() + p.token * a.cols);
    }
  });
  const int64_t bytes = a.rows * a.cols / 2 * sizeof(W) * std::min<int64_t>(tokens, 16);
  split_rows(a.rows, kLanes, bytes, a.threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += kLaneRows) {
      const int64_t end = std::min(last, row + kLaneRows);
      for (const Panel& p : panels) {
        const float* panel = x.get() + p.token * a.cols;
        switch (p.vectors) {
          case 1: multiply_panel<W, 1>(a, panel, row, end, p.token, p.count); break;
          case 2: multiply_panel<W, 2>(a, panel, row, end, p.token, p.count); break;
          case 4: multiply_panel<W, 4>(a, panel, row, end, p.token, p.count); break;
          default:
            if constexpr (kLanes == 8) multiply_panel<W, 8>(a, panel, row, end, p.token, p.count);
        }
      }
    }
  });
  return tokens;
}

}  // namespace
}  // namespace pp
