// Exponential, logarithm and tanh of vectors. The error bounds were measured.
#pragma once
#include <iterator>

#include "vec.h"

namespace fused_attn::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

// The constants of a type of lanes, float or double.
template <class T>
struct FloatTraits;

template <>
struct FloatTraits<float> {
  static constexpr float kLowest = -3.40282346638528859812e+38f;
  static constexpr float kInfinity = __builtin_inff();
  static constexpr float kLeastNormal = 0x1p-126f;
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23; t + kRoundMagic - kRoundMagic is t as an integer
  static constexpr int kMantissaBits = 23;
  static constexpr float kExp2Lowest = -126.0f;  // below this number, exp2 returns 0
  // The minimax polynomial for 2^x over [-0.5, 0.5], highest degree first. Its relative error is 2e-8. A polynomial of
  // one degree less has the error 1.6e-7 and is not measurably faster.
  static constexpr float kExp2Coefficients[] = {
      0.000153533621f, 0.00133988746f, 0.00961843736f, 0.0555033247f, 0.240226479f, 0.693147203f, 1.0f};
  // A shorter polynomial with the relative error 2.9e-6, for probabilities that are rounded to 16 bits later.
  static constexpr float kExp2CoarseCoefficients[] = {0.00958285324f, 0.0559064259f, 0.240240986f, 0.693124193f, 1.0f};
};

template <>
struct FloatTraits<double> {
  static constexpr double kLowest = -1.79769313486231570815e+308;
  static constexpr double kInfinity = __builtin_inf();
  static constexpr double kLeastNormal = 0x1p-1022;
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52, see FloatTraits<float>
  static constexpr int kMantissaBits = 52;
  static constexpr double kExp2Lowest = -1022.0;
  // The Taylor polynomial, highest degree first: the coefficients are ln(2)^k / k!. The first omitted term is 4e-18 at
  // 0.5.
  static constexpr double kExp2Coefficients[] = {1.3691488853904128881e-12, 2.5678435993488205142e-11,
                                                 4.4455382718708114976e-10, 7.0549116208011233299e-9,
                                                 1.0178086009239699728e-7,  1.3215486790144309488e-6,
                                                 1.5252733804059840280e-5,  1.5403530393381609954e-4,
                                                 1.3333558146428443423e-3,  9.6181291076284771620e-3,
                                                 5.5504108664821579953e-2,  2.4022650695910071233e-1,
                                                 6.9314718055994530942e-1,  1.0};
};

// The polynomial in x with these coefficients, highest degree first.
template <class T, int kTerms>
FA_INLINE Vec<T> horner(Vec<T> x, const T (&coefficients)[kTerms]) {
  Vec<T> y = broadcast<T>(coefficients[0]);
  FA_UNROLL
  for (int k = 1; k < kTerms; ++k) y = y * x + coefficients[k];
  return y;
}

#if defined(__AVX512F__)
// t, rounded to the nearest integer.
FA_INLINE Vec<float> round_to_integer(Vec<float> t) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_roundscale_ps(0xffff, reinterpret_cast<__m512>(t), 0));
}

// t, rounded to the nearest integer.
FA_INLINE Vec<double> round_to_integer(Vec<double> t) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_roundscale_pd(0xff, reinterpret_cast<__m512d>(t), 0));
}

// mantissa * 2^integer, or 0 in lanes where t < lowest. If t is NaN, the comparison is false, so the NaN is not lost.
FA_INLINE Vec<float> scale_or_zero(Vec<float> mantissa, Vec<float> integer, Vec<float> t, float lowest) {
  const __mmask16 normal = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(t), _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(mantissa), reinterpret_cast<__m512>(integer)));
}

// The same for lanes of double.
FA_INLINE Vec<double> scale_or_zero(Vec<double> mantissa, Vec<double> integer, Vec<double> t, double lowest) {
  const __mmask8 normal = _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(t), _mm512_set1_pd(lowest), _CMP_NLT_UQ);
  return reinterpret_cast<Vec<double>>(
      _mm512_maskz_scalef_pd(normal, reinterpret_cast<__m512d>(mantissa), reinterpret_cast<__m512d>(integer)));
}
#endif

// 2^t for t < 127 (float) or t < 1023 (double). The relative error is 1.2e-7 in float (3e-6 if kCoarse), and 3e-16 in
// double. Exact cases: 2^0 is 1, and NaN gives NaN. Below kExp2Lowest and at -inf the result is 0, because denormal
// results would be slow.
template <class T, bool kCoarse = false>
FA_INLINE Vec<T> exp2(Vec<T> t) {
  using Traits = FloatTraits<T>;
  const auto polynomial = [](Vec<T> fraction) {
    if constexpr (kCoarse && sizeof(T) == 4) {
      return horner<T>(fraction, Traits::kExp2CoarseCoefficients);
    } else {
      return horner<T>(fraction, Traits::kExp2Coefficients);
    }
  };
#if defined(__AVX512F__)
  const Vec<T> integer = round_to_integer(t);
  return scale_or_zero(polynomial(t - integer), integer, t, Traits::kExp2Lowest);
#else
  const Vec<T> lowest = broadcast<T>(Traits::kExp2Lowest);
  const Vec<T> clamped = max<T>(lowest, t);
  const Vec<T> rounded = clamped + Traits::kRoundMagic;
  // The low bits of `rounded` are the integer part of t. The shift moves them to where a float has its exponent, and
  // moves the bits of the magic number out.
  const IntVec<T> exponent = reinterpret_cast<IntVec<T>>(rounded) << Traits::kMantissaBits;
  const Vec<T> mantissa = polynomial(clamped - (rounded - Traits::kRoundMagic));
  const Vec<T> power = reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(mantissa) + exponent);
  return select<T>(t > lowest, power, max<T>(Vec<T>{}, t));  // max(0, t) is 0 here, or NaN if t is NaN
