"""CUDA kernels on this machine's processor: an executor, and a device of our contract around it."""
