/* Rows of numbers in the wire's dtypes, added up in float32. */

#ifndef EXPERTMESH_SUM_H
#define EXPERTMESH_SUM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* sum = row, or sum += row. dtype: the wire's code. */
void take_row(uint8_t dtype, const void *row, float *sum, size_t numbers, bool add);

/* row = sum, rounded to nearest, ties to even. */
void store_row(uint8_t dtype, const float *sum, void *row, size_t numbers);

#endif
