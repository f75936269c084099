// Stands in for the compiler's header of this name: what the kernels use of AVX-512, of its products of bfloat16 where
// __AVX512BF16__ is defined, and of AMX where __AMX_BF16__ is, in plain C++. So their code for these is tested on machines
// without them.
#pragma once
#ifdef __AMX_BF16__
#define EMULATES_AMX
#undef __AMX_BF16__
#define __AVX512BF16__
#endif
#ifdef __AVX512BF16__
#define EMULATES_BF16
#undef __AVX512BF16__
#endif
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

typedef float f32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint64_t u64 __attribute__((vector_size(64)));
typedef uint16_t u16 __attribute__((vector_size(64)));
typedef uint16_t half_u16 __attribute__((vector_size(32)));

template <typename To, typename From>
static inline To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}
template <typename To>
static inline To read(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
template <typename From>
static inline void write(void* to, From x) {
  std::memcpy(to, &x, sizeof x);
}
template <typename Vector, typename Each>
static inline Vector made(Each each) {
  Vector to;
  for (unsigned i = 0; i < sizeof(Vector) / sizeof to[0]; ++i) to[i] = each(i);
  return to;
}
template <typename Test>
static inline __mmask16 mask(Test test) {
  unsigned found = 0;
  for (int i = 0; i < 16; ++i) found |= (unsigned)test(i) << i;
  return found;
}

static inline __m512 set1_ps(float x) { return made<f32>([&](int) { return x; }); }
static inline __m512i set1_epi32(int x) { return as<__m512i>(made<i32>([&](int) { return x; })); }
static inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  return made<f32>([&](int i) { return std::fma(a[i], b[i], c[i]); });
}
static inline __m512 fnmadd(__m512 a, __m512 b, __m512 c) { return fmadd(-a, b, c); }
static inline __m512 max_ps(__m512 a, __m512 b) {
  return made<f32>([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
static inline __m512 roundscale(__m512 x, int) {
  return made<f32>([&](int i) { return std::nearbyint(x[i]); });
}
static inline __m512 scalef(__m512 x, __m512 n) {
  return made<f32>([&](int i) { return std::ldexp(x[i], (int)std::fmin(std::fmax(n[i], -400.0f), 400.0f)); });
}
static inline float reduce_add(__m512 x) {
  float sums[16];
  write(sums, x);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) sums[i] += sums[i + step];
  return sums[0];
}
static inline float reduce_max(__m512 x) {
  float best = x[0];
  for (int i = 1; i < 16; ++i) best = x[i] > best ? x[i] : best;
  return best;
}
static inline __mmask16 compare(__m512 a, __m512 b, int how) {
  return mask([&](int i) { return how == _CMP_UNORD_Q ? std::isunordered(a[i], b[i]) : a[i] < b[i]; });
}
static inline __mmask16 at_most(__m512i a, __m512i b) {
  return mask([&](int i) { return as<i32>(a)[i] <= as<i32>(b)[i]; });
}
static inline __mmask16 greater(__m512i a, __m512i b) {
  return mask([&](int i) { return as<i32>(a)[i] > as<i32>(b)[i]; });
}
static inline __m512 blend_ps(__m512 no, __mmask16 where, __m512 yes) {
  return made<f32>([&](int i) { return where >> i & 1 ? yes[i] : no[i]; });
}
static inline __m512i blend(__m512i no, __mmask16 where, __m512i yes) {
  return as<__m512i>(made<u32>([&](int i) { return where >> i & 1 ? as<u32>(yes)[i] : as<u32>(no)[i]; }));
}
static inline void store_where(float* to, __mmask16 where, __m512 x) {
  for (int i = 0; i < 16; ++i)
    if (where >> i & 1) to[i] = x[i];
}
static inline void store_where(void* to, __mmask16 where, __m512i x) { store_where((float*)to, where, as<__m512>(x)); }
static inline __m512i left(__m512i x, int by) { return as<__m512i>(as<u32>(x) << by); }
static inline __m512i right(__m512i x, int by) { return as<__m512i>(as<u32>(x) >> by); }
static inline __m512i plus(__m512i a, __m512i b) { return as<__m512i>(as<u32>(a) + as<u32>(b)); }
static inline __m512i wide(__m256i x) {
  return as<__m512i>(made<u32>([&](int i) { return as<half_u16>(x)[i]; }));
}
static inline __m512i signed_wide(__m128i x) {
  int8_t bytes[16];
  write(bytes, x);
  return as<__m512i>(made<i32>([&](int i) { return bytes[i]; }));
}
static inline __m512 to_floats(__m512i x) {
  return made<f32>([&](int i) { return (float)as<i32>(x)[i]; });
}
static inline __m256i narrow(__m512i x) {
  return as<__m256i>(made<half_u16>([&](int i) { return (uint16_t)as<u32>(x)[i]; }));
}
static inline __m256i nearest_bf16(__m512 x) {
  return as<__m256i>(made<half_u16>([&](int i) -> uint16_t {
    const uint32_t bits = as<u32>(x)[i];
    return x[i] != x[i] ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }));
}
static inline float bf16(uint32_t bits) { return as<float>(bits << 16); }
static inline __m512 plus_pairs(__m512 c, __m512bh a, __m512bh b) {
  const u32 left = as<u32>(a), right = as<u32>(b);
  return made<f32>([&](int i) {
    const float odd = std::fma(bf16(left[i] >> 16), bf16(right[i] >> 16), c[i]);
    return std::fma(bf16(left[i]), bf16(right[i]), odd);
  });
}
static inline __m512i unpack32(__m512i a, __m512i b, int from) {
  return as<__m512i>(made<u32>([&](int i) { return as<u32>(i % 2 ? b : a)[i / 4 * 4 + from + i % 4 / 2]; }));
}
static inline __m512i unpack64(__m512i a, __m512i b, int from) {
  return as<__m512i>(made<u64>([&](int i) { return as<u64>(i % 2 ? b : a)[i / 2 * 2 + from]; }));
}
static inline __m512i shuffle_quarters(__m512i a, __m512i b, int how) {
  return as<__m512i>(made<u32>([&](int i) {
    const int quarter = how >> i / 4 * 2 & 3;
    return as<u32>(i < 8 ? a : b)[quarter * 4 + i % 4];
  }));
}
static inline __m512i permute16(__m512i a, __m512i which, __m512i b) {
  return as<__m512i>(made<u16>([&](int i) {
    const int at = as<u16>(which)[i];
    return as<u16>(at & 32 ? b : a)[at & 31];
  }));
}

}  // namespace emulated

#define __AVX512F__ 1
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_setzero_ps() emulated::set1_ps(0)
#define _mm512_setzero_si512() emulated::set1_epi32(0)
#define _mm512_loadu_ps emulated::read<__m512>
#define _mm512_load_ps emulated::read<__m512>
#define _mm512_loadu_si512 emulated::read<__m512i>
#define _mm512_load_si512 emulated::read<__m512i>
#define _mm512_storeu_ps emulated::write<__m512>
#define _mm512_store_ps emulated::write<__m512>
#define _mm512_storeu_si512 emulated::write<__m512i>
#define _mm512_store_si512 emulated::write<__m512i>
#define _mm512_mask_store_ps emulated::store_where
#define _mm512_mask_storeu_epi32 emulated::store_where
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_mul_ps(a, b) ((a) * (b))
#define _mm512_div_ps(a, b) ((a) / (b))
#define _mm512_max_ps emulated::max_ps
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_fnmadd_ps emulated::fnmadd
#define _mm512_roundscale_ps emulated::roundscale
#define _mm512_scalef_ps emulated::scalef
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_cmp_ps_mask emulated::compare
#define _mm512_cmple_epi32_mask emulated::at_most
#define _mm512_cmpgt_epi32_mask emulated::greater
#define _mm512_mask_mov_ps emulated::blend_ps
#define _mm512_maskz_mov_ps(where, x) emulated::blend_ps(emulated::set1_ps(0), where, x)
#define _mm512_mask_mov_epi32 emulated::blend
#define _mm512_castps_si512 emulated::as<__m512i>
#define _mm512_castsi512_ps emulated::as<__m512>
#define _mm512_add_epi32 emulated::plus
#define _mm512_and_si512(a, b) ((a) & (b))
#define _mm512_or_si512(a, b) ((a) | (b))
#define _mm512_slli_epi32 emulated::left
#define _mm512_srli_epi32 emulated::right
#define _mm512_cvtepi8_epi32 emulated::signed_wide
#define _mm512_cvtepi32_ps emulated::to_floats
#define _mm512_cvtepu16_epi32 emulated::wide
#define _mm512_cvtepi32_epi16 emulated::narrow
#define _mm512_unpacklo_epi32(a, b) emulated::unpack32(a, b, 0)
#define _mm512_unpackhi_epi32(a, b) emulated::unpack32(a, b, 2)
#define _mm512_unpacklo_epi64(a, b) emulated::unpack64(a, b, 0)
#define _mm512_unpackhi_epi64(a, b) emulated::unpack64(a, b, 1)
#define _mm512_shuffle_i32x4 emulated::shuffle_quarters
#define _mm512_permutex2var_epi16 emulated::permute16

#ifdef EMULATES_BF16
#define __AVX512BF16__ 1
#define _mm512_cvtneps_pbh emulated::nearest_bf16
#define _mm512_dpbf16_ps emulated::plus_pairs
#endif

#ifdef EMULATES_AMX
#define __AMX_BF16__ 1
// The operating system is not asked.
#define syscall(...) 0

namespace emulated {

alignas(64) inline thread_local float tiles[8][16][16];
// Whether the tiles may be used, as by what the thread configured.
inline thread_local uint8_t configured = 0;

static inline void require_tiles() {
  if (!configured) __builtin_trap();
}
static inline void load_tile(int tile, const void* from, long stride) {
  require_tiles();
  for (int row = 0; row < 16; ++row) std::memcpy(tiles[tile][row], (const char*)from + row * stride, 64);
}
static inline void store_tile(int tile, void* to, long stride) {
  require_tiles();
  for (int row = 0; row < 16; ++row) std::memcpy((char*)to + row * stride, tiles[tile][row], 64);
}
static inline void multiply_tiles(int to, int a, int b) {
  require_tiles();
  uint16_t left[16][32], right[16][32];
  std::memcpy(left, tiles[a], sizeof left);
  std::memcpy(right, tiles[b], sizeof right);
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 16; ++column)
        for (int i = 0; i < 2; ++i)
          tiles[to][row][column] += bf16(left[row][2 * k + i]) * bf16(right[k][2 * column + i]);
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, sizeof emulated::tiles[tile])
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbf16ps emulated::multiply_tiles
#define _tile_loadconfig(config) (emulated::configured = *(const uint8_t*)(config))
#define _tile_storeconfig(config) (*(uint8_t*)(config) = emulated::configured)
#define _tile_release() (emulated::configured = 0)
#endif
