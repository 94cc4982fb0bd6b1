// One step of an optimizer for one parameter; the NumPy reference is optimizer.py.
//
// Every array is read once and written once. Arithmetic is in the type of the parameters, float or double.

#include "common.cuh"

// v <- momentum v + (g + decay p); p <- p - rate v, or, with Nesterov's form, p - rate (g + decay p + momentum v).
// Without momentum there is no velocity. count: packs.
template <typename A, int VEC>
__global__ void sgd_step(
    A* __restrict__ parameter, const A* __restrict__ gradient, A* __restrict__ velocity, A rate, A momentum, A decay,
    int nesterov, int count)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const size_t at = size_t(item) * VEC;
    Pack<A, VEC> p, g, v;
    p.load(parameter + at);
    g.load(gradient + at);
    v.clear();
    if (velocity != nullptr) v.load(velocity + at);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const A total = g.values[i] + decay * p.values[i];
        v.values[i] = momentum * v.values[i] + total;
        p.values[i] -= rate * (nesterov ? total + momentum * v.values[i] : v.values[i]);
    }
    p.store(parameter + at);
    if (velocity != nullptr) v.store(velocity + at);
}

// m <- b1 m + (1 - b1) g', v <- b2 v + (1 - b2) g'^2 with g' = g + decay p; p <- shrink p - rate m /
// (sqrt(v correction) + epsilon). The rate holds the correction of the mean. The complements come as numbers of their own: 1 - b2 made here
// would have lost four digits.
template <typename A, int VEC>
__global__ void adam_step(
    A* __restrict__ parameter, const A* __restrict__ gradient, A* __restrict__ mean, A* __restrict__ square, A rate,
    A b1, A complement1, A b2, A complement2, A correction, A epsilon, A decay, A shrink, int count)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const size_t at = size_t(item) * VEC;
    Pack<A, VEC> p, g, m, v;
    p.load(parameter + at);
    g.load(gradient + at);
    m.load(mean + at);
    v.load(square + at);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        const A total = g.values[i] + decay * p.values[i];
        m.values[i] = b1 * m.values[i] + complement1 * total;
        v.values[i] = b2 * v.values[i] + complement2 * (total * total);
        p.values[i] = shrink * p.values[i] - rate * (m.values[i] / (sqrt(v.values[i] * correction) + epsilon));
    }
    p.store(parameter + at);
    m.store(mean + at);
    v.store(square + at);
}

// average <- average + share (parameter - average).
template <typename A, int VEC>
__global__ void average_step(A* __restrict__ average, const A* __restrict__ parameter, A share, int count)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= count) return;
    const size_t at = size_t(item) * VEC;
    Pack<A, VEC> a, p;
    a.load(average + at);
    p.load(parameter + at);
#pragma unroll
    for (int i = 0; i < VEC; ++i) a.values[i] += share * (p.values[i] - a.values[i]);
    a.store(average + at);
}
