// subset_ffn: the gated FFN over listed channels, three weight rows a channel, each read once.
//
// The dense channels are cut into kParts ranges. A thread takes a range, goes through every segment's channels in it (so
// that a row that several personas keep comes from memory once), and adds to sums of the range's own; the ranges' sums
// are added in their order. Nothing depends on the number of threads, nor a token on the rest of the batch.
//
// A tile of four tokens takes one and a half times as long as one of two (weights have to be loaded and widened), so segments
// of few rows go together, through all channels that one of them keeps: a token adds zero times W_down for the others'.
// 16 characters of one row each, 82% of the channels in common: 1.5 times as fast; 8 of two rows: 1.1 (EPYC Zen 3, 2026-11-29).
#include "dots.h"
#include "op.h"
#include "rows.h"

#include <omp.h>

namespace {

using namespace pp;

constexpr int64_t kParts = 8;
constexpr int kStreams = 4;           // ranges that a lone token passes at once: channels_together
constexpr int kGroup = 4;             // channels whose products are made before they are multiplied into y
constexpr int64_t kChunk = 64;        // tokens at a time: their sums, kParts * kChunk * H, stay in the caches
constexpr int64_t kSmall = 64 << 10;  // weights below which one thread is faster

struct Segment {
  int64_t rows, first, count;
};

template <class T>
struct Ffn {
  const T *gate, *up, *down;
  const float *gate_scale, *up_scale, *down_scale, *gate_bias, *up_bias;
  int64_t hidden, pitch, stride;  // pitch: from a channel's weights to the next one's; stride: padded(hidden)
  bool gelu;
};

inline VecF activated(VecF x, bool gelu) {  // x * logistic(z), as in importance.cpp
  x = at_least(x, -1e4f);
  const VecF z = gelu ? x * (splat(1.5957691216f) + splat(0.07135481283f) * (x * x)) : x;
  return x / (splat(1.0f) + exp(-z));
}

// h[c * M + m] for C channels and M tokens. next: 2 * C rows to prefetch, or null. kFar: the channels are far from each
// other, so rows of all of them are read side by side: the gate's, then those of up; else a channel's are together.
template <class T, bool kInOrder, bool kFar, int C, int M>
void hidden_tile(const Ffn<T>& f, const int32_t* channel, const T* const* next, const float* x, float* h) {
  constexpr int kStep = kFar ? 1 : 2, kUp = kFar ? C : 1;  // rows: from one channel's gate to the next one's, and to up
  const T* row[2 * C];
  for (int c = 0; c < C; ++c) {
    row[kStep * c] = f.gate + channel[c] * f.pitch;
    row[kStep * c + kUp] = f.up + channel[c] * f.pitch;
  }
  float z[2 * C * M], gate[C * M], up[C * M];
  constexpr int R = std::min(2 * C, kInOrder ? std::min(4, 16 / M) : rows_of(M));  // lane_sums takes 16
  for (int r = 0; r < 2 * C; r += R) {
    const T* const* ahead = next ? next + r : nullptr;
    dot<kInOrder && !kFar ? 1 : R, kInOrder ? 2 : 1, R, M>(row + r, ahead, x, f.stride, f.hidden, z + r * M);
  }
  const auto value = [&](int c, const float* scale, const float* bias, const float* z) {
    return scale || bias ? finished(*z, scale ? scale[channel[c]] : 1.0f, bias ? bias[channel[c]] : 0.0f) : *z;
  };
  for (int c = 0; c < C; ++c) {
    for (int m = 0; m < M; ++m) {
      gate[c * M + m] = value(c, f.gate_scale, f.gate_bias, z + kStep * c * M + m);
      up[c * M + m] = value(c, f.up_scale, f.up_bias, z + (kStep * c + kUp) * M + m);
    }
  }
  for (int i = 0; i < C * M; i += kLanes) {
    const int n = std::min(kLanes, C * M - i);
    store(h + i, activated(load(gate + i, n), f.gelu) * load(up + i, n), n);
  }
  if (f.down_scale) {
    for (int c = 0; c < C; ++c)
      for (int m = 0; m < M; ++m) h[c * M + m] *= f.down_scale[channel[c]];
  }
}

// y[m] += sum over the C channels of h[c, m] * down[c]. next: C rows to prefetch, or null.
template <class T, bool kInOrder, int C, int M>
PP_ALONE void down_tile(const Ffn<T>& f, const int32_t* channel, const T* const* next, const float* h, float* y) {
  constexpr int kLine = 64 / sizeof(T);
  const int64_t stride = f.stride;
  const T* row[C];
  VecF factor[C * M];
  for (int c = 0; c < C; ++c) row[c] = f.down + channel[c] * f.pitch;
  for (int j = 0; j < C * M; ++j) factor[j] = splat(h[j]);
  const auto step = [&](int64_t i, auto load_weights) __attribute__((always_inline)) {
    VecF sum[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m] = load(y + m * stride + i);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const VecF w = load_weights(row[c] + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum[m] += factor[c * M + m] * w;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(y + m * stride + i, sum[m]);
  };
  const int64_t whole = f.hidden / kLanes * kLanes, part = whole / C / kLanes * kLanes;
  for (int c = 0; c < C; ++c) {
    const int64_t first = c * part, last = c + 1 < C ? first + part : whole;
    for (int64_t i = first; i < last; i += kLanes) {
      if (next && kInOrder) {
        for (int line = 0; line < C * kLanes; line += kLine) __builtin_prefetch(next[c] + (i - first) * C + line);
      } else if (next && i % kLine == 0) {
        for (int n = 0; n < C; ++n) __builtin_prefetch(next[n] + i);
      }
      step(i, [](const T* p) { return load(p); });
    }
  }
  if (const int rest = static_cast<int>(f.hidden - whole)) step(whole, [rest](const T* p) { return load(p, rest); });
}

// h of a tile becomes zero where a token, the first of them `t`, does not keep a channel.
template <int C, int M>
void drop_others(const uint8_t* keeps, int64_t t, float* h) {
  for (int c = 0; c < C; ++c) {
    const unsigned kept = keeps[c] >> t;
    for (int m = 0; m < M; ++m) h[c * M + m] = kept >> m & 1 ? h[c * M + m] : 0.0f;
  }
}

// The channels [channel, channel + count) for `tokens` tokens, into y [tokens, stride]. The list goes on for `listed`
// channels, which the same thread most likely does next: the first of them are prefetched already. keeps: for each
// channel, one bit a token, or null when all keep all. kInOrder: rows are shorter than kShort bytes.
template <class T, bool kInOrder>
void channels_into(const Ffn<T>& f, const int32_t* channel, const uint8_t* keeps, int64_t count, int64_t listed,
                   const float* x, int64_t tokens, float* y) {
  row_groups<kGroup>(0, count, [&](int64_t c, auto c_of) {
    constexpr int C = decltype(c_of)::value;
    const bool more = c + 2 * C <= listed;
    const T* next[3 * C];  // in the order in which they lie in memory where a channel's rows are together
    for (int n = 0; more && n < C; ++n) {
      const int64_t at = channel[c + C + n] * f.pitch;
      next[3 * n] = f.gate + at, next[3 * n + 1] = f.up + at, next[3 * n + 2] = f.down + at;
    }
    token_tiles(tokens, [&](int64_t t, auto m_of) {
      constexpr int M = decltype(m_of)::value;
      const bool ahead = more && t == 0;
      float h[C * M];
      hidden_tile<T, kInOrder, false, C, M>(f, channel + c, ahead ? next : nullptr, x + t * f.stride, h);
      if (keeps) drop_others<C, M>(keeps + c, t, h);
      down_tile<T, kInOrder, C, M>(f, channel + c, ahead ? next + 2 * C : nullptr, h, y + t * f.stride);
    });
  });
}

// What some tokens do in a range of channels: a list of them that goes on behind the range, for what is prefetched.
struct Work {
  int64_t row, rows;
  const int32_t* channel;
  const uint8_t* keeps;  // as in channels_into
  int64_t count, listed;
};

// y[i] += h[i] * the down weights of channel[i], for kStreams channels with a y each. next: the rows to prefetch.
template <class T>
PP_ALONE void down_together(const Ffn<T>& f, const int32_t* channel, const T* const* next, const float* h, float* y) {
  constexpr int kLine = 64 / sizeof(T);
  const T* row[kStreams];
  VecF factor[kStreams];
  for (int s = 0; s < kStreams; ++s) row[s] = f.down + channel[s] * f.pitch, factor[s] = splat(h[s]);
  const auto add = [&](int s, int64_t i, VecF w) __attribute__((always_inline)) {
    float* to = y + s * f.stride + i;
    store(to, load(to) + factor[s] * w);
  };
  int64_t i = 0;
  for (; i + kLine <= f.hidden; i += kLine) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      __builtin_prefetch(next[s] + i);
#pragma GCC unroll 8
      for (int j = 0; j < kLine; j += kLanes) add(s, i + j, load(row[s] + i + j));
    }
  }
  for (; i < f.hidden; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, f.hidden - i));
    for (int s = 0; s < kStreams; ++s) add(s, i, load(row[s] + i, n));
  }
}

