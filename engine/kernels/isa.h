// Everything that is compiled once for each instruction set; `ISA` is its vectors' width in bits.
#include "simd.h"
#include "quantized.h"
#include "attention.h"
#include "decoder.h"
#include "rows.h"
