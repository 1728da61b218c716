// The two 16-bit floating types on the host: storage and conversions, rounding to nearest even. No branches,
// so that compilers vectorise loops over them. And what curve_math.h asks of its includer.
#pragma once
#include <cstdint>
#include <cstring>

namespace normfuse {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline uint32_t bits_of(float v) { return bit_cast<uint32_t>(v); }
inline float float_of(uint32_t bits) { return bit_cast<float>(bits); }
inline float quotient(float a, float b) { return a / b; }

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

inline float to_float(bfloat16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }

inline bfloat16 to_bfloat16(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// The exponent moves by 112 = 127 - 15. Adding 0.5, whose last bit weighs 2^-24 like a subnormal half's, lets
// the floating-point unit do the subnormals.
constexpr uint32_t kHalfExponentShift = 112u << 23;
constexpr uint32_t kOneHalf = 0x3f000000;

inline float to_float(float16 v) {
  const uint32_t magnitude = v.bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + kHalfExponentShift;
  const uint32_t special = normal + kHalfExponentShift;  // infinity and NaN
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(kOneHalf + magnitude) - 0.5f);
  const uint32_t u = magnitude >= 0x7c00 ? special : magnitude >= 0x0400 ? normal : subnormal;
  return bit_cast<float>(u | uint32_t(v.bits & 0x8000) << 16);
}

inline float16 to_float16(float f) {
  const uint32_t u = bit_cast<uint32_t>(f);
  const uint32_t magnitude = u & 0x7fffffff;
  const uint32_t rounded = (magnitude - kHalfExponentShift + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t normal = rounded > 0x7c00 ? 0x7c00 : rounded;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - kOneHalf;
  const uint32_t h = magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x38800000 ? normal : subnormal;
  return {uint16_t(h | (u >> 16 & 0x8000))};
}

}  // namespace normfuse
