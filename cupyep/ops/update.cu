// The fused state update; the NumPy reference is update.py.
//
// One thread updates one pack of neighbouring units: everything is read once and written once. Grid: x runs over the
// packs of a sample, y over phases, z over the samples of a phase, so that phases which share a rest point run side by
// side and find it in the cache. With MEASURE each block also leaves the sum of its squared changes; `add_partials` adds
// these up in a fixed order. No atomics: results repeat bit for bit.
//
// Where a clamp meets NaN both comparisons fail and the NaN passes, so that divergence stays visible.

#include "common.cuh"

enum Rule { CLIP = 0, TANH = 1, SLOPE = 2, STATE = 3 };

// The numbers of an activation: slope, low, high of a CLIP (for an increment low and high as drives); center, height,
// rate of a TANH.
template <typename A> struct Numbers { A a, b, c; };

template <typename A> __device__ __forceinline__ A clamp(A x, A low, A high)
{
    return x < low ? low : (x > high ? high : x);
}

// sigma(g)
template <typename A, int RULE> __device__ __forceinline__ A activate(A g, const Numbers<A>& n)
{
    if (RULE == CLIP) return clamp(n.a * g, n.b, n.c);
    return n.a + n.b * tanh(n.c * (g - n.a));
}

// sigma(g + dg) - sigma(g) to full relative accuracy however small dg is. A difference of two values of sigma would lose
// a response of 1e-12. What a CLIP adds to dg is exactly zero where g is inside its bounds.
template <typename A, int RULE> __device__ __forceinline__ A increment(A dg, A g, const Numbers<A>& n)
{
    if (RULE == CLIP) {
        const A clipped = clamp(g, n.b, n.c);
        return n.a * clamp(dg + (g - clipped), n.b - clipped, n.c - clipped);
    }
    // tanh(a + b) - tanh(a) = sinh(b) / (cosh(a) cosh(a + b)), with e^-|x| in place of every e^|x|.
    const A a = n.c * (g - n.a), b = n.c * dg, at_rest = fabs(a), moved = fabs(a + b), size = fabs(b);
    const A exponent = size - (at_rest + moved), share = -expm1(A(-2) * size) * exp(exponent < A(0) ? exponent : A(0));
    const A change = A(2) * n.b * share / ((A(1) + exp(A(-2) * at_rest)) * (A(1) + exp(A(-2) * moved)));
    return b < A(0) ? -change : change;
}

// Sum over the block, in a fixed order, and store it; every thread of the block must take part. The size of the block
// is a power of two, at most 256.
template <typename A> __device__ __forceinline__ void store_block_sum(A value, A* target)
{
    __shared__ A sums[256];
    const int thread = threadIdx.x;
    sums[thread] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (thread < half) sums[thread] += sums[thread + half];
        __syncthreads();
    }
    if (thread == 0) *target = sums[0];
}

// total = feedback * topdown + drive + force; each may be absent. Which of the two the feedback weight scales is the
// difference between states and scaled deviations: SCALE_DRIVE.
template <typename D, int VEC, bool SCALE_DRIVE>
__device__ __forceinline__ void total_drive(
    const D* drive, const D* topdown, typename Arithmetic<D>::type feedback,
    const typename Arithmetic<D>::type* force, size_t at, typename Arithmetic<D>::type (&total)[VEC])
{
    typedef typename Arithmetic<D>::type A;
    Pack<D, VEC> below, above;
    Pack<A, VEC> push;
    below.clear();
    above.clear();
    push.clear();
    if (drive != nullptr) below.load(drive + at);
    if (topdown != nullptr) above.load(topdown + at);
    if (force != nullptr) push.load(force + at);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const A d = widen(below.values[i]), t = widen(above.values[i]);
        total[i] = (SCALE_DRIVE ? feedback * d + t : feedback * t + d) + push.values[i];
    }
}

// Move the old values towards the new ones, `relaxation` times as far, and return the sum of the squared changes of what
// is stored.
template <typename S, int VEC, bool MEASURE>
__device__ __forceinline__ typename Arithmetic<S>::type replace(
    S* s, const typename Arithmetic<S>::type (&fresh)[VEC], typename Arithmetic<S>::type relaxation)
{
    typedef typename Arithmetic<S>::type A;
    const bool relaxed = relaxation != A(1);  // the same for all threads
    A sum = 0;
    Pack<S, VEC> old, now;
    if (MEASURE || relaxed) old.load(s);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        A next = fresh[i];
        if (relaxed) next = widen(old.values[i]) + relaxation * (next - widen(old.values[i]));
        now.values[i] = narrow<S>(next);
        if (MEASURE) {
            const A change = widen(now.values[i]) - widen(old.values[i]);
            sum += change * change;
        }
    }
    now.store(s);
    return sum;
}

