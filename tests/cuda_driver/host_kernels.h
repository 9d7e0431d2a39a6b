/* Makes kernels of a CUDA source callable by the stand-in driver; threads run one after another, so
 * there are no barriers. (Kernels with barriers run on tests/cuda_executor.) */
#pragma once

#include <cstddef>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#define __global__

struct Place {
  unsigned x, y, z;
};
static thread_local Place gridDim, blockDim, blockIdx, threadIdx;

struct HostKernel {
  size_t sizes[32];
  int count;
  void (*run)(void **);
};

static std::map<std::string, HostKernel> &host_kernels() {
  static std::map<std::string, HostKernel> table;
  return table;
}

template <auto kernel, typename... Arguments, size_t... Index>
void call_with(void **parameters, void (*)(Arguments...), std::index_sequence<Index...>) {
  kernel(*static_cast<Arguments *>(parameters[Index])...);
}

template <auto kernel, typename... Arguments>
bool enter(const char *name, void (*signature)(Arguments...)) {
  (void)signature;
  HostKernel made = {{sizeof(Arguments)...}, int(sizeof...(Arguments)), [](void **parameters) {
                       call_with<kernel>(parameters, kernel, std::index_sequence_for<Arguments...>());
                     }};
  host_kernels()[name] = made;
  return true;
}

extern "C" int stand_in_sizes(const char *name, size_t *sizes) {
  auto found = host_kernels().find(name);
  if (found == host_kernels().end()) return -1;
  std::memcpy(sizes, found->second.sizes, sizeof found->second.sizes);
  return found->second.count;
}

extern "C" void stand_in_run(const char *name, const unsigned *grid, const unsigned *block,
                             void **parameters) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x)
        for (threadIdx.z = 0; threadIdx.z < block[2]; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < block[1]; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < block[0]; ++threadIdx.x)
              host_kernels()[name].run(parameters);
}

#define HOST_KERNEL(kernel) \
  static const bool kernel##_entered = enter<&kernel>(#kernel, &kernel)
