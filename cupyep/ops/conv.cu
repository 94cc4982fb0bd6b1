// The array operations of one convolution with pooling; the NumPy reference is conv.py, columns.py and pooling.py.
//
// No atomics: every element of an output is written by exactly one thread, so results repeat bit for bit. Grid: x runs
// over (column of the map, pack of channels), y over the rows of the map, z over the samples of the chunk. Indices within
// a sample are 32-bit (the launch code refuses larger ones), only the offset of a sample is 64-bit.
//
// Kernel size, stride and pooling window are run-time numbers, but the usual ones are repeated as literals before an
// inlined body, which lets the compiler unroll it.

#include "common.cuh"

enum Pooling { NONE = 0, MAX = 1, AVERAGE = 2 };

// --- Columns -------------------------------------------------------------------------------------------------------

// Write `value`, pixel (fy, fx) of a frame, to each window of the column matrix that sees it. The thread stays at a
// pixel, so that it is read (and its winner compared) once and not kernel^2 times; no two pixels share an element.
template <typename T, int VEC>
__device__ __forceinline__ void to_windows(
    const Pack<T, VEC>& value, T* columns, int fy, int fx, int group, int groups, int kernel, int stride, int height,
    int width)
{
#pragma unroll
    for (int ky = 0; ky < kernel; ++ky) {
        const int y = fy - ky;
        if (y < 0 || y % stride != 0 || y / stride >= height) continue;
#pragma unroll
        for (int kx = 0; kx < kernel; ++kx) {
            const int x = fx - kx;
            if (x < 0 || x % stride != 0 || x / stride >= width) continue;
            const int row = y / stride * width + x / stride;
            value.store(columns + (((row * kernel + ky) * kernel + kx) * groups + group) * VEC);
        }
    }
}

// Column matrix (n, out_height, out_width, kernel, kernel, C) of s (n, height, width, C), zero padding implicit.
// Frame: the pixels that any window sees, padding included.
template <typename T, int VEC>
__global__ void im2col(
    const T* __restrict__ s, T* __restrict__ columns, int height, int width, int groups, int kernel, int stride,
    int padding, int out_height, int out_width)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= ((out_width - 1) * stride + kernel) * groups) return;
    const int fy = blockIdx.y, fx = item / groups, group = item - fx * groups;
    const int y = fy - padding, x = fx - padding;
    const size_t sample = blockIdx.z;
    Pack<T, VEC> value;
    if (0 <= y && y < height && 0 <= x && x < width)
        value.load(s + (sample * height * width + y * width + x) * groups * VEC + group * VEC);
    else
        value.clear();
    columns += sample * out_height * out_width * kernel * kernel * groups * VEC;
    if (kernel == 3 && stride == 1)
        to_windows(value, columns, fy, fx, group, groups, 3, 1, out_height, out_width);
    else
        to_windows(value, columns, fy, fx, group, groups, kernel, stride, out_height, out_width);
}

// The same as rows of `packs` packs where C is none of these (the three channels of an image): zeros fill up the last. One
// thread writes one pack. What a window sees of a row of the image is one run of kernel * C numbers.
template <typename T, int VEC>
__global__ void im2col_rows(
    const T* __restrict__ s, T* __restrict__ columns, int height, int width, int channels, int kernel, int stride,
    int padding, int out_height, int out_width, int packs)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= out_width * packs) return;
    const int x = item / packs, pack = item - x * packs, run = kernel * channels, line = width * channels;
    const size_t sample = blockIdx.z;
    int ky = pack * VEC / run, at = pack * VEC - ky * run;
    int y = blockIdx.y * stride - padding + ky;
    const int first = (x * stride - padding) * channels;
    s += sample * height * line;
    Pack<T, VEC> value;
    value.clear();
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const int place = first + at;
        if (ky < kernel && 0 <= y && y < height && 0 <= place && place < line) value.values[i] = s[y * line + place];
        if (++at == run) at = 0, ++ky, ++y;
    }
    value.store(columns + (((sample * out_height + blockIdx.y) * out_width + x) * packs + pack) * VEC);
}

// --- The adjoint of pooling ----------------------------------------------------------------------------------------

