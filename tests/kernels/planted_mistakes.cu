/* Kernels with one mistake each, and what is right beside them. test_cuda_on_cpu.py expects the
 * executor to find every mistake; none of this is ever part of the product. */

extern "C" __global__ void right_reversal(int *values) {
  __shared__ int held[64];
  held[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  values[threadIdx.x] = held[63 - threadIdx.x];
}

extern "C" __global__ void no_barrier(int *values) {
  __shared__ int held[64];
  held[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = held[63 - threadIdx.x];
}

extern "C" __global__ void garbage_summed(int *values) {
  __shared__ int total;
  atomicAdd(&total, 1);
  __syncthreads();
  values[threadIdx.x] = total;
}

extern "C" __global__ void barrier_for_some(int *values) {
  if (threadIdx.x < 16) __syncthreads();
  values[threadIdx.x] = 1;
}

extern "C" __global__ void barrier_after_leaving(int *values) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  values[threadIdx.x] = 1;
}

extern "C" __global__ void two_barriers(int *values) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  values[threadIdx.x] = 1;
}

extern "C" __global__ void collective_and_barrier(int *values) {
  if (threadIdx.x % 32 < 16) {
    values[threadIdx.x] = static_cast<int>(__ballot_sync(0xFFFFFFFFu, true));
  } else {
    __syncthreads();
  }
}

extern "C" __global__ void outside_own_mask(int *values) {
  values[threadIdx.x] = static_cast<int>(__ballot_sync(0x0000FFFFu, true));
}

extern "C" __global__ void masks_differ(int *values) {
  const unsigned mask = threadIdx.x % 32 == 1 ? 0x7FFFFFFFu : 0xFFFFFFFFu;
  values[threadIdx.x] = static_cast<int>(__ballot_sync(mask, true));
}

extern "C" __global__ void calls_differ(int *values) {
  if (threadIdx.x % 2) {
    values[threadIdx.x] = static_cast<int>(__ballot_sync(0xFFFFFFFFu, true));
  } else {
    values[threadIdx.x] = static_cast<int>(__reduce_add_sync(0xFFFFFFFFu, 1u));
  }
}

extern "C" __global__ void lane_has_left(int *values) {
  if (threadIdx.x % 32 == 7) return;
  values[threadIdx.x] = static_cast<int>(__ballot_sync(0xFFFFFFFFu, true));
}

extern "C" __global__ void lane_never_comes(int *values) {
  if (threadIdx.x % 32 < 16) {
    values[threadIdx.x] = static_cast<int>(__ballot_sync(0xFFFFFFFFu, true));
  } else {
    values[threadIdx.x] = static_cast<int>(__ballot_sync(0xFFFF0000u, true));
  }
}

extern "C" __global__ void reads_outside_mask(int *values) {
  if (threadIdx.x % 32 < 16) {
    values[threadIdx.x] = __shfl_sync(0x0000FFFFu, static_cast<int>(threadIdx.x), 20);
  }
}

extern "C" __global__ void right_collectives(int *values) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int found = static_cast<int>(__ballot_sync(0xFFFFFFFFu, lane % 3 == 0)) & 1;
  found += static_cast<int>(__reduce_add_sync(0xFFFFFFFFu, static_cast<unsigned>(lane)));
  found += __shfl_xor_sync(0xFFFFFFFFu, lane, 1);
  found += __popc(__match_any_sync(0xFFFFFFFFu, lane / 4));
  if (lane < 16) found += __shfl_sync(0x0000FFFFu, lane, 3);
  values[threadIdx.x] = found;
}

extern "C" __global__ void past_the_end(int *values) { values[threadIdx.x + 1] = 1; }

extern "C" __global__ void before_the_start(int *values) {
  values[threadIdx.x] = values[static_cast<int>(threadIdx.x) - 1];
}

extern "C" __global__ void shift_too_far(int *values) {
  values[threadIdx.x] = 1 << (values[0] + 32);
}