// s <- sigma(drive + feedback * topdown + force), the total drive into g where it is wanted.
// S: storage of the states, D: of drive and top-down input. count: packs a sample.
template <typename S, typename D, int VEC, int RULE, bool MEASURE>
__global__ void update_states(
    S* s, const D* __restrict__ drive, const D* __restrict__ topdown, typename Arithmetic<S>::type feedback,
    const typename Arithmetic<S>::type* __restrict__ force, typename Arithmetic<S>::type a,
    typename Arithmetic<S>::type b, typename Arithmetic<S>::type c, typename Arithmetic<S>::type* __restrict__ g,
    typename Arithmetic<S>::type relaxation, typename Arithmetic<S>::type* __restrict__ partials, int count)
{
    typedef typename Arithmetic<S>::type A;
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t sample = blockIdx.z;
    A sum = 0;
    if (item < count) {
        const size_t at = (sample * count + item) * VEC;
        const Numbers<A> numbers = {a, b, c};
        A total[VEC];
        total_drive<D, VEC, false>(drive, topdown, feedback, force, at, total);
        if (g != nullptr) {
            Pack<A, VEC> kept;
#pragma unroll
            for (int i = 0; i < VEC; ++i) kept.values[i] = total[i];
            kept.store(g + at);
        }
#pragma unroll
        for (int i = 0; i < VEC; ++i) total[i] = activate<A, RULE>(total[i], numbers);
        sum = replace<S, VEC, MEASURE>(s + at, total, relaxation);
    }
    if (MEASURE) store_block_sum(sum, partials + sample * gridDim.x + blockIdx.x);
}

// eps <- weight * increment(t / weight) with t = feedback * drive + topdown + force, at the drives `rest`, or, for the
// rule SLOPE, eps <- rest * t. rest has one phase's samples, the other arrays those of every phase.
template <typename S, typename D, int VEC, int RULE, bool MEASURE>
__global__ void update_deviations(
    S* eps, const D* __restrict__ drive, const D* __restrict__ topdown, typename Arithmetic<S>::type feedback,
    const typename Arithmetic<S>::type* __restrict__ force, typename Arithmetic<S>::type weight,
    typename Arithmetic<S>::type inverse, const typename Arithmetic<S>::type* __restrict__ rest,
    typename Arithmetic<S>::type a, typename Arithmetic<S>::type b, typename Arithmetic<S>::type c,
    typename Arithmetic<S>::type relaxation, typename Arithmetic<S>::type* __restrict__ partials, int count)
{
    typedef typename Arithmetic<S>::type A;
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t sample = size_t(blockIdx.y) * gridDim.z + blockIdx.z;
    A sum = 0;
    if (item < count) {
        const size_t at = (sample * count + item) * VEC, rest_at = (size_t(blockIdx.z) * count + item) * VEC;
        const Numbers<A> numbers = {a, b, c};
        Pack<A, VEC> at_rest;
        at_rest.load(rest + rest_at);
        A t[VEC];
        total_drive<D, VEC, true>(drive, topdown, feedback, force, at, t);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            if (RULE == SLOPE)
                t[i] *= at_rest.values[i];
            else
                t[i] = weight * increment<A, RULE>(t[i] * inverse, at_rest.values[i], numbers);
        }
        sum = replace<S, VEC, MEASURE>(eps + at, t, relaxation);
    }
    if (MEASURE) store_block_sum(sum, partials + sample * gridDim.x + blockIdx.x);
}