// Read one pack of U(s) at (y, x) of a sample's map: s at its winner (MAX) or its even share (AVERAGE), zero in the rows
// and columns that fill no window. s and winners point to the sample.
template <typename T, int VEC, int POOL>
__device__ __forceinline__ Pack<T, VEC> unpooled(
    const T* s, const unsigned char* winners, int y, int x, int group, int groups, int height, int width, int p)
{
    Pack<T, VEC> value;
    const int py = y / p, px = x / p;
    value.clear();
    if (py >= height || px >= width) return value;
    const int at = ((py * width + px) * groups + group) * VEC;
    value.load(s + at);
    if (POOL == MAX) {
        const int offset = (y - py * p) * p + (x - px * p);
        Pack<unsigned char, VEC> winner;
        winner.load(winners + at);
#pragma unroll
        for (int i = 0; i < VEC; ++i)
            if (winner.values[i] != offset) value.values[i] = narrow<T>(0);
    } else if (POOL == AVERAGE) {
        typedef typename Arithmetic<T>::type A;
        const A share = A(1) / A(p * p);
#pragma unroll
        for (int i = 0; i < VEC; ++i) value.values[i] = narrow<T>(widen(value.values[i]) * share);
    }
    return value;
}

// U(s) as a map (n, map_height, map_width, K), for the weight gradient and the product-first top-down map.
template <typename T, int VEC, int POOL>
__global__ void unpool(
    const T* __restrict__ s, const unsigned char* __restrict__ winners, T* __restrict__ map, int map_height,
    int map_width, int height, int width, int groups, int p)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= map_width * groups) return;
    const int y = blockIdx.y, x = item / groups, group = item - x * groups;
    const size_t sample = blockIdx.z, start = sample * height * width * groups * VEC;
    s += start;
    if (POOL == MAX) winners += start;
    Pack<T, VEC> value;
    if (p == 2)
        value = unpooled<T, VEC, POOL>(s, winners, y, x, group, groups, height, width, 2);
    else
        value = unpooled<T, VEC, POOL>(s, winners, y, x, group, groups, height, width, p);
    value.store(map + ((sample * map_height + y) * map_width + x) * groups * VEC + group * VEC);
}

template <typename T, int VEC, int POOL>
__device__ __forceinline__ void unpool_to_windows(
    const T* s, const unsigned char* winners, T* columns, int fy, int fx, int group, int groups, int kernel, int stride,
    int padding, int out_height, int out_width, int map_height, int map_width, int height, int width, int p)
{
    const int y = fy - (kernel - 1 - padding), x = fx - (kernel - 1 - padding);
    Pack<T, VEC> value;
    if (y >= 0 && x >= 0 && y % stride == 0 && x % stride == 0 && y / stride < map_height && x / stride < map_width)
        value = unpooled<T, VEC, POOL>(s, winners, y / stride, x / stride, group, groups, height, width, p);
    else
        value.clear();
    to_windows(value, columns, fy, fx, group, groups, kernel, 1, out_height, out_width);
}

// Column matrix (n, out_height, out_width, kernel, kernel, K) of U(s) for the top-down product, straight from the pooled
// s (n, height, width, K) and its winners; the map (map_height, map_width) between them never exists. A strided
// convolution's adjoint spreads the map's pixels `stride` apart.
template <typename T, int VEC, int POOL>
__global__ void unpool_im2col(
    const T* __restrict__ s, const unsigned char* __restrict__ winners, T* __restrict__ columns, int out_height,
    int out_width, int groups, int kernel, int stride, int padding, int map_height, int map_width, int height, int width,
    int p)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= (out_width + kernel - 1) * groups) return;
    const int fy = blockIdx.y, fx = item / groups, group = item - fx * groups;
    const size_t sample = blockIdx.z;
    const size_t start = sample * height * width * groups * VEC;
    const int usual = POOL == NONE ? 1 : 2;
    s += start;
    if (POOL == MAX) winners += start;
    columns += sample * out_height * out_width * kernel * kernel * groups * VEC;
    if (kernel == 3 && stride == 1 && p == usual)
        unpool_to_windows<T, VEC, POOL>(
            s, winners, columns, fy, fx, group, groups, 3, 1, padding, out_height, out_width, map_height, map_width,
            height, width, usual);
    else
        unpool_to_windows<T, VEC, POOL>(
            s, winners, columns, fy, fx, group, groups, kernel, stride, padding, out_height, out_width, map_height,
            map_width, height, width, p);
}

