// Reductions of a state over all axes but the channels, the last; the NumPy reference is reduction.py.
//
// A state is a matrix of rows (samples and places) by channels. Stage one cuts the rows into slabs, one block each, so that
// there are enough blocks for every multiprocessor; stage two adds up what the slabs left. No atomics and a fixed order:
// results repeat bit for bit. A block is `lanes` packs of channels by BLOCK / lanes rows; lanes is a power of two.

#include "common.cuh"
#include "rows.cuh"

// Store values as a pack.
template <typename A, int VEC> __device__ __forceinline__ void store_values(const A (&values)[VEC], A* target)
{
    Pack<A, VEC> pack;
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.values[i] = values[i];
    pack.store(target);
}

// out (slabs, C), the sums over the rows of each slab of s (rows, C); added to what is there with `accumulate`.
template <typename T, int VEC>
__global__ void column_sums(
    const T* __restrict__ s, typename Arithmetic<T>::type* out, int rows, int groups, int slab, int lanes,
    int accumulate)
{
    typedef typename Arithmetic<T>::type A;
    __shared__ A shared[VEC * BLOCK];
    const int row = threadIdx.x / lanes, group = blockIdx.x * lanes + threadIdx.x % lanes;
    const int start = blockIdx.y * slab, end = rows < start + slab ? rows : start + slab;
    A sum[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = 0;
    if (group < groups) {
        for (int at = start + row; at < end; at += BLOCK / lanes) {
            Pack<T, VEC> value;
            value.load(s + (size_t(at) * groups + group) * VEC);
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[i] += widen(value.values[i]);
        }
    }
    across_rows<A, VEC, false>(sum, shared, lanes);
    if (row != 0 || group >= groups) return;
    out += (size_t(blockIdx.y) * groups + group) * VEC;
    Pack<A, VEC> total;
    total.clear();
    if (accumulate) total.load(out);
#pragma unroll
    for (int i = 0; i < VEC; ++i) total.values[i] += sum[i];
    total.store(out);
}

// partials (slabs, 3, C): of each channel the sum of |s|, how many |s| are at least `top`, and the largest |s|.
template <typename T, int VEC>
__global__ void column_levels(
    const T* __restrict__ s, typename Arithmetic<T>::type* __restrict__ partials, typename Arithmetic<T>::type top,
    int rows, int groups, int slab, int lanes)
{
    typedef typename Arithmetic<T>::type A;
    __shared__ A shared[VEC * BLOCK];
    const int row = threadIdx.x / lanes, group = blockIdx.x * lanes + threadIdx.x % lanes;
    const int start = blockIdx.y * slab, end = rows < start + slab ? rows : start + slab;
    A sum[VEC], count[VEC], most[VEC];
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = count[i] = most[i] = 0;
    if (group < groups) {
        for (int at = start + row; at < end; at += BLOCK / lanes) {
            Pack<T, VEC> value;
            value.load(s + (size_t(at) * groups + group) * VEC);
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const A x = widen(value.values[i]), size = x < A(0) ? -x : x;
                sum[i] += size;
                count[i] += size >= top ? A(1) : A(0);
                if (size > most[i] || size != size) most[i] = size;
            }
        }
    }
    const bool stores = row == 0 && group < groups;
    partials += (size_t(blockIdx.y) * 3 * groups + group) * VEC;
    across_rows<A, VEC, false>(sum, shared, lanes);
    if (stores) store_values<A, VEC>(sum, partials);
    across_rows<A, VEC, false>(count, shared, lanes);
    if (stores) store_values<A, VEC>(count, partials + groups * VEC);
    across_rows<A, VEC, true>(most, shared, lanes);
    if (stores) store_values<A, VEC>(most, partials + 2 * groups * VEC);
}

// out (3): the mean of |s|, the share of units at `top` or above, the share of channels whose largest |s| is at most
// `dead`, from the partials of `column_levels`. One block; `size` is the number of units.
template <typename A>
__global__ void level_shares(
    const A* __restrict__ partials, A* __restrict__ out, A dead, A size, int slabs, int channels, int lanes)
{
    __shared__ A shared[BLOCK];
    const int row = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    A total[1] = {0}, many[1] = {0}, still[1] = {0};
    for (int start = 0; start < channels; start += lanes) {
        const int channel = start + lane;
        A most[1] = {0};
        if (channel < channels) {
            for (int slab = row; slab < slabs; slab += BLOCK / lanes) {
                const A* of = partials + size_t(slab) * 3 * channels + channel;
                total[0] += of[0];
                many[0] += of[channels];
                const A largest = of[2 * channels];
                if (largest > most[0] || largest != largest) most[0] = largest;
            }
        }
        across_rows<A, 1, true>(most, shared, lanes);
        if (row == 0 && channel < channels && most[0] <= dead) still[0] += A(1);
    }
    across_rows<A, 1, false>(total, shared, 1);
    across_rows<A, 1, false>(many, shared, 1);
    across_rows<A, 1, false>(still, shared, 1);
    if (threadIdx.x != 0) return;
    out[0] = total[0] / size;
    out[1] = many[0] / size;
    out[2] = still[0] / A(channels);
}

// partials (segments, gridDim.x): what each block finds of the sum of squares of a segment, packed[bounds[y]] up to
// packed[bounds[y + 1]]. Segments begin and end at whole packs of 16 bytes.
template <typename A>
__global__ void segment_squares(const A* __restrict__ packed, const long long* __restrict__ bounds, A* partials)
{
    static const int WIDTH = 16 / sizeof(A);
    __shared__ A shared[BLOCK];
    const size_t stop = bounds[blockIdx.y + 1], stride = size_t(gridDim.x) * BLOCK * WIDTH;
    A sum[1] = {0};
    for (size_t at = bounds[blockIdx.y] + (size_t(blockIdx.x) * BLOCK + threadIdx.x) * WIDTH; at < stop; at += stride) {
        Pack<A, WIDTH> value;
        value.load(packed + at);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum[0] += value.values[i] * value.values[i];
    }
    across_rows<A, 1, false>(sum, shared, 1);
    if (threadIdx.x == 0) partials[size_t(blockIdx.y) * gridDim.x + blockIdx.x] = sum[0];
}

// out[segment] = the root of the sum of its `slabs` partials, one block each.
template <typename A> __global__ void segment_norms(const A* __restrict__ partials, A* __restrict__ out, int slabs)
{
    __shared__ A shared[BLOCK];
    A sum[1] = {0};
    for (int slab = threadIdx.x; slab < slabs; slab += BLOCK) sum[0] += partials[size_t(blockIdx.x) * slabs + slab];
    across_rows<A, 1, false>(sum, shared, 1);
    if (threadIdx.x == 0) out[blockIdx.x] = sqrt(sum[0]);
}
