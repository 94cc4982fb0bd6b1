// The array operations of heads; the NumPy reference is head.py.
//
// Outputs are small (a row of classes a sample), so that what counts is one launch instead of ten. Arithmetic is in the
// type of the outputs, float or double.

#include "common.cuh"

enum Loss { CROSS_ENTROPY = 0, SQUARED_ERROR = 1 };

enum { THREADS = 32 };  // of a block of `scaled_error`

// The largest value, or the sum, of all threads of a block, in a fixed order; all of them must take part.
template <typename A, bool LARGEST> __device__ __forceinline__ A over_block(A value)
{
    __shared__ A values[THREADS];
    const int thread = threadIdx.x;
    values[thread] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half) {
            const A other = values[thread + half];
            if (!LARGEST)
                values[thread] += other;
            else if (other > values[thread])
                values[thread] = other;
        }
        __syncthreads();
    }
    const A result = values[0];
    __syncthreads();
    return result;
}

// error <- down * scale * dL/dz at down * z + bias, one block a row; z is scratch then, and error may be the same array.
// Cross-entropy: T (softmax(z / T) - target), T the temperature.
template <typename A, typename E, int LOSS>
__global__ void scaled_error(
    A* z, E* error, const A* __restrict__ bias, const A* __restrict__ target, const A* __restrict__ scale, A temperature,
    A down, int classes)
{
    z += size_t(blockIdx.x) * classes;
    error += size_t(blockIdx.x) * classes;
    target += size_t(blockIdx.x) * classes;
    const A factor = down * scale[blockIdx.x];
    if (LOSS == SQUARED_ERROR) {
        for (int c = threadIdx.x; c < classes; c += THREADS)
            error[c] = narrow<E>(factor * (down * z[c] + (bias == nullptr ? A(0) : bias[c]) - target[c]));
        return;
    }
    const A inverse = A(1) / temperature;
    A largest = A(-3e38);  // a thread without classes must not win
    for (int c = threadIdx.x; c < classes; c += THREADS) {
        z[c] = (down * z[c] + (bias == nullptr ? A(0) : bias[c])) * inverse;
        if (z[c] > largest) largest = z[c];
    }
    largest = over_block<A, true>(largest);
    A sum = 0;
    for (int c = threadIdx.x; c < classes; c += THREADS) {
        z[c] = exp(z[c] - largest);
        sum += z[c];
    }
    sum = over_block<A, false>(sum);
    for (int c = threadIdx.x; c < classes; c += THREADS)
        error[c] = narrow<E>(factor * temperature * (z[c] / sum - target[c]));
}

// force (n, map_height, map_width, C) = adjoint of the window means of s (n, height, width, C), zero outside of all windows,
// or += it with ADD. One thread a pack: with ADD of the windows' units, `columns` of them in a row, else of all.
template <typename A, bool ADD, int VEC>
__global__ void spread(
    const A* __restrict__ s, A* __restrict__ force, int map_height, int map_width, int height, int width, int columns,
    int groups, int p)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= columns * groups) return;
    const int y = blockIdx.y, x = item / groups, group = item - x * groups, right = groups * VEC;
    const size_t sample = blockIdx.z;
    force += ((sample * map_height + y) * map_width + x) * right + group * VEC;
    Pack<A, VEC> share, sum;
    share.clear();
    sum.clear();
    if (ADD) sum.load(force);
    if (y / p < height && x / p < width)
        share.load(s + ((sample * height + y / p) * width + x / p) * right + group * VEC);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum.values[i] += share.values[i] * (A(1) / A(p * p));
    sum.store(force);
}