// One token through kStreams ranges, a channel of each at a time, into a y for each range, with the bits of channels_into.
// Memory is then read as far streams, each in order: half of the channels 1.1x to 1.3x as fast in bf16 and int8, all of
// them 1.05x to 1.3x in bf16 and 0.9x to 1.1x in int8 (EPYC Zen 3, one and two threads, 2026-11-29). On a Xeon with AMX
// 1.1x in bf16, but 0.9x in int8 on two threads, where the sums of four ranges are more work than one's (2026-11-30).
template <class T>
constexpr bool kTogether = !kOneStream && (kLanes <= 8 || sizeof(T) > 1);

template <class T, bool kInOrder>
void channels_together(const Ffn<T>& f, const std::vector<Work>& work, const float* x, float* y) {
  int64_t common = INT64_MAX;
  for (const Work& w : work) common = std::min(common, w.count);
  for (int64_t k = 0; k < common; ++k) {
    int32_t channel[kStreams];
    const T* next[3 * kStreams];
    for (int i = 0; i < kStreams; ++i) {
      channel[i] = work[i].channel[k];
      const int64_t at = work[i].channel[std::min(k + 1, work[i].listed - 1)] * f.pitch;
      next[i] = f.gate + at, next[kStreams + i] = f.up + at, next[2 * kStreams + i] = f.down + at;
    }
    float h[kStreams];
    hidden_tile<T, kInOrder, true, kStreams, 1>(f, channel, next, x, h);
    down_together(f, channel, next + 2 * kStreams, h, y);
  }
  for (int i = 0; i < kStreams; ++i) {
    const Work& w = work[i];
    channels_into<T, kInOrder>(f, w.channel + common, nullptr, w.count - common, w.listed - common, x, 1, y + i * f.stride);
  }
}

