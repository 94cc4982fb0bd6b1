// Standardized weights and the way back of their gradient; the NumPy reference and the formulas are in standardize.py.
//
// A weight is a matrix (rows, K), a filter a column. A block owns `lanes` packs of columns, and takes BLOCK / lanes rows at
// a time: one launch a direction, no atomics, a fixed order of sums. Statistics (2, K): mean, 1 / sqrt(variance + epsilon).

#include "common.cuh"
#include "rows.cuh"

template <typename A, int VEC>
__global__ void standardize(
    const A* __restrict__ v, const A* __restrict__ gain, A* __restrict__ w, A* __restrict__ statistics, A factor,
    A epsilon, int rows, int packs, int lanes)
{
    __shared__ A shared[VEC * BLOCK];
    const int row = threadIdx.x / lanes, pack = blockIdx.x * lanes + threadIdx.x % lanes;
    const int step = BLOCK / lanes, end = pack < packs ? rows : 0;
    A sum[VEC];
    Pack<A, VEC> mean, scale, value;
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = 0;
    for (int at = row; at < end; at += step) {
        value.load(v + (size_t(at) * packs + pack) * VEC);
#pragma unroll
        for (int i = 0; i < VEC; ++i) sum[i] += value.values[i];
    }
    across_rows<A, VEC, false>(sum, shared, lanes);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        mean.values[i] = sum[i] / A(rows);
        sum[i] = 0;
    }
    for (int at = row; at < end; at += step) {
        value.load(v + (size_t(at) * packs + pack) * VEC);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const A d = value.values[i] - mean.values[i];
            sum[i] += d * d;
        }
    }
    across_rows<A, VEC, false>(sum, shared, lanes);
    if (end == 0) return;
#pragma unroll
    for (int i = 0; i < VEC; ++i) scale.values[i] = A(1) / sqrt(sum[i] / A(rows) + epsilon);
    if (row == 0) {
        mean.store(statistics + size_t(pack) * VEC);
        scale.store(statistics + (size_t(packs) + pack) * VEC);
    }
    if (gain != nullptr) value.load(gain + size_t(pack) * VEC);
#pragma unroll
    for (int i = 0; i < VEC; ++i) scale.values[i] *= gain != nullptr ? factor * value.values[i] : factor;
    for (int at = row; at < end; at += step) {
        const size_t place = (size_t(at) * packs + pack) * VEC;
        value.load(v + place);
#pragma unroll
        for (int i = 0; i < VEC; ++i) value.values[i] = scale.values[i] * (value.values[i] - mean.values[i]);
        value.store(w + place);
    }
}

// dv may be dw: a thread has read what it writes, and what the sums need was read before by all of its block.
template <typename A, int VEC>
__global__ void standardize_pullback(
    const A* dw, const A* __restrict__ v, const A* __restrict__ gain, const A* __restrict__ statistics, A* dv,
    A* __restrict__ dgain, A factor, int rows, int packs, int lanes)
{
    __shared__ A shared[VEC * BLOCK];
    const int row = threadIdx.x / lanes, pack = blockIdx.x * lanes + threadIdx.x % lanes;
    const int step = BLOCK / lanes, end = pack < packs ? rows : 0;
    A total[VEC], dot[VEC];
    Pack<A, VEC> mean, inverse, value, gradient;
#pragma unroll
    for (int i = 0; i < VEC; ++i) total[i] = dot[i] = 0;
    if (end > 0) mean.load(statistics + size_t(pack) * VEC);
    for (int at = row; at < end; at += step) {
        const size_t place = (size_t(at) * packs + pack) * VEC;
        value.load(v + place);
        gradient.load(dw + place);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            total[i] += gradient.values[i];
            dot[i] += gradient.values[i] * (value.values[i] - mean.values[i]);
        }
    }
    across_rows<A, VEC, false>(total, shared, lanes);
    across_rows<A, VEC, false>(dot, shared, lanes);
    if (end == 0) return;
    inverse.load(statistics + (size_t(packs) + pack) * VEC);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
        dot[i] *= inverse.values[i];
        gradient.values[i] = factor * dot[i];
        dot[i] *= inverse.values[i] / A(rows);
        total[i] /= A(rows);
    }
    if (dgain != nullptr && row == 0) gradient.store(dgain + size_t(pack) * VEC);
    if (gain != nullptr) value.load(gain + size_t(pack) * VEC);
#pragma unroll
    for (int i = 0; i < VEC; ++i) inverse.values[i] *= gain != nullptr ? factor * value.values[i] : factor;
    for (int at = row; at < end; at += step) {
        const size_t place = (size_t(at) * packs + pack) * VEC;
        value.load(v + place);
        gradient.load(dw + place);
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const A d = value.values[i] - mean.values[i];
            gradient.values[i] = inverse.values[i] * (gradient.values[i] - total[i] - d * dot[i]);
        }
        gradient.store(dv + place);
    }
}
