/* One row of a network's input on a GPU, in one launch: resize, colour order, scale, mean, std.
 *
 * The bytes are those of cada_deploy/preprocess.py. Both filters work in integers, and so they do
 * here: OpenCV's INTER_LINEAR with weights of 11 bits (half the size in both directions is the mean
 * of four pixels there), Pillow's BICUBIC with weights of 22 bits in two passes, rounded to 8 bits
 * in between. What needs float64, where an output pixel lies and its weights, is made once for each
 * pair of sizes by cada_deploy/preprocess_cuda.py. The rest is float32 in the order of the formula
 * (compile with -fmad=false, precise division, no flushing).
 * Compiles with nvcc, with NVRTC (no C library) and, for tests, with g++ (tests/cuda_executor).
 *
 * A block makes TILE x LANES pixels. Bicubic makes the lines of its first pass CHUNK by CHUNK in
 * shared memory and adds each to the sums of the second pass: any ratio of sizes, nothing in global
 * memory. */
#include "pixel.h"

namespace cada {

/* As in preprocess_cuda.py. */
enum { SAME = 0, BILINEAR = 1, HALVED = 2, ROWS_FIRST = 3, COLUMNS_FIRST = 4 };
constexpr int LANES = 32;
constexpr int TILE = 32;

constexpr int THREAD_ROWS = 8;
constexpr int EACH = TILE / THREAD_ROWS; /* pixels of a thread */
constexpr int THREADS = LANES * THREAD_ROWS;
constexpr int CHUNK = 32;
constexpr int BITS = 22; /* of Pillow's weights; the rest is headroom below 0 and above 255 */
constexpr int HALF_UNIT = 1 << (BITS - 1);

struct Channels {
  int32_t value[3]; /* in stored order: R, G, B */
};

struct Image {
  const uint8_t *pixels;
  int height, width;

  __device__ __forceinline__ const uint8_t *at(int y, int x) const {
    return pixels + 3 * (static_cast<int64_t>(y) * width + x);
  }
};

struct Row { /* what is written; mean and std in the model's colour order */
  void *values;
  int height, width;
  bool bgr, channels_last, halves;
  float scale, mean[3], std[3];

  __device__ __forceinline__ void put(int y, int x, const Channels &pixel) const {
    const int64_t plane = static_cast<int64_t>(height) * width;
    const int64_t at = static_cast<int64_t>(y) * width + x;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const float v = static_cast<float>(bgr ? pixel.value[2 - c] : pixel.value[c]);
      const float value = (scale * v - mean[c]) / std[c];
      const int64_t where = channels_last ? 3 * at + c : c * plane + at;
      if (halves) {
        static_cast<uint16_t *>(values)[where] = half_of_float(value);
      } else {
        static_cast<float *>(values)[where] = value;
      }
    }
  }
};

/* Everything of one output row or column o stands at table[k * outputs + o]. */
struct Axis {
  const int32_t *table;
  int outputs;

  __device__ __forceinline__ int32_t at(int k, int o) const { return table[k * outputs + o]; }
};

/* ---- one pixel ---- */

__device__ __forceinline__ Channels same(const Image &image, int y, int x) {
  const uint8_t *const from = image.at(y, x);
  return Channels{{from[0], from[1], from[2]}};
}

__device__ __forceinline__ Channels halved(const Image &image, int y, int x) {
  const uint8_t *const upper = image.at(2 * y, 2 * x), *const lower = image.at(2 * y + 1, 2 * x);
  Channels pixel;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    pixel.value[c] = (upper[c] + upper[c + 3] + lower[c] + lower[c + 3] + 2) >> 2;
  }
  return pixel;
}

/* Tables: two input indices and their weights in 1/2048. OpenCV drops 4 bits between the passes and
 * 16 in each product of the second; the sum stays within 0..1020, so nothing needs clipping. */
__device__ __forceinline__ Channels bilinear(const Image &image, const Axis &rows,
                                             const Axis &columns, int y, int x) {
  const int left = columns.at(0, x), right = columns.at(1, x);
  const int32_t of_left = columns.at(2, x), of_right = columns.at(3, x);
  const int upper = rows.at(0, y), lower = rows.at(1, y);
  const int32_t of_upper = rows.at(2, y), of_lower = rows.at(3, y);
  const uint8_t *const a = image.at(upper, left), *const b = image.at(upper, right);
  const uint8_t *const c = image.at(lower, left), *const d = image.at(lower, right);
  Channels pixel;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int32_t high = (a[k] * of_left + b[k] * of_right) >> 4;
    const int32_t low = (c[k] * of_left + d[k] * of_right) >> 4;
    pixel.value[k] = (((of_upper * high) >> 16) + ((of_lower * low) >> 16) + 2) >> 2;
  }
  return pixel;
}

/* ---- bicubic ---- */

/* Tables: first input index, number of weights, then the weights in 1/2^22. */
__device__ __forceinline__ int first_of(const Axis &axis, int o) { return axis.at(0, o); }
__device__ __forceinline__ int end_of(const Axis &axis, int o) {
  return axis.at(0, o) + axis.at(1, o);
}