// --- Pooling -------------------------------------------------------------------------------------------------------

// Pool one window of u and, for MAX, find its winner: the first unit in row order that is not below the maximum by more
// than margin * max(|maximum|, 1). Units of flat image areas are equal but for rounding, and that depends on the batch. u
// points to the window's first unit; a unit below lies `down` elements further, a unit to the right `right`. A NaN is the
// maximum, so that divergence stays visible.
template <typename U, int VEC, int POOL>
__device__ __forceinline__ void pool_window(
    const U* u, int down, int right, int p, typename Arithmetic<U>::type margin,
    typename Arithmetic<U>::type (&pooled)[VEC], Pack<unsigned char, VEC>& winner)
{
    typedef typename Arithmetic<U>::type A;
    Pack<U, VEC> unit;
    unit.load(u);
    winner.clear();
#pragma unroll
    for (int i = 0; i < VEC; ++i) pooled[i] = widen(unit.values[i]);
#pragma unroll
    for (int dy = 0; dy < p; ++dy) {
#pragma unroll
        for (int dx = 0; dx < p; ++dx) {
            if (dy == 0 && dx == 0) continue;
            unit.load(u + dy * down + dx * right);
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const A value = widen(unit.values[i]);
                if (POOL == AVERAGE)
                    pooled[i] += value;
                else if (value > pooled[i] || value != value)
                    pooled[i] = value;
            }
        }
    }
    if (POOL == AVERAGE) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) pooled[i] *= A(1) / A(p * p);
    }
#pragma unroll
    for (int offset = POOL == MAX ? p * p - 2 : -1; offset >= 0; --offset) {
        unit.load(u + offset / p * down + offset % p * right);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {  // the number of units from here on that are passed over: one more, or none
            const A size = pooled[i] < A(0) ? -pooled[i] : pooled[i];
            const A least = pooled[i] - margin * (size < A(1) ? A(1) : size);
            winner.values[i] = widen(unit.values[i]) < least ? winner.values[i] + 1 : 0;
        }
    }
}

// out = P(u) + bias and, for MAX, its winners, from u (n, map_height, map_width, K). Without pooling out may be u.
template <typename U, typename D, int VEC, int POOL>
__global__ void bias_pool(
    const U* u, const typename Arithmetic<D>::type* __restrict__ bias, D* out, unsigned char* __restrict__ winners,
    typename Arithmetic<D>::type margin, int map_height, int map_width, int height, int width, int groups, int p)
{
    typedef typename Arithmetic<D>::type A;
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= width * groups) return;
    const int y = blockIdx.y, x = item / groups, group = item - x * groups, right = groups * VEC;
    const size_t sample = blockIdx.z;
    Pack<A, VEC> offset;
    offset.load(bias + group * VEC);
    u += ((sample * map_height + y * p) * map_width + x * p) * right + group * VEC;
    A pooled[VEC];
    Pack<unsigned char, VEC> winner;
    if (POOL == NONE)
        pool_window<U, VEC, POOL>(u, 0, 0, 1, margin, pooled, winner);
    else if (p == 2)
        pool_window<U, VEC, POOL>(u, map_width * right, right, 2, margin, pooled, winner);
    else
        pool_window<U, VEC, POOL>(u, map_width * right, right, p, margin, pooled, winner);
    Pack<D, VEC> result;
#pragma unroll
    for (int i = 0; i < VEC; ++i) result.values[i] = narrow<D>(pooled[i] + offset.values[i]);
    const size_t at = ((sample * height + y) * width + x) * right + group * VEC;
    result.store(out + at);
    if (POOL == MAX) winner.store(winners + at);
}

