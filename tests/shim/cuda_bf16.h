// bfloat16 in software: the upper half of a float, round to nearest even.
#pragma once

#include "cuda_shim.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 b)
{
    const uint32_t bits = uint32_t(b.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x)
{
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return __nv_bfloat16{0x7fff};
    bits += 0x7fff + (bits >> 16 & 1);
    return __nv_bfloat16{uint16_t(bits >> 16)};
}
