// In place of CUDA's header.
#include "cuda_shim.hpp"
