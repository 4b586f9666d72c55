// The product of every decoder. Families of decoders are compiled apart, side by side.
#pragma once

#include "matrix.h"

#ifdef VC_BLOCKS
#include "blocks/product.h"
#else
#include "rows/product.h"
#endif

Functions functions_of_integers(const Matrix& m);
Functions functions_of_sparse(const Matrix& m);
Functions functions_of_tables(const Matrix& m);
Functions functions_of_trellis(const Matrix& m);
