// Kernels that test the shim itself.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void from_float(float x, __half& y) { y = __float2half_rn(x); }
__device__ inline void from_float(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

template <typename T> __global__ void to_floats(const T* in, float* out, int count)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = to_float(in[i]);
}

template <typename T> __global__ void from_floats(const float* in, T* out, int count)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) from_float(in[i], out[i]);
}

// Every thread reads what its neighbours wrote before the barrier, twice.
template <int ROUNDS> __global__ void rotate(int* values)
{
    __shared__ int shared[256];
    const int i = threadIdx.x, base = blockIdx.x * blockDim.x;
    int value = values[base + i];
    for (int round = 0; round < ROUNDS; ++round) {
        shared[i] = value;
        __syncthreads();
        value = shared[(i + 1) % blockDim.x];
        __syncthreads();
    }
    values[base + i] = value;
}

// Threads of odd number miss the barrier.
template <int> __global__ void unequal(int* values)
{
    if (threadIdx.x % 2 == 0) __syncthreads();
    values[threadIdx.x] = 1;
}

// Writes one element behind the end: what AddressSanitizer must find.
template <int> __global__ void overrun(float* values, int count)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= count) values[i] = 0;
}
