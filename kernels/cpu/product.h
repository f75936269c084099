// Products of rows with packed weights, by what the CPU has.
#pragma once
#ifdef __AMX_BF16__
#include "product_amx.h"
#else
#include "product_fma.h"
#endif