#endif
}

#if defined(__AVX512BF16__)
// 2^t for results that are rounded to bfloat16 next. The relative error is 1.0e-4, a twentieth of the error of the
// rounding to bfloat16. That rounding also turns denormal numbers into zero, so there is no test for small t as in
// exp2. The bound of -1000 is there because -inf would become NaN.
FA_INLINE Vec<float> exp2_to_round(Vec<float> t) {
  constexpr float kCoefficients[] = {0.0550090596f, 0.242210969f, 0.693282902f, 1.0f};
  // The intrinsic has a mask, which selects all lanes, because GCC 12 warns about the one without.
  const __m512 bounded = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-1000), reinterpret_cast<__m512>(t));
  const Vec<float> integer = round_to_integer(reinterpret_cast<Vec<float>>(bounded));
  const Vec<float> mantissa = horner<float>(reinterpret_cast<Vec<float>>(bounded) - integer, kCoefficients);
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(mantissa), reinterpret_cast<__m512>(integer)));
}
#endif

// 2^t - 1 for t between -126 and 127. The error is relative to the result even where t is near 0: the terms of the
// polynomial have no constant there, from which 1 would be subtracted.
template <class T>
FA_INLINE Vec<T> exp2_minus_1(Vec<T> t) {
  using Traits = FloatTraits<T>;
#if defined(__AVX512F__)
  const Vec<T> integer = round_to_integer(t);
  const Vec<T> power = scale_or_zero(broadcast<T>(T(1)), integer, t, Traits::kExp2Lowest);
#else
  const Vec<T> rounded = t + Traits::kRoundMagic;
  const Vec<T> integer = rounded - Traits::kRoundMagic;
  const IntVec<T> exponent = reinterpret_cast<IntVec<T>>(rounded) << Traits::kMantissaBits;
  const Vec<T> power = reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(broadcast<T>(T(1))) + exponent);
#endif
  const Vec<T> fraction = t - integer;
  constexpr int kTerms = std::size(Traits::kExp2Coefficients) - 1;
  Vec<T> terms = broadcast<T>(Traits::kExp2Coefficients[0]);
  FA_UNROLL
  for (int k = 1; k < kTerms; ++k) terms = terms * fraction + Traits::kExp2Coefficients[k];
  return power * (terms * fraction) + (power - T(1));
}

// 1 / x, with an error of 1 ulp, for x from 1 to 2^120.
FA_INLINE Vec<double> reciprocal(Vec<double> x) { return 1.0 / x; }
FA_INLINE Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  // The first guess has 14 bits. A division would take as long as ten of these instructions.
  const auto guess = reinterpret_cast<Vec<float>>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// tanh(x) with an error of 3 ulp, or 4 without fused multiply-adds. The error is relative to the result even where x is
// near 0, because softcap must leave small logits as they are.
template <class T>
FA_INLINE Vec<T> tanh(Vec<T> x) {
  // From 20 on, tanh rounds to 1 in float and in double. The bounds keep the argument of exp2_minus_1 in its range. NaN
  // stays NaN.
  const Vec<T> bounded = max<T>(broadcast<T>(T(-20)), min<T>(broadcast<T>(T(20)), x));
  const Vec<T> e = exp2_minus_1<T>(bounded * T(2 * kLog2E));
  const Vec<T> t = e * reciprocal(e + T(2));
  return max<T>(broadcast<T>(T(-1)), min<T>(broadcast<T>(T(1)), t));
}

// The logarithm and the exponential of a single number.
FA_INLINE float natural_log(float x) { return __builtin_logf(x); }
FA_INLINE double natural_log(double x) { return __builtin_log(x); }
FA_INLINE float natural_exp(float x) { return __builtin_expf(x); }
FA_INLINE double natural_exp(double x) { return __builtin_exp(x); }

// The natural logarithm of positive, normal numbers, with an error of 1 ulp. Infinity gives infinity, and NaN gives
// NaN.
FA_INLINE Vec<float> log(Vec<float> x) {
  // The minimax polynomial for (log(1 + f) - f + f^2 / 2) / f^3 over the range of f, highest degree first. It causes a
  // relative error of 6e-9 in the logarithm.
  constexpr float kCoefficients[] = {-0.0763449967f, 0.12761578f,  -0.131601825f, 0.142017573f,
                                     -0.166233569f,  0.200012267f, -0.250008196f, 0.333333313f};
  constexpr float kLog2High = 0x1.62e4p-1f;  // has so few bits that its product with an exponent is exact
  constexpr float kLog2Low = 1.42860677e-6f;
  // The number is split into x = (1 + f) 2^e, with 1 + f between sqrt(1/2) and sqrt(2). If x is near 1, then e is 0, so
  // the small result is not the difference of two large numbers.
  constexpr int32_t kRootOfHalf = 0x3f3504f3;
  const IntVec<float> bits = reinterpret_cast<IntVec<float>>(x);
  const IntVec<float> exponent = (bits - kRootOfHalf) >> 23;
  const Vec<float> f = reinterpret_cast<Vec<float>>(bits - (exponent << 23)) - 1.0f;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> z = f * f;
  const Vec<float> small = z * f * horner<float>(f, kCoefficients) + (e * kLog2Low - 0.5f * z);
  return select<float>(x < FloatTraits<float>::kInfinity, e * kLog2High + (f + small), x);
}

// The natural logarithm of each lane, one lane after another, because float64 need not be fast.
FA_INLINE Vec<double> log(Vec<double> x) {
  FA_UNROLL
  for (int i = 0; i < kLanes<double>; ++i) x[i] = natural_log(x[i]);
  return x;
}

}  // namespace
}  // namespace fused_attn::cpu
