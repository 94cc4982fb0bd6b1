// What the kernel files share: element types, and packs of neighbours along the channels.
//
// Every kernel is a template over its element types and VEC, the number of neighbouring channels that a thread handles.
// Arrays are channels-last, so a pack is one run of memory: VEC > 1 is chosen such that the narrowest type of a kernel
// fills one 16-byte access; VEC = 1 serves channel counts that do not divide (the three of an image).
// Halves are for storage only; arithmetic is float, and double for double.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T> struct Arithmetic { typedef float type; };
template <> struct Arithmetic<double> { typedef double type; };

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T narrow(typename Arithmetic<T>::type x) { return x; }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// The unsigned word that moves BYTES at once; more than 16 bytes go as several words.
template <int BYTES> struct Word { typedef uint4 type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<4> { typedef unsigned int type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<1> { typedef unsigned char type; };

template <typename T, int VEC> struct Pack {
    static const int BYTES = VEC * sizeof(T);
    static const int WORDS = BYTES > 16 ? BYTES / 16 : 1;
    typedef typename Word<BYTES>::type word;

    union {
        word words[WORDS];
        T values[VEC];
    };

    __device__ __forceinline__ Pack() {}

    __device__ __forceinline__ void load(const T* source) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = reinterpret_cast<const word*>(source)[i];
    }

    __device__ __forceinline__ void store(T* target) const {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) reinterpret_cast<word*>(target)[i] = words[i];
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = word();
    }
};
