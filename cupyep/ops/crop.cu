// Batches cropped, mirrored and normalised from the stored images in one go; the NumPy reference is crop.py.
//
// One thread a number: neighbours in a row of the result read neighbours of a stored row, forwards or backwards.

#include "common.cuh"

// draws (B, 6) as in crop.py: row of `stored`, dy, dx, flip, top, left. out (B, height, width, channels). With `own`
// image b is row b of `stored`.
template <typename S, typename A>
__global__ void crop(
    const S* __restrict__ stored, const long long* __restrict__ draws, const A* __restrict__ scale,
    const A* __restrict__ shift, A* __restrict__ out, int height, int width, int channels, int pad, int side, int own)
{
    const int item = blockIdx.x * blockDim.x + threadIdx.x;
    if (item >= width * channels) return;
    const int y = blockIdx.y, x = item / channels, c = item - x * channels;
    const size_t image = blockIdx.z;
    const long long* mine = draws + 6 * image;
    const long long row = y + mine[1] - pad, column = (mine[3] ? width - 1 - x : x) + mine[2] - pad;
    const long long down = y - mine[4], right = x - mine[5];
    const bool hidden = down >= 0 && down < side && right >= 0 && right < side;
    A value = 0;
    if (!hidden && row >= 0 && row < height && column >= 0 && column < width) {
        const size_t place = own ? image : size_t(mine[0]);
        value = A(stored[((place * height + row) * width + column) * channels + c]) * scale[c] + shift[c];
    }
    out[(image * height + y) * (size_t(width) * channels) + item] = value;
}
