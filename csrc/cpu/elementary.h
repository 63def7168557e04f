// Elementary functions on vectors, with their measured error bounds.
#pragma once
#include "vec.h"

namespace fused_attn::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

template <class T>
struct FloatTraits;

template <>
struct FloatTraits<float> {
  static constexpr float kLowest = -3.40282346638528859812e+38f;
  static constexpr float kInfinity = __builtin_inff();
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissaBits = 23;
  static constexpr float kExp2Lowest = -126.0f;
  // Minimax over [-0.5, 0.5], highest degree first; 2e-8 before rounding. Degree 5 (1.6e-7) saves nothing measurable.
  static constexpr float kExp2Coefficients[] = {
      0.000153533621f, 0.00133988746f, 0.00961843736f, 0.0555033247f, 0.240226479f, 0.693147203f, 1.0f};
  // 2.9e-6, for numbers that end in 16 bits.
  static constexpr float kExp2CoarseCoefficients[] = {0.00958285324f, 0.0559064259f, 0.240240986f, 0.693124193f, 1.0f};
};

template <>
struct FloatTraits<double> {
  static constexpr double kLowest = -1.79769313486231570815e+308;
  static constexpr double kInfinity = __builtin_inf();
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissaBits = 52;
  static constexpr double kExp2Lowest = -1022.0;
  // Taylor, ln(2)^k / k!: the first term left out is 4e-18 at 0.5.
  static constexpr double kExp2Coefficients[] = {1.3691488853904128881e-12, 2.5678435993488205142e-11,
                                                 4.4455382718708114976e-10, 7.0549116208011233299e-9,
                                                 1.0178086009239699728e-7,  1.3215486790144309488e-6,
                                                 1.5252733804059840280e-5,  1.5403530393381609954e-4,
                                                 1.3333558146428443423e-3,  9.6181291076284771620e-3,
                                                 5.5504108664821579953e-2,  2.4022650695910071233e-1,
                                                 6.9314718055994530942e-1,  1.0};
};

template <class T, int kTerms>
FA_INLINE Vec<T> horner(Vec<T> x, const T (&coefficients)[kTerms]) {
  Vec<T> y = broadcast<T>(coefficients[0]);
  FA_UNROLL
  for (int k = 1; k < kTerms; ++k) y = y * x + coefficients[k];
  return y;
}

#if defined(__AVX512F__)
FA_INLINE Vec<float> round_to_integer(Vec<float> t) {
  return reinterpret_cast<Vec<float>>(_mm512_maskz_roundscale_ps(0xffff, reinterpret_cast<__m512>(t), 0));
}

FA_INLINE Vec<double> round_to_integer(Vec<double> t) {
  return reinterpret_cast<Vec<double>>(_mm512_maskz_roundscale_pd(0xff, reinterpret_cast<__m512d>(t), 0));
}

// mantissa * 2^integer, or 0 where t < lowest. A NaN in t is not below anything.
FA_INLINE Vec<float> scale_or_zero(Vec<float> mantissa, Vec<float> integer, Vec<float> t, float lowest) {
  const __mmask16 normal = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(t), _mm512_set1_ps(lowest), _CMP_NLT_UQ);
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(normal, reinterpret_cast<__m512>(mantissa), reinterpret_cast<__m512>(integer)));
}

FA_INLINE Vec<double> scale_or_zero(Vec<double> mantissa, Vec<double> integer, Vec<double> t, double lowest) {
  const __mmask8 normal = _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(t), _mm512_set1_pd(lowest), _CMP_NLT_UQ);
  return reinterpret_cast<Vec<double>>(
      _mm512_maskz_scalef_pd(normal, reinterpret_cast<__m512d>(mantissa), reinterpret_cast<__m512d>(integer)));
}
#endif

// 2^t for t < 127 (1023 in double). The relative error is 1.2e-7 in float (3e-6 if kCoarse), and 3e-16 in double. The
// result is exactly 1 at 0, exactly 0 at -inf and below kExp2Lowest, so that no denormal arises, and NaN at every NaN.
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
  // This shift moves the bits of the magic number out at the top. The integer part stays, in the place of the exponent.
  const IntVec<T> exponent = reinterpret_cast<IntVec<T>>(rounded) << Traits::kMantissaBits;
  const Vec<T> mantissa = polynomial(clamped - (rounded - Traits::kRoundMagic));
  const Vec<T> power = reinterpret_cast<Vec<T>>(reinterpret_cast<IntVec<T>>(mantissa) + exponent);
  return select<T>(t > lowest, power, max<T>(Vec<T>{}, t));  // the last max is 0, or NaN for NaN
