// The vectors of the instruction set this library is compiled for.
#pragma once

#if defined(__AVX2__) && defined(__FMA__)
#include "vector_avx2.h"
#else
#include "vector_plain.h"
#endif
