// linear24 on AMX tiles: W is expanded to its dense form in cache, 32 rows at a time, and multiplied as tiles of
// 16 rows times 64 bytes; tokens are the other side, 16 to a tile. Memory sees only the packed bytes, so a decode batch
// of 16 costs about what one token does, and a long prompt runs at the tile unit's speed.
#include "linear24.h"

#if defined(__AMX_BF16__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

#include "rows.h"
#include "vec.h"

namespace pp {
namespace {

constexpr int64_t kChunk = 512;  // columns expanded at a time when one pass over W serves all tokens: 64 bytes of meta

// Linux lets a process use the tile registers only after it asked.
bool amx_allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The two types: how many columns 64 bytes hold, how to spread kept weights, which instruction multiplies.
struct Bf16 {
  using Element = uint16_t;
  using Mask = __mmask32;
  static __m512i expand(Mask m, const Element* p) { return _mm512_maskz_expandloadu_epi16(m, p); }
};
struct Int8 {
  using Element = uint8_t;
  using Mask = __mmask64;
  static __m512i expand(Mask m, const Element* p) { return _mm512_maskz_expandloadu_epi8(m, p); }
};

// Tile numbers are part of the instruction, hence a macro.
#define PP_MULTIPLY(c, a, b)                  \
  if constexpr (std::is_same_v<Type, Bf16>) { \
    _tile_dpbf16ps(c, a, b);                  \
  } else {                                    \
    _tile_dpbssd(c, a, b);                    \
  }

// Bit masks (one bit a column) of up to 512 columns from their metadata; ORs into `illegal` what is not 2:4.
inline __m512i column_mask(const uint8_t* meta, int bytes, __m512i& illegal) {
  // legal nibbles idx0 | idx1 << 2 with idx0 < idx1: 4, 8, 9, 12, 13, 14
  const __m512i low_table = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 0, 0, 0, 0x3, 0, 0, 0, 0x5, 0x6, 0, 0, 0x9, 0xa, 0xc, 0));
  const __m512i nibble = _mm512_set1_epi8(15);
  const __mmask64 valid = bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
  const __m512i m = _mm512_mask_loadu_epi8(_mm512_set1_epi8(0x44), valid, meta);
  const __m512i low = _mm512_shuffle_epi8(low_table, _mm512_and_si512(m, nibble));
  const __m512i high = _mm512_shuffle_epi8(low_table, _mm512_and_si512(_mm512_srli_epi16(m, 4), nibble));
  const __mmask64 bad = _mm512_testn_epi8_mask(low, low) | _mm512_testn_epi8_mask(high, high);
  illegal = _mm512_mask_set1_epi8(illegal, bad, 1);
  return _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
}

// Columns [first, first + count) of 32 rows (those below `last`) as dense tiles: to[step][row][64 bytes].
template <class Type>
bool expand(const Tiles& a, int64_t row, int64_t last, int64_t first, int64_t count, uint8_t* to) {
  using Element = typename Type::Element;
  constexpr int kStep = 64 / sizeof(Element);
  const int64_t stride = (a.cols + 7) / 8;
  __m512i illegal = _mm512_setzero_si512();
  for (int r = 0; r < 32; ++r) {
    if (row + r >= last) {
      for (int64_t c = 0; c < count; c += kStep) _mm512_store_si512(to + c / kStep * 2048 + r * 64, _mm512_setzero_si512());
      continue;
    }
    const Element* w = static_cast<const Element*>(a.values) + (row + r) * (a.cols / 2) + first / 2;
    const uint8_t* meta = a.meta + (row + r) * stride + first / 8;
    for (int64_t c = 0; c < count; c += 512) {
      alignas(64) uint8_t mask[64];
      const int64_t columns = std::min<int64_t>(std::min<int64_t>(512, count - c), a.cols - first - c);
      _mm512_store_si512(mask, column_mask(meta + c / 8, static_cast<int>((columns + 7) / 8), illegal));
      uint8_t* tile = to + c / kStep * 2048 + r * 64;
      const Element* p = w + c / 2;
      const char* ahead = reinterpret_cast<const char*>(p + 32 * (a.cols / 2));
      int64_t k = 0;
      for (; k + kStep <= columns; k += kStep, tile += 2048) {
        typename Type::Mask m;
        std::memcpy(&m, mask + k / 8, sizeof m);
        _mm_prefetch(ahead + k / 2 * sizeof(Element), _MM_HINT_T1);
        _mm512_store_si512(tile, Type::expand(m, p + k / 2));
      }
      if (k < columns) {  // the last columns of a row: nothing behind them may be read
        typename Type::Mask m;
        std::memcpy(&m, mask + k / 8, sizeof m);
        m &= (typename Type::Mask{1} << (columns - k)) - 1;
        _mm512_store_si512(tile, Type::expand(m, p + k / 2));
      }
    }
  }
  return _mm512_test_epi8_mask(illegal, illegal) == 0;
}