// The channels from `begin` on that one of the segments keeps, ascending, and for each of them which tokens do.
struct Union {
  std::vector<int32_t> channel;
  std::vector<uint8_t> keeps;
  int64_t count = 0, apart = 0;  // channels before `end`, and the same if each segment went by itself

  Union(const int32_t* channels, const Segment* segment, int64_t segments, int64_t begin, int64_t end) {
    const int32_t *at[kMostTokens], *stop[kMostTokens];
    for (int64_t i = 0; i < segments; ++i) {
      stop[i] = channels + segment[i].first + segment[i].count;
      at[i] = std::lower_bound(stop[i] - segment[i].count, stop[i], begin);
      apart += std::lower_bound(at[i], stop[i], end) - at[i];
    }
    for (int64_t more = 0; more < 2 * kGroup;) {
      int32_t least = INT32_MAX;
      for (int64_t i = 0; i < segments; ++i) least = at[i] < stop[i] ? std::min(least, *at[i]) : least;
      if (least == INT32_MAX) break;
      unsigned mask = 0;
      for (int64_t i = 0, token = 0; i < segments; token += segment[i++].rows) {
        if (at[i] < stop[i] && *at[i] == least) mask |= ((1u << segment[i].rows) - 1) << token, ++at[i];
      }
      channel.push_back(least), keeps.push_back(static_cast<uint8_t>(mask));
      least < end ? ++count : ++more;
    }
  }
};

// Adds the work of all segments in the channels [begin, end). `unions` holds the lists that were made for it, and has room
// for as many as there can be: they must not move.
void plan(const std::vector<Segment>& segments, const int32_t* channels, int64_t begin, int64_t end,
          std::vector<Union>& unions, std::vector<Work>& all) {
  int64_t row = 0;
  for (std::size_t i = 0, next; i < segments.size(); i = next) {
    int64_t rows = segments[i].rows;
    for (next = i + 1; next < segments.size() && rows + segments[next].rows <= kMostTokens; ++next) {
      rows += segments[next].rows;
    }
    if (next > i + 1) {
      const Union& u = unions.emplace_back(channels, &segments[i], next - i, begin, end);
      if (4 * u.count <= 3 * u.apart) {  // else tiles of few tokens over fewer channels are as fast
        all.push_back({row, rows, u.channel.data(), u.keeps.data(), u.count, static_cast<int64_t>(u.channel.size())});
        row += rows;
        continue;
      }
    }
    for (; i < next; row += segments[i++].rows) {
      const int32_t *first = channels + segments[i].first, *last = first + segments[i].count;
      const auto* from = std::lower_bound(first, last, begin);
      all.push_back({row, segments[i].rows, from, nullptr, std::lower_bound(from, last, end) - from, last - from});
    }
  }
}