// Read one window of u at given winners.
template <typename U, int VEC>
__device__ __forceinline__ void gather_window(
    const U* u, int down, int right, int p, typename Arithmetic<U>::type (&found)[VEC],
    const Pack<unsigned char, VEC>& winner)
{
#pragma unroll
    for (int dy = 0; dy < p; ++dy) {
#pragma unroll
        for (int dx = 0; dx < p; ++dx) {
            Pack<U, VEC> unit;
            unit.load(u + dy * down + dx * right);
#pragma unroll
            for (int i = 0; i < VEC; ++i)
                if (winner.values[i] == dy * p + dx) found[i] = widen(unit.values[i]);
        }
    }
}

// out = G(u), pooling linearised: u at given winners (MAX), or the mean (AVERAGE).
template <typename U, typename D, int VEC, int POOL>
__global__ void gather(
    const U* __restrict__ u, const unsigned char* __restrict__ winners, D* __restrict__ out, int map_height,
    int map_width, int height, int width, int groups, int p)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= width * groups) return;
    const int y = blockIdx.y, x = item / groups, group = item - x * groups, right = groups * VEC;
    const size_t sample = blockIdx.z, at = ((sample * height + y) * width + x) * right + group * VEC;
    u += ((sample * map_height + y * p) * map_width + x * p) * right + group * VEC;
    typename Arithmetic<U>::type found[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) found[i] = 0;
    Pack<unsigned char, VEC> winner;
    if (POOL == MAX) winner.load(winners + at);
    const int down = map_width * right;
    if (POOL == MAX && p == 2)
        gather_window<U, VEC>(u, down, right, 2, found, winner);
    else if (POOL == MAX)
        gather_window<U, VEC>(u, down, right, p, found, winner);
    else if (p == 2)
        pool_window<U, VEC, AVERAGE>(u, down, right, 2, 0, found, winner);
    else
        pool_window<U, VEC, AVERAGE>(u, down, right, p, 0, found, winner);
    Pack<D, VEC> result;
#pragma unroll
    for (int i = 0; i < VEC; ++i) result.values[i] = narrow<D>(found[i]);
    result.store(out + at);
}

// --- The product-first top-down map --------------------------------------------------------------------------------

template <typename P, int VEC>
__device__ __forceinline__ void sum_windows(
    const P* products, int y, int x, int group, int groups, int kernel, int stride, int map_height, int map_width,
    typename Arithmetic<P>::type (&sum)[VEC])
{
#pragma unroll
    for (int ky = 0; ky < kernel; ++ky) {
        const int fy = y - ky;
        if (fy < 0 || fy % stride != 0 || fy / stride >= map_height) continue;
#pragma unroll
        for (int kx = 0; kx < kernel; ++kx) {
            const int fx = x - kx;
            if (fx < 0 || fx % stride != 0 || fx / stride >= map_width) continue;
            const int row = fy / stride * map_width + fx / stride;
            Pack<P, VEC> part;
            part.load(products + (((row * kernel + ky) * kernel + kx) * groups + group) * VEC);
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[i] += widen(part.values[i]);
        }
    }
}

// out (n, height, width, C), the sum over the windows that see a pixel, in row order of the kernel, of
// products = U(s) w^T (n, map_height, map_width, kernel, kernel, C): the transpose of im2col.
template <typename P, typename D, int VEC>
__global__ void col2im(
    const P* __restrict__ products, D* __restrict__ out, int height, int width, int groups, int kernel, int stride,
    int padding, int map_height, int map_width)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= width * groups) return;
    const int y = blockIdx.y, x = item / groups, group = item - x * groups;
    const size_t sample = blockIdx.z;
    products += sample * map_height * map_width * kernel * kernel * groups * VEC;
    typename Arithmetic<P>::type sum[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = 0;
    if (kernel == 3 && stride == 1)
        sum_windows<P, VEC>(products, y + padding, x + padding, group, groups, 3, 1, map_height, map_width, sum);
    else
        sum_windows<P, VEC>(
            products, y + padding, x + padding, group, groups, kernel, stride, map_height, map_width, sum);
    Pack<D, VEC> result;
#pragma unroll
    for (int i = 0; i < VEC; ++i) result.values[i] = narrow<D>(sum[i]);
    result.store(out + ((sample * height + y) * width + x) * groups * VEC + group * VEC);
}
