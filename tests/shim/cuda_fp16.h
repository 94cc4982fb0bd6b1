// IEEE binary16 in software, round to nearest even.
#pragma once

#include "cuda_shim.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half h)
{
    const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
    float value;
    if (exponent == 31)
        value = mantissa ? NAN : INFINITY;
    else if (exponent == 0)
        value = std::ldexp(float(mantissa), -24);
    else
        value = std::ldexp(float(1024 + mantissa), exponent - 25);
    return std::copysign(value, h.bits & 0x8000 ? -1.0f : 1.0f);
}

inline __half __float2half_rn(float x)
{
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    uint16_t bits;
    if (size != size) {
        bits = 0x7e00;
    } else if (size >= 65520.0f) {
        bits = 0x7c00;
    } else if (size < 6.103515625e-05f) {  // subnormal: a multiple of 2^-24; 1024 of them are the first normal number
        bits = uint16_t(std::nearbyint(std::ldexp(size, 24)));
    } else {
        int exponent;
        const float fraction = std::frexp(size, &exponent);  // size = fraction * 2^exponent, 1/2 <= fraction < 1
        bits = uint16_t((exponent + 14) << 10) + uint16_t(std::nearbyint(std::ldexp(fraction, 11))) - 1024;
    }
    return __half{uint16_t(sign | bits)};
}