#endif
}

#if defined(__AVX512BF16__)
// exp2 for numbers that are rounded to bfloat16 next. The relative error is 1.0e-4, a twentieth of the error of that
// rounding. The rounding turns denormal numbers into zero. So the only test left here keeps -inf from becoming NaN.
FA_INLINE Vec<float> exp2_to_round(Vec<float> t) {
  constexpr float kCoefficients[] = {0.0550090596f, 0.242210969f, 0.693282902f, 1.0f};
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-1000), reinterpret_cast<__m512>(t));
  const Vec<float> integer = round_to_integer(reinterpret_cast<Vec<float>>(bounded));
  const Vec<float> mantissa = horner<float>(reinterpret_cast<Vec<float>>(bounded) - integer, kCoefficients);
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(mantissa), reinterpret_cast<__m512>(integer)));
}
#endif

// The error is 3 ulp. Near 0 the relative accuracy stays, because softcap must be the identity there.
template <class T>
FA_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> z = x * x;
  Vec<T> near_zero;
  if constexpr (sizeof(T) == 4) {
    constexpr float kOdd[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                              -3.33332819422e-1f};
    near_zero = x + x * z * horner<T>(z, kOdd);
  } else {
    constexpr double kNumerator[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3};
    constexpr double kDenominator[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3,
                                       4.84406305325125486048e3};
    near_zero = x + x * z * (horner<T>(z, kNumerator) / horner<T>(z, kDenominator));
  }
  const Vec<T> magnitude = select<T>(x < 0, -x, x);
  // Beyond 20 the result is 1 in either type. The clamp keeps exp2 in its range. A NaN passes through.
  const Vec<T> bounded = min<T>(broadcast<T>(T(20)), magnitude);
  const Vec<T> e = exp2<T>(bounded * T(2 * kLog2E));
  const Vec<T> far = T(1) - T(2) / (e + T(1));
  return select<T>(magnitude < T(0.625), near_zero, select<T>(x < 0, -far, far));
}

FA_INLINE float natural_log(float x) { return __builtin_logf(x); }
FA_INLINE double natural_log(double x) { return __builtin_log(x); }
FA_INLINE float natural_exp(float x) { return __builtin_expf(x); }
FA_INLINE double natural_exp(double x) { return __builtin_exp(x); }

// The natural logarithm of a positive, normal number. The error is 1 ulp. Infinity gives infinity, and NaN gives NaN.
FA_INLINE Vec<float> log(Vec<float> x) {
  // (log(1 + f) - f + f^2 / 2) / f^3, minimax over the range of f, highest degree first; 6e-9 of the logarithm.
  constexpr float kCoefficients[] = {-0.0763449967f, 0.12761578f,  -0.131601825f, 0.142017573f,
                                     -0.166233569f,  0.200012267f, -0.250008196f, 0.333333313f};
  constexpr float kLog2High = 0x1.62e4p-1f;  // few enough bits for exact products with an exponent
  constexpr float kLog2Low = 1.42860677e-6f;
  // x = (1 + f) 2^e, with 1 + f from sqrt(1/2) to sqrt(2). Near 1, e is 0, so nothing cancels.
  constexpr int32_t kRootOfHalf = 0x3f3504f3;
  const IntVec<float> bits = reinterpret_cast<IntVec<float>>(x);
  const IntVec<float> exponent = (bits - kRootOfHalf) >> 23;
  const Vec<float> f = reinterpret_cast<Vec<float>>(bits - (exponent << 23)) - 1.0f;
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>);
  const Vec<float> z = f * f;
  const Vec<float> small = z * f * horner<float>(f, kCoefficients) + (e * kLog2Low - 0.5f * z);
  return select<float>(x < FloatTraits<float>::kInfinity, e * kLog2High + (f + small), x);
}

FA_INLINE Vec<double> log(Vec<double> x) {
  FA_UNROLL
  for (int i = 0; i < kLanes<double>; ++i) x[i] = natural_log(x[i]);
  return x;
}

}  // namespace
}  // namespace fused_attn::cpu
