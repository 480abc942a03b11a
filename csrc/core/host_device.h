// Marks what CUDA kernels share with the host. No torch in here, and nothing of CUDA either.
#pragma once

#if defined(__CUDACC__)
#define LC_HOST_DEVICE __host__ __device__
#else
#define LC_HOST_DEVICE
#endif
