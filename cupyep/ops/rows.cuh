// What the kernels share that reduce a matrix over its rows.

static const int BLOCK = 256;  // threads of a block that reduces

// Add (or take the maximum of) the values of a block's threads that hold the same channels; each of them gets the result.
// A block is `lanes` packs of channels by BLOCK / lanes rows; lanes is a power of two.
template <typename A, int VEC, bool MAXIMUM>
__device__ __forceinline__ void across_rows(A (&values)[VEC], A* shared, int lanes)
{
    const int thread = threadIdx.x;
    __syncthreads();  // what the memory held before has been read
#pragma unroll
    for (int i = 0; i < VEC; ++i) shared[i * BLOCK + thread] = values[i];
    __syncthreads();
    for (int half = BLOCK / 2; half >= lanes; half /= 2) {
        if (thread < half) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                A& mine = shared[i * BLOCK + thread];
                const A other = shared[i * BLOCK + thread + half];
                if (!MAXIMUM)
                    mine += other;
                else if (other > mine || other != other)  // a NaN wins, so that divergence stays visible
                    mine = other;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] = shared[i * BLOCK + thread % lanes];
}
