// Floats of 16 bits, which GCC before 13 calls otherwise on ARM.
#pragma once

#ifdef __ARM_FP16_FORMAT_IEEE
using Float16 = __fp16;
#else
using Float16 = _Float16;
#endif
