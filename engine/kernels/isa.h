// Everything that is compiled once for each instruction set; `ISA` is its vectors' width in
// bits, and 1 more where bfloat16 numbers can be multiplied as they are.
#include "simd.h"
#include "quantized.h"
#include "attention.h"
#include "decoder.h"
#include "rows.h"
#include "filters.h"
#include "choose.h"
#include "history.h"