__device__ __forceinline__ int32_t clipped(int32_t sum) {
  const int32_t value = sum >> BITS;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/* One pixel of the first pass, packed: `from` is the first pixel of its line, `step` the bytes
 * between two pixels of the line. */
__device__ __forceinline__ uint32_t first_pass(const uint8_t *from, int64_t step, const Axis &axis,
                                               int o) {
  int32_t sum[3] = {HALF_UNIT, HALF_UNIT, HALF_UNIT};
  const int count = axis.at(1, o);
  from += first_of(axis, o) * step;
  for (int k = 0; k < count; ++k, from += step) {
    const int32_t weight = axis.at(2 + k, o);
#pragma unroll
    for (int c = 0; c < 3; ++c) sum[c] += from[c] * weight;
  }
  return static_cast<uint32_t>(clipped(sum[0]) | clipped(sum[1]) << 8 | clipped(sum[2]) << 16);
}

/* `along` is the axis of the first pass, which blockIdx.x and the lanes go through; `across` is the
 * second's. Lanes past the end repeat the last output, so that every thread meets every barrier. */
__device__ __forceinline__ void bicubic(const Image &image, const Row &row, const Axis &along,
                                        const Axis &across, bool columns_first) {
  __shared__ uint32_t lines[CHUNK][LANES];
  const int64_t in_row = 3, in_column = 3 * static_cast<int64_t>(image.width);
  const int64_t step = columns_first ? in_column : in_row;
  const int64_t line_step = columns_first ? in_row : in_column;
  const int lane = threadIdx.x, wanted = static_cast<int>(blockIdx.x) * LANES + lane;
  const int o = wanted < along.outputs ? wanted : along.outputs - 1;
  const int begin = static_cast<int>(blockIdx.y) * TILE;
  const int last = (begin + TILE < across.outputs ? begin + TILE : across.outputs) - 1;
  const int end_line = end_of(across, last);

  int32_t sums[EACH][3];
#pragma unroll
  for (int r = 0; r < EACH; ++r) sums[r][0] = sums[r][1] = sums[r][2] = HALF_UNIT;
  for (int line = first_of(across, begin); line < end_line; line += CHUNK) {
    const int end = line + CHUNK < end_line ? line + CHUNK : end_line;
    for (int j = line + static_cast<int>(threadIdx.y); j < end; j += THREAD_ROWS) {
      lines[j - line][lane] = first_pass(image.pixels + j * line_step, step, along, o);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < EACH; ++r) {
      const int p = begin + static_cast<int>(threadIdx.y) + r * THREAD_ROWS;
      if (p > last) continue;
      const int first = first_of(across, p), own_end = end_of(across, p);
      for (int j = first > line ? first : line; j < (own_end < end ? own_end : end); ++j) {
        const int32_t weight = across.at(2 + j - first, p);
        const uint32_t pixel = lines[j - line][lane];
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          sums[r][c] += static_cast<int32_t>(pixel >> (8 * c) & 255u) * weight;
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < EACH; ++r) {
    const int p = begin + static_cast<int>(threadIdx.y) + r * THREAD_ROWS;
    if (p > last || wanted != o) continue;
    const Channels pixel{{clipped(sums[r][0]), clipped(sums[r][1]), clipped(sums[r][2])}};
    row.put(columns_first ? o : p, columns_first ? p : o, pixel);
  }
}

} // namespace cada

using namespace cada;

#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)

/* image (height, width, 3) uint8 RGB -> values, one row of a batch. Blocks of (LANES, 8) threads;
 * blockIdx.x goes through x (with COLUMNS_FIRST through y), blockIdx.y through the other. The
 * tables are those of the filter; null with SAME and HALVED. */
KERNEL cada_preprocess(const uint8_t *image, int height, int width, int filter,
                       const int32_t *row_table, const int32_t *column_table, void *values,
                       int out_height, int out_width, int bgr, int channels_last, int halves,
                       float scale, float mean_0, float mean_1, float mean_2, float std_0,
                       float std_1, float std_2) {
  const Image from{image, height, width};
  const Row row{values,      out_height, out_width, bgr != 0, channels_last != 0,
                halves != 0, scale,      {mean_0, mean_1, mean_2}, {std_0, std_1, std_2}};
  const Axis rows{row_table, out_height}, columns{column_table, out_width};
  if (filter == ROWS_FIRST) return bicubic(from, row, columns, rows, false);
  if (filter == COLUMNS_FIRST) return bicubic(from, row, rows, columns, true);
  const int x = static_cast<int>(blockIdx.x * LANES + threadIdx.x);
  if (x >= out_width) return;
  for (int r = 0; r < EACH; ++r) {
    const int y = static_cast<int>(blockIdx.y * TILE + threadIdx.y) + r * THREAD_ROWS;
    if (y >= out_height) return;
    row.put(y, x,
            filter == BILINEAR ? bilinear(from, rows, columns, y, x)
            : filter == HALVED ? halved(from, y, x)
                               : same(from, y, x));
  }
}
