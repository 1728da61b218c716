// The bounded functions f of Dynamic Tanh and Dynamic erf and their derivatives, shared by the host and the device
// kernels. The includer defines NORMFUSE_INLINE, and for float bits_of, float_of and quotient.
//
// Both come from 2^-q with q >= 0 on |u|, which carries its difference to 1 along, so that no digits are lost near
// u = 0 and f never exceeds 1:
//   tanh |u| = (1 - 2^-q) / (1 + 2^-q)  with q = 2 |u| / ln 2
//   erf |u|  = 1 - 2^-q                 with q = -log2(erfc |u|), a polynomial
// In float32 f is within 4 units in its last place, and f' within 4 units in the last place of its largest value; the
// device's quick division may add two. The coefficients are minimax fits, rounded to float32. No branches, so that
// compilers vectorise loops over f. In float64 the standard library computes it.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace normfuse {

// Calls run(curve) with the curve as a constant.
template <class Run>
auto with_curve(Curve curve, const Run& run) {
  if (curve == Curve::kTanh) return run(std::integral_constant<Curve, Curve::kTanh>{});
  return run(std::integral_constant<Curve, Curve::kErf>{});
}

template <class Acc>
struct CurvePoint {
  Acc value;
  Acc slope;
};

NORMFUSE_INLINE float horner(float, float last) { return last; }
template <class... Coefficients>
NORMFUSE_INLINE float horner(float x, float first, Coefficients... rest) {
  return horner(x, rest...) * x + first;
}

// A magnitude, at most `limit`, or NaN. Compared as integers, which compilers vectorise without -fno-trapping-math.
NORMFUSE_INLINE float held_below(float magnitude, float limit) {
  constexpr uint32_t kInfinity = 0x7f800000;
  const uint32_t bits = bits_of(magnitude), most = bits_of(limit), held = bits < most ? bits : most;
  return float_of(bits > kInfinity ? bits : held);
}

// 2^-q = scale + scale * rest for q in [0, 126], with scale a power of two. Adding 1.5 * 2^23 rounds to an integer,
// which is then found in the last bits.
struct PowerOfTwo {
  float scale;
  float rest;

  NORMFUSE_INLINE explicit PowerOfTwo(float q) {
    constexpr float kRound = 12582912.f;
    const float rounded = kRound - q, r = (kRound - rounded) - q;
    scale = float_of((bits_of(rounded) + 127) << 23);
    rest = r * horner(r, 0.69314718f, 0.24022649f, 0.055503573f, 0.0096182376f, 0.0013390735f, 0.00015403512f);
  }
  NORMFUSE_INLINE float value() const { return scale + scale * rest; }
  NORMFUSE_INLINE float to_one() const { return (1 - scale) - scale * rest; }  // 1 - 2^-q
};

template <Curve kCurve>
NORMFUSE_INLINE PowerOfTwo curve_power(float u) {
  if constexpr (kCurve == Curve::kTanh)
    return PowerOfTwo(held_below(std::fabs(u) * 2.88539008f, 126));
  else {
    const float a = held_below(std::fabs(u), 4);
    return PowerOfTwo(a * horner(a, 1.6279070f, 0.91844344f, 0.14832984f, -0.027875349f, 0.00029679350f, 0.0018058830f,
                                 -0.00054966583f, 0.000058728867f));
  }
}

template <Curve kCurve>
NORMFUSE_INLINE float curve_value(float u) {
  const auto power = curve_power<kCurve>(u);
  if constexpr (kCurve == Curve::kTanh)
    return std::copysign(quotient(power.to_one(), 1 + power.value()), u);
  else
    return std::copysign(power.to_one(), u);
}

template <Curve kCurve>
NORMFUSE_INLINE double curve_value(double u) {
  return kCurve == Curve::kTanh ? std::tanh(u) : std::erf(u);
}

// f and f': 1 - tanh^2 = 4 2^-q / (1 + 2^-q)^2 and 2/sqrt(pi) exp(-u^2).
template <Curve kCurve>
NORMFUSE_INLINE CurvePoint<float> curve_point(float u) {
  const auto power = curve_power<kCurve>(u);
  if constexpr (kCurve == Curve::kTanh) {
    const float inverse = quotient(1.f, 1 + power.value());
    return {std::copysign(power.to_one() * inverse, u), 4 * power.value() * inverse * inverse};
  } else {
    const PowerOfTwo bell(held_below(u * u * 1.44269504f, 126));
    return {std::copysign(power.to_one(), u), 1.12837917f * bell.value()};
  }
}

template <Curve kCurve>
NORMFUSE_INLINE CurvePoint<double> curve_point(double u) {
  const double value = curve_value<kCurve>(u);
  if constexpr (kCurve == Curve::kTanh)
    return {value, 1 - value * value};
  else
    return {value, 1.1283791670955126 * std::exp(-u * u)};
}

}  // namespace normfuse
