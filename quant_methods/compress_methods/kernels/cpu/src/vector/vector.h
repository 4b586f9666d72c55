// The vectors of the instruction set this library is compiled for.
#pragma once

// For what runs once a line.
#define VC_INLINE inline __attribute__((always_inline))

#include "vector/trellis.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI2__)
#include "vector/avx512.h"
#define VC_BLOCKS 1
#elif defined(__AVX2__) && defined(__FMA__)
#include "vector/avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "vector/neon.h"
#else
#include "vector/plain.h"
#endif