// mean = sigma(g) + share * (first + second), difference = first - second, a block's sum of |difference| into partials.
// Without `second` the difference is `first` and not written. Mean and difference may take the places of first and second.
template <typename S, int VEC, int RULE>
__global__ void compare_phases(
    const S* first, const S* second, const typename Arithmetic<S>::type* __restrict__ g,
    typename Arithmetic<S>::type share, S* mean, S* difference, typename Arithmetic<S>::type a,
    typename Arithmetic<S>::type b, typename Arithmetic<S>::type c,
    typename Arithmetic<S>::type* __restrict__ partials, int count)
{
    typedef typename Arithmetic<S>::type A;
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t sample = blockIdx.z;
    A sum = 0;
    if (item < count) {
        const size_t at = (sample * count + item) * VEC;
        const Numbers<A> numbers = {a, b, c};
        Pack<S, VEC> one, two, middle, apart;
        Pack<A, VEC> rest;
        one.load(first + at);
        two.clear();
        if (second != nullptr) two.load(second + at);
        rest.load(g + at);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const A x = widen(one.values[i]), y = widen(two.values[i]);
            middle.values[i] = narrow<S>(activate<A, RULE>(rest.values[i], numbers) + share * (x + y));
            apart.values[i] = narrow<S>(x - y);
            sum += fabs(widen(apart.values[i]));
        }
        middle.store(mean + at);
        if (second != nullptr) apart.store(difference + at);
    }
    store_block_sum(sum, partials + sample * gridDim.x + blockIdx.x);
}

// out[row] += (sum of a row's `parts` partials) / divisor, one block a row: a warp for a sample's residual.
template <typename A> __global__ void add_partials(const A* __restrict__ partials, A* out, int parts, A divisor)
{
    A sum = 0, total = 0;
    for (int part = threadIdx.x; part < parts; part += blockDim.x) sum += partials[size_t(blockIdx.x) * parts + part];
    store_block_sum(sum, &total);
    if (threadIdx.x == 0) out[blockIdx.x] += total / divisor;
}

// out = sigma'(g), which may be g. Of a CLIP low and high are drives; strictly between them it is its slope.
template <typename A, int VEC, int RULE> __global__ void slopes(const A* g, A* out, A a, A b, A c, int count)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= count) return;
    Pack<A, VEC> pack;
    pack.load(g + size_t(item) * VEC);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const A x = pack.values[i];
        if (RULE == CLIP) {
            pack.values[i] = x > b && x < c ? a : A(0);
        } else {  // b c (1 - tanh^2), with e^-|x| in place of every e^|x|
            const A decay = exp(A(-2) * fabs(c * (x - a))), sum = A(1) + decay;
            pack.values[i] = A(4) * b * c * decay / (sum * sum);
        }
    }
    pack.store(out + size_t(item) * VEC);
}

// out (rows, height, width, C) = means over the p x p windows, C = groups * VEC, of sigma(g) + scale * s (s may be
// absent), or, for the rule STATE, of s. g has the samples of one phase (grid z), s and out those of every phase: a
// thread goes through the phases and finds g in the cache.
template <typename S, typename O, int VEC, int RULE>
__global__ void see(
    const S* __restrict__ s, const typename Arithmetic<S>::type* __restrict__ g, O* __restrict__ out,
    typename Arithmetic<S>::type scale, typename Arithmetic<S>::type a, typename Arithmetic<S>::type b,
    typename Arithmetic<S>::type c, int rows, int map_height, int map_width, int height, int width, int groups, int p)
{
    typedef typename Arithmetic<S>::type A;
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= width * groups) return;
    const int y = blockIdx.y, x = item / groups, group = item - x * groups, right = groups * VEC;
    const Numbers<A> numbers = {a, b, c};
    for (int row = blockIdx.z; row < rows; row += gridDim.z) {
        A sum[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] = 0;
        for (int dy = 0; dy < p; ++dy) {
            for (int dx = 0; dx < p; ++dx) {
                const size_t place = (size_t(y * p + dy) * map_width + x * p + dx) * right + group * VEC;
                const size_t map = size_t(map_height) * map_width * right;
                Pack<S, VEC> moved;
                Pack<A, VEC> rest;
                moved.clear();
                rest.clear();
                if (s != nullptr) moved.load(s + row * map + place);
                if (RULE != STATE) rest.load(g + blockIdx.z * map + place);
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const A change = widen(moved.values[i]);
                    sum[i] += RULE == STATE ? change : activate<A, RULE>(rest.values[i], numbers) + scale * change;
                }
            }
        }
        Pack<O, VEC> mean;
#pragma unroll
        for (int i = 0; i < VEC; ++i) mean.values[i] = narrow<O>(sum[i] * (A(1) / A(p * p)));
        mean.store(out + ((size_t(row) * height + y) * width + x) * right + group * VEC);
    }
}
