// A cuBLAS for the CPU with the signatures of cublas_api.h, as far as `CublasLibrary` calls it: float32 only, naive. What
// it was told besides is left in `told`, for the test to read.

#include <cstddef>

enum Operation { NORMAL = 0, TRANSPOSED = 1 };
struct Told { void* stream; void* workspace; size_t nbytes; int mode, types[3], compute, algorithm; };

extern "C" {

Told told;

int cublasCreate_v2(void** handle)
{
    *handle = &told;
    return 0;
}

int cublasSetMathMode(void* handle, int mode)
{
    static_cast<Told*>(handle)->mode = mode;
    return 0;
}

int cublasSetStream_v2(void* handle, void* stream)
{
    static_cast<Told*>(handle)->stream = stream;
    return 0;
}

int cublasSetWorkspace_v2(void* handle, void* workspace, size_t nbytes)
{
    static_cast<Told*>(handle)->workspace = workspace;
    static_cast<Told*>(handle)->nbytes = nbytes;
    return nbytes == 1 ? 7 : 0;
}

int cublasGemmEx(
    void* handle, Operation transa, Operation transb, int m, int n, int k, const void* alpha, const void* a, int a_type,
    int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute, int algorithm)
{
    *static_cast<Told*>(handle) = {told.stream, told.workspace, told.nbytes, told.mode, {a_type, b_type, c_type}, compute,
                                   algorithm};
    const float *left = static_cast<const float*>(a), *right = static_cast<const float*>(b);
    float* out = static_cast<float*>(c);
    for (int j = 0; j < n; ++j)
        for (int i = 0; i < m; ++i) {
            double sum = 0;
            for (int l = 0; l < k; ++l) {
                const float x = transa == NORMAL ? left[i + size_t(l) * lda] : left[l + size_t(i) * lda];
                const float y = transb == NORMAL ? right[l + size_t(j) * ldb] : right[j + size_t(l) * ldb];
                sum += double(x) * y;
            }
            float& target = out[i + size_t(j) * ldc];
            const float scale = *static_cast<const float*>(beta);
            target = *static_cast<const float*>(alpha) * sum + (scale == 0 ? 0 : scale * target);
        }
    return 0;
}

}  // extern "C"