// x as the tile unit wants its second operand: blocks of 16 tokens, [step][16 dwords of k][16 tokens], zero-padded.
template <class Type>
void pack_tokens(const Tiles& a, int64_t block, int64_t steps, uint32_t* to) {
  using Element = typename Type::Element;
  constexpr int kPer = 4 / sizeof(Element);  // columns in a dword
  const Element* x = static_cast<const Element*>(a.x);
  std::memset(to, 0, steps * 1024);
  const int64_t tokens = std::min<int64_t>(16, a.tokens - 16 * block);
  for (int64_t t = 0; t < tokens; ++t) {
    const Element* row = x + (16 * block + t) * a.x_stride;
    for (int64_t d = 0; d < a.cols / kPer; ++d) std::memcpy(to + 16 * d + t, row + kPer * d, 4);
  }
}

void store_tile(const Tiles& a, const uint32_t* c, int64_t row, int64_t last, int64_t token) {
  uint32_t* out = static_cast<uint32_t*>(a.out);
  const int64_t rows = std::min<int64_t>(16, last - row), tokens = std::min<int64_t>(16, a.tokens - token);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) out[(token + t) * a.rows + row + r] = c[16 * r + t];
  }
}

template <class Type>
bool rows_by_tiles(const Tiles& a, const uint32_t* x, int64_t first, int64_t last) {
  constexpr int kStep = 64 / sizeof(typename Type::Element);
  const int64_t padded = round_up(a.cols, kStep), steps = padded / kStep;
  const bool one_pass = a.tokens <= 32;
  const int64_t chunk = one_pass ? kChunk : padded;
  std::unique_ptr<uint8_t[]> memory(new uint8_t[chunk / kStep * 2048 + 64]);
  uint8_t* dense = memory.get() + (64 - reinterpret_cast<std::uintptr_t>(memory.get()) % 64);
  alignas(64) uint32_t c[4][256];
  alignas(64) const TileConfig config;
  _tile_loadconfig(&config);
  bool legal = true;
  for (int64_t row = first; row < last && legal; row += 32) {
    const bool two_rows = row + 16 < last;
    for (int64_t token = 0; token < a.tokens; token += 32) {
      const bool two = token + 16 < a.tokens;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < padded; k += chunk) {
        const int64_t count = std::min(chunk, padded - k);
        if (token == 0) legal &= expand<Type>(a, row, last, k, count, dense);
        const uint32_t* b = x + (token / 16 * steps + k / kStep) * 256;
        for (int64_t s = 0; s < count / kStep; ++s) {
          _tile_loadd(4, dense + s * 2048, 64);
          _tile_loadd(6, b + s * 256, 64);
          PP_MULTIPLY(0, 4, 6);
          if (two_rows) {
            _tile_loadd(5, dense + s * 2048 + 1024, 64);
            PP_MULTIPLY(1, 5, 6);
          }
          if (two) {
            _tile_loadd(7, b + (steps + s) * 256, 64);
            PP_MULTIPLY(2, 4, 7);
            if (two_rows) {
              PP_MULTIPLY(3, 5, 7);
            }
          }
        }
      }
      _tile_stored(0, c[0], 64);
      _tile_stored(1, c[1], 64);
      _tile_stored(2, c[2], 64);
      _tile_stored(3, c[3], 64);
      store_tile(a, c[0], row, last, token);
      if (two_rows) store_tile(a, c[1], row + 16, last, token);
      if (two) store_tile(a, c[2], row, last, token + 16);
      if (two && two_rows) store_tile(a, c[3], row + 16, last, token + 16);
    }
  }
  _tile_release();
  return legal;
}

template <class Type>
bool run(const Tiles& a) {
  constexpr int kStep = 64 / sizeof(typename Type::Element);
  if (!amx_allowed()) return false;
  const int64_t steps = round_up(a.cols, kStep) / kStep, blocks = (a.tokens + 15) / 16;
  std::unique_ptr<uint32_t[]> x(new uint32_t[blocks * steps * 256]);
  split_rows(blocks, 1, a.tokens * a.cols * sizeof(typename Type::Element), a.threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) pack_tokens<Type>(a, b, steps, x.get() + b * steps * 256);
  });
  std::atomic<bool> legal{true};
  const int64_t bytes = a.rows * a.cols / 2 * sizeof(typename Type::Element) * std::min<int64_t>(a.tokens, 16);
  split_rows(a.rows, 32, bytes, a.threads, [&](int64_t first, int64_t last) {
    if (!rows_by_tiles<Type>(a, x.get(), first, last)) legal = false;
  });
  return legal;
}

}  // namespace

bool amx_bf16(const Tiles& a) { return run<Bf16>(a); }
bool amx_int8(const Tiles& a) { return run<Int8>(a); }

}  // namespace pp

#endif
