# Cross-compile on a PC for a Jetson or another 64-bit ARM machine (Debian: g++-aarch64-linux-gnu):
#   cmake -S kernels/runtime -B build/cada_seg_arm -DCADA_SEG_CODECS=OFF \
#         -DCMAKE_TOOLCHAIN_FILE=kernels/runtime/aarch64.cmake
# With the codecs or TensorRT, give the target's root with its development files: -DCMAKE_SYSROOT=DIR.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
