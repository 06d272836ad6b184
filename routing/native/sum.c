#include "sum.h"

#include <string.h>

enum { FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

static inline float as_float(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static inline uint32_t as_bits(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float from_bfloat16(uint16_t half)
{
    return as_float((uint32_t)half << 16);
}

static inline uint16_t to_bfloat16(float number)
{
    uint32_t bits = as_bits(number);
    uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* The exponent of float16 begins 112 below float32's: multiplying by 2^112 moves it, and makes subnormal numbers right
   too. Infinity and NaN keep the largest exponent. */
static inline float from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = (uint32_t)(half & 0x7fffu) << 13;
    uint32_t finite = as_bits(as_float(rest) * 0x1p112f);
    return as_float(sign | (rest >= 0x0f800000u ? rest | 0x7f800000u : finite));
}

static inline uint16_t to_float16(float number)
{
    uint32_t bits = as_bits(number), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    /* Below 2^-14 float16 counts in steps of 2^-24, which are those of float32 from 0.5 on: adding 0.5 rounds. */
    uint32_t subnormal = as_bits(as_float(rest) + 0.5f) - 0x3f000000u;
    uint32_t normal = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
    uint32_t half = rest < 0x38800000u ? subnormal : normal;
    half = rest >= 0x477ff000u ? 0x7c00u : half; /* 65520 and more */
    half = rest > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(sign | half);
}

/* Copied and not added to zero, which would lose the sign of a zero. */
#define TAKE(convert)                                                                                                  \
    do {                                                                                                               \
        for (size_t i = 0; !add && i < numbers; i++)                                                                   \
            sum[i] = convert(from[i]);                                                                                 \
        for (size_t i = 0; add && i < numbers; i++)                                                                    \
            sum[i] += convert(from[i]);                                                                                \
    } while (false)

static void take_floats(const float *restrict from, float *restrict sum, size_t numbers, bool add)
{
    TAKE();
}

static void take_halves(uint8_t dtype, const uint16_t *restrict from, float *restrict sum, size_t numbers, bool add)
{
    if (dtype == BFLOAT16)
        TAKE(from_bfloat16);
    else
        TAKE(from_float16);
}

void take_row(uint8_t dtype, const void *row, float *sum, size_t numbers, bool add)
{
    if (dtype == FLOAT32)
        take_floats(row, sum, numbers, add);
    else
        take_halves(dtype, row, sum, numbers, add);
}

void store_row(uint8_t dtype, const float *restrict sum, void *row, size_t numbers)
{
    if (dtype == FLOAT32) {
        memcpy(row, sum, numbers * sizeof *sum);
        return;
    }
    uint16_t *restrict to = row;
    if (dtype == BFLOAT16) {
        for (size_t i = 0; i < numbers; i++)
            to[i] = to_bfloat16(sum[i]);
    } else {
        for (size_t i = 0; i < numbers; i++)
            to[i] = to_float16(sum[i]);
    }
}
