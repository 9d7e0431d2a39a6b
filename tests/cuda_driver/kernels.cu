/* Small kernels of the device contract: for a GPU through NVRTC, for the stand-in through
 * host_kernels.h and g++. */

extern "C" __global__ void add(const float *a, const float *b, float *sum, int n) {
  int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) sum[i] = a[i] + b[i];
}

/* The arguments as they arrived. */
extern "C" __global__ void arguments(signed char a, unsigned char b, short c, unsigned short d,
                                     int e, unsigned f, long long g, unsigned long long h, float x,
                                     double y, unsigned short half_bits, bool truth, double *out) {
  if (threadIdx.x != 0 || blockIdx.x != 0) return;
  const double values[] = {double(a), double(b), double(c), double(d),
                           double(e), double(f), double(g), double(h),
                           double(x), y,         double(half_bits), truth ? 1.0 : 0.0};
  for (int k = 0; k < 12; ++k) out[k] = values[k];
}

/* One int per thread: where it stands in the grid. */
extern "C" __global__ void places(int *out) {
  unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  unsigned at = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  out[at] = int(blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * threadIdx.x +
                10000 * threadIdx.y + 100000 * threadIdx.z);
}