template <class T>
void subset_ffn(std::uintptr_t x_, int64_t tokens, int64_t hidden, int64_t pitch, std::uintptr_t gate,
                std::uintptr_t up, std::uintptr_t down, std::uintptr_t gate_scale, std::uintptr_t up_scale,
                std::uintptr_t down_scale, std::uintptr_t gate_bias, std::uintptr_t up_bias, std::uintptr_t down_bias,
                std::uintptr_t norm, int64_t eps, std::uintptr_t residual, std::uintptr_t y, std::uintptr_t channels_,
                std::uintptr_t segments_, int64_t segment_count, int64_t width, int gelu, int threads) {
  const Ffn<T> f{pointer<const T>(gate),         pointer<const T>(up),           pointer<const T>(down),
                 pointer<const float>(gate_scale), pointer<const float>(up_scale), pointer<const float>(down_scale),
                 pointer<const float>(gate_bias),  pointer<const float>(up_bias),  hidden,
                 pitch,                            padded(hidden),                 gelu != 0};
  const auto* channels = pointer<const int32_t>(channels_);
  const auto* segments = pointer<const Segment>(segments_);
  const float *x = pointer<const float>(x_), *bias = pointer<const float>(down_bias);
  const float* old = pointer<const float>(residual);
  float* out = pointer<float>(y);
  const bool in_order = hidden * sizeof(T) < kShort;
  const auto into = in_order ? channels_into<T, true> : channels_into<T, false>;
  const auto together = in_order ? channels_together<T, true> : channels_together<T, false>;
  const int64_t rows = std::min(tokens, kChunk), span = (width + kParts - 1) / kParts;
  float *n = scratch<0>(rows * f.stride), *sums = scratch<1>(kParts * rows * f.stride);

  int64_t segment = 0, used = 0;  // where the next chunk begins
  for (int64_t first = 0; first < tokens; first += kChunk) {
    const int64_t count = std::min(kChunk, tokens - first);
    std::vector<Segment> pieces;
    int64_t work = 0;
    for (int64_t left = count; left > 0 && segment < segment_count;) {
      const Segment& s = segments[segment];
      const int64_t take = std::min(left, s.rows - used);
      if (take) pieces.push_back({take, s.first, s.count});
      work += take * s.count * hidden * 3;
      left -= take, used += take;
      if (used == s.rows) ++segment, used = 0;
    }
    normalize(x + first * hidden, count, hidden, pointer<const float>(norm), from_bits(eps), n);
    const int team = work < kSmall ? 1 : threads;
#pragma omp parallel num_threads(team) if (team > 1)
    {
      const int64_t streams = kTogether<T> && count == 1 && team <= kParts / kStreams ? kStreams : 1;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < kParts; p += streams) {
        float* part = sums + p * count * f.stride;
        std::fill(part, part + streams * count * f.stride, 0.0f);
        std::vector<Union> unions;
        unions.reserve(pieces.size() / 2);
        std::vector<Work> work;
        for (int64_t i = 0; i < streams; ++i) {
          plan(pieces, channels, (p + i) * span, (p + i + 1) * span, unions, work);
        }
        if (streams > 1) {
          together(f, work, n, part);
          continue;
        }
        for (const Work& w : work) {
          into(f, w.channel, w.keeps, w.count, w.listed, n + w.row * f.stride, w.rows, part + w.row * f.stride);
        }
      }
      const int64_t strips = (hidden + 63) / 64;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count * strips; ++i) {
        const int64_t t = i / strips, from = i % strips * 64, to = std::min(hidden, from + 64);
        for (int64_t c = from; c < to; c += kLanes) {
          const int lanes = static_cast<int>(std::min<int64_t>(kLanes, to - c));
          VecF v{};
          for (int64_t p = 0; p < kParts; ++p) v += load(sums + (p * count + t) * f.stride + c);
          if (bias) v += load(bias + c, lanes);
          if (old) v += load(old + (first + t) * hidden + c, lanes);
          store(out + (first + t) * hidden + c, v, lanes);
        }
      }
    }
  }
}

}  // namespace

PP_OP("subset_ffn_f32", subset_ffn<float>);
PP_OP("subset_ffn_bf16", subset_ffn<BFloat16>);
PP_OP("subset_ffn_f16", subset_ffn<Float16>);
PP_OP("subset_ffn_i8", subset_ffn<int8_t>);
