// Which instructions the kernels use: the best that the processor has, or fewer, as told.

#pragma once

// In this order each has what the ones before it have.
enum Isa : int { kGeneric = 0, kAvx512Bf16 = 1, kAmx = 2 };

// The level in use; set once before the first kernel runs.
extern "C" int isa_level;
